"""What runs a model, seen from outside: tokens in, logits out, with a cache in between.

An engine is asked for two things: logits of whole windows (`prefill`), and of one token more (`step`). Evaluation, proofs and
timing are written on these two, so they are the same for transformers, our runtime and onnxruntime.
"""

from __future__ import annotations

import io
from contextlib import redirect_stderr
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress.errors import first_line
from compress.model.model import Model
from compress.model.skeleton import model_class, with_logits

# What transformers may take from a folder: no code, and nothing that is unpickled.
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, "use_safetensors": True}


class EngineError(Exception):
    """An engine cannot take an artifact, or its own code failed on it; the message says why."""


class Engine(Protocol):
    """name: what a user reads. tokens are int64 [b, t]; logits fp32 [b, t, vocabulary] on CPU; a cache is the engine's own."""

    @property
    def name(self) -> str: ...
    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]: ...
    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]: ...
    def weight_bytes(self) -> int:
        """Bytes of weights that one pass reads: all but tables of which it takes rows."""
        ...

    def unread(self) -> float:
        """Bytes of these that the passes since this was last asked have left unread, since their tokens asked for a part."""
        ...


class Transformers:
    """A model of transformers, with stock modules or with packed ones. EngineError where its own code fails.

    remark: why it is this engine and no other.
    """

    def __init__(self, model: nn.Module, name: str, remark: str = ""):
        self.model, self.name, self.remark = with_logits(model.eval()), name, remark

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]:
        return self._run(tokens)

    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]:
        return self._run(tokens, past_key_values=cache)

    def weight_bytes(self) -> int:
        """All parameters and buffers once, but embeddings that are nothing else; of a mixture, all experts."""
        tables = {t.data_ptr() for m in self.model.modules() if isinstance(m, nn.Embedding)
                  for t in (*m.parameters(), *m.buffers())}  # fmt: skip
        others = {t.data_ptr() for m in self.model.modules() if not isinstance(m, nn.Embedding)
                  for t in (*m.parameters(recurse=False), *m.buffers(recurse=False))}  # fmt: skip
        held = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(n for place, n in held.items() if place not in tables - others)

    def unread(self) -> float:
        return 0.0

    def _run(self, tokens: Tensor, **cache: Any) -> tuple[Tensor, Any]:
        place = next(p.device for p in self.model.parameters())
        try:
            with torch.no_grad(), redirect_stderr(io.StringIO()):  # progress bars of what is unpacked in the first pass
                out = self.model(input_ids=tokens.to(place), use_cache=True, **cache)
        except Exception as e:  # some architectures read a module's `weight`, which a packed module lacks
            raise EngineError(f"{self.name}' {type(self.model).__name__} fails on it ({first_line(e)})") from e
        return out.logits.float().cpu(), out.get("past_key_values")


def dense(model: Model, device: str, dtype: torch.dtype | None = None) -> Engine:
    """The model as it is, in transformers, computing in its own dtype or another one. EngineError where that cannot load it."""
    try:
        with redirect_stderr(io.StringIO()):  # progress bars
            kind = model_class(model.config)
            found = kind.from_pretrained(model.folder, config=model.config, dtype=dtype or model.dtype, **LOCAL).to(device)
    except Exception as e:
        raise EngineError(f"transformers' {model_class(model.config).__name__} fails on it ({first_line(e)})") from e
    return Transformers(found, "transformers")


def greedy(engine: Engine, prompt: Tensor, count: int) -> Tensor:
    """The `count` tokens [b, count] that an engine finds most likely, one after the other, after a prompt [b, t]."""
    logits, cache = engine.prefill(prompt)
    found = [logits[:, -1:].argmax(-1)]
    while len(found) < count:
        logits, cache = engine.step(found[-1], cache)
        found.append(logits[:, -1:].argmax(-1))
    return torch.cat(found, 1)
