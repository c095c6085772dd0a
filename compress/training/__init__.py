"""Training a state's model: what learns, from which teacher, by which loss, in how much memory. Knows nothing of passes."""
