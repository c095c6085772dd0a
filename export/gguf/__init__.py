"""One file for llama.cpp."""
