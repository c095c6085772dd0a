"""What stays of a KV cache: policies, and the rules that they are made of."""
