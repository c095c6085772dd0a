"""The passes: one explicit table. Adding a pass is its file, one line here, and its test."""

from __future__ import annotations

from compress.manager import Pass
from compress.passes.allocate import Allocate
from compress.passes.context_merge import ContextMerge
from compress.passes.depth import Depth
from compress.passes.distill import Distill
from compress.passes.edit import Edit
from compress.passes.factorize import Factorize
from compress.passes.importance import Importance
from compress.passes.kv_cache import KvCache
from compress.passes.kv_policy import KvPolicy
from compress.passes.lqlora import LqLora
from compress.passes.prune import Prune
from compress.passes.quantize import Quantize
from compress.passes.rotate import Rotate
from compress.passes.smooth import Smooth
from compress.passes.sparsify import Sparsify

PASSES: dict[str, type[Pass]] = {p.name: p for p in (
    Edit, Depth, Prune, Rotate, Smooth, Allocate, Factorize, Quantize, LqLora, Distill, Sparsify, Importance, KvCache, KvPolicy,
    ContextMerge,
)}  # fmt: skip
