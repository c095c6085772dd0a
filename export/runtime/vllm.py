"""The entry point of vLLM's plug-in. vLLM calls `register` in every process, before it looks at a model."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the quantization method `compress`, and models whose layers differ in shape. Classes are those of modules, so
    that workers can unpickle them."""
    from compress.export.runtime import vllm_method, vllm_shapes

    assert vllm_method.__name__
    vllm_shapes.install()
