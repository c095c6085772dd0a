"""The CUDA kernels: compiled when first used, launched on tiles."""
