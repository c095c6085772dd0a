"""What a policy of the KV cache does to a model's text: figures of the same model with it and without.

Evaluation reads whole windows at once, where no cache has a part. So here the last `BEHIND` tokens of each window are read
through the cache of what comes before them: the prompt is attended to in full, then each head has what its rule keeps. KL is that
of the next token behind each of those, of the model with a plain cache from the same model with this one; whatever else was done
to the model is in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.cache.policy import SERVED, Policy, read
from compress.errors import DataError
from compress.model.attention import Following
from compress.model.data import Tokens
from compress.model.head import Compared, Streamed, both, parts
from compress.state import State

BEHIND = 64
SHORTEST = 4  # half of it a prompt, and one token behind that foretells another


class Asked(Protocol):
    """An engine (export/artifact/engines.py): logits [b, t, vocabulary] of windows, and of what comes behind them."""

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Any]: ...
    def step(self, tokens: Tensor, cache: Any) -> tuple[Tensor, Any]: ...


@dataclass(frozen=True)
class CacheScores:
    """kl (nats) and agreement (share of equal top tokens), to a plain cache, over `tokens` predictions behind prompts of `prompt`
    tokens. bytes: of the cache after such a prompt, one row, in the mean over them; least and most: where that hangs on the text;
    full: of a plain one."""

    kl: float
    agreement: float
    tokens: int
    prompt: int
    bytes: int
    least: int
    most: int
    full: int

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def share(self) -> str:
        mean, least, most = (f"{n / self.full:.1%}".replace("%", " %") for n in (self.bytes, self.least, self.most))
        return mean if self.least == self.most else f"{mean} ({least} to {most})"


def policy_of(state: State) -> Policy | None:
    """The policy that goes along with a state."""
    held = state.serving.get(SERVED)
    return read(held, "the policy of the cache") if held else None


def prompt_of(length: int) -> int:
    """How many tokens of a window are its prompt; DataError where nothing behind it is foretold."""
    if length < SHORTEST:
        raise DataError(f"windows of {length} tokens have no prompt with predictions behind it, by which a policy is "
                        f"judged; ask for windows of {SHORTEST} tokens or more")  # fmt: skip
    return length - min(BEHIND, length // 2)


def through_cache(state: State, tokens: Tokens, full: int, device: str = "cpu", engine: Asked | None = None) -> CacheScores:
    """The figures of a state with a policy, on windows in the source's ids; of an engine that has loaded it, where one is given.
    full: bytes of a plain cache after `prompt_of` tokens."""
    policy, prompt = policy_of(state), prompt_of(tokens.ids.shape[1])
    assert policy is not None, "whoever asks has seen that there is a policy"
    with torch.no_grad():
        if engine is None:
            ids = [state.ids(batch) for batch in tokens.batches()]
            see = Following(policy, prompt, ids)
            plain = Streamed.of(state, ids, device, True, start=prompt)
            found = both(plain, Streamed.of(state, ids, device, True, see=see, start=prompt))
            took = see.nbytes
        else:
            asked = [_asked(engine, window, prompt) for window in state.ids(tokens.ids).split(1)]
            found, took = [each for each, _ in asked], [nbytes for _, nbytes in asked]
    count = sum(len(each.q.total) for each in found)
    kl = sum(float(each.kl.sum()) for each in found) / count
    agree = sum(int((each.p.best == each.q.best).sum()) for each in found) / count
    return CacheScores(kl, agree, count, prompt, round(sum(took) / len(took)), min(took), max(took), full)


def _asked(engine: Asked, window: Tensor, prompt: int) -> tuple[Compared, int]:
    """One window [1, t] whole, and through the engine's cache; bytes of that after the prompt."""
    whole, _ = engine.prefill(window)
    _, cache = engine.prefill(window[:, :prompt])
    took = cache.nbytes
    behind, _ = engine.step(window[:, prompt:], cache)
    p_nv, q_nv = whole[0, prompt:-1], behind[0, :-1]
    found = Compared(len(q_nv), window[0, prompt + 1 :])
    for rows in parts(q_nv.shape[1]):
        found.add(rows.start, p_nv[:, rows].float(), q_nv[:, rows].float())
    return found, took


def rows(scores: Mapping[str, Any]) -> list[list[str]]:
    """What a table of figures says of them, in two columns."""
    found = CacheScores(**scores)
    return [["KL of the cache (nats)", f"{found.kl:.5f}"],
            ["same top token through the cache", f"{found.agreement:.2%}".replace("%", " %")],
            [f"cache of {found.prompt:,} tokens, of a plain one", found.share]]  # fmt: skip
