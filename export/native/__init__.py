"""Our own form: every format, as safetensors that our runtime loads."""
