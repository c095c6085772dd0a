"""The layout of GPTQ checkpoints, for gptqmodel, vLLM and onnxruntime-genai."""
