"""The entry point of vLLM's plug-in. vLLM calls `register` in every process, before it looks at a model."""

from __future__ import annotations


def register() -> None:
    """Teach vLLM the quantization method `compress`. Its classes are those of a module, so that workers can unpickle them."""
    from compress.export.runtime import vllm_method

    assert vllm_method.__name__
