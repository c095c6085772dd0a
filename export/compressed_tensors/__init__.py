"""Checkpoints of compressed-tensors, which vLLM serves and transformers loads; low-rank factors as a PEFT adapter."""
