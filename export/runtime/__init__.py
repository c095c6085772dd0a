"""The loading runtime: artifacts in transformers and vLLM, with their matrices packed all the while.

    import compress.export.runtime                                  # once, before from_pretrained
    model = AutoModelForCausalLM.from_pretrained("runs/x/native")

Importing registers the quantization method `compress` with transformers. `load` does the same with every check told as one
error; `keep_packed` has compressed-tensors folders loaded this way too. Needs torch, transformers and safetensors, and of
compress only formats: no pass, no recipe.
"""

from __future__ import annotations

from compress.export.runtime.loading import keep_packed, load, prepare
from compress.export.runtime.merging import Merged, merge_context

__all__ = ["Merged", "keep_packed", "load", "merge_context", "prepare"]
