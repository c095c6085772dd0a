"""Export as an ONNX graph for onnxruntime, weights beside it; and reading such a folder back."""
