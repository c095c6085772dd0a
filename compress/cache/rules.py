"""Rules that say which entries of one KV head stay, as functions on tensors; a unit is one KV head of one layer.

The idea. Decoding attends to keys and values of all tokens seen, yet most heads look at few of them, and each at its own few:
some at the latest tokens only, some at what was looked at before, a few retrieve from anywhere. So each unit has a rule and a
share of the tokens. A rule ranks the entries that are there; of n tokens seen, `count(share, n)` entries stay, to the entry,
whatever the text, so that the bytes of a policy are known before anything runs. The rules, by the papers that they come from:

    stream    the latest (StreamingLLM, arXiv 2309.17453)
    snap      those that the last `WINDOW` queries look at, pooled over neighbours, and that window (SnapKV, arXiv 2404.14469)
    h2o       half the latest, half those with most attention in sum (H2O, arXiv 2306.14048)
    heavy     those with most attention in sum, and only the last few besides
    punct     special tokens and punctuation, then the latest (the second rung of FastGen, arXiv 2310.01801)
    frequent  special tokens and punctuation, then those with most attention per query that could see them (its third rung)
    full      all of them

All keep the first tokens too (attention sinks), and the latest: a token just read is about to be needed.

While a model decodes, new entries wait beside until there are `STEP` of them; then the same rule ranks old and new together. What
`snap` looks at is then the attention of these very queries, what `h2o`, `heavy` and `frequent` look at has been summed up since
the start. So a unit holds `count` entries after the prompt and after every step, and up to `STEP` more in between.

Letters: T tokens of a prompt, N entries, G query heads that share the KV head, D its width.

Alternatives not taken. Scores that compete over all heads (Ada-KV): attention mass of different layers does not compare, and is a
worse guide than the error of outputs that policies are chosen by. Eviction at every token: copies all that is left every time.
FastGen itself, where each head takes its rule by the prompt, has no bound on memory; it can be had (ladder.py).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d

RULES = ("stream", "snap", "h2o", "heavy", "punct", "frequent", "full")
SINKS, WINDOW, POOL = 4, 32, 7
STEP = 32  # tokens that wait beside the entries while a model decodes
LEAST = 8  # entries that stay of any prompt that has them
BLOCK = 256  # queries whose attention is there at once
FASTGEN = "fastgen"  # a rule that each head takes for each prompt, from these (ladder.py)
RUNGS = ("special", "special+punct", "special+punct+frequent", "special+punct+frequent+local", "full")
# rule -> which queries' attention it goes by
SUMMED = {"snap": "window", **dict.fromkeys(("h2o", "heavy", "frequent", FASTGEN, *RUNGS[2:4]), "all")}
MARKS = ("punct", "frequent", FASTGEN, *RUNGS[:4])  # rules that ask which tokens are special or punctuation
PUNCTUATION, SPECIAL = 1, 2  # kinds of tokens, where rules ask; all others are 0


def resident(tokens: int, sliding: int | None) -> int:
    """Entries that there are of so many tokens: a layer with a sliding window of W keeps the last W - 1."""
    return tokens if sliding is None else min(tokens, sliding - 1)


def count(share: int, tokens: int, sliding: int | None = None) -> int:
    """Entries that stay of so many tokens seen; `share` in thousandths, rounded up."""
    there = resident(tokens, sliding)
    return max(-(-share * there // 1000), min(LEAST, there))


def mask_of(mask_b1qt: Tensor | None, row: int) -> Tensor | None:
    """Of the masks of a batch, or of the one that all rows share, that of a row [q, t]; None where there is none."""
    return None if mask_b1qt is None else mask_b1qt[min(row, len(mask_b1qt) - 1), 0]


def mass(q_gtd: Tensor, k_td: Tensor, scale: float, allowed_tt: Tensor | None, last: int | None = None) -> Tensor:
    """Attention that each key of a prompt gets, summed over its queries and heads, fp32 [T]; of the `last` queries alone if
    given.

    allowed [T, T]: which keys each query may look at; None: those up to itself. A query that may look at none (padding) gives
    nothing. The attention of `BLOCK` queries is there at once.
    """
    q_gtd, k_td = q_gtd.detach(), k_td.detach()  # what is kept is no function to be differentiated
    total, found = len(k_td), torch.zeros(len(k_td), device=k_td.device)
    places = torch.arange(total, device=k_td.device)
    for start in range(0 if last is None else max(0, total - last), total, BLOCK):
        rows = slice(start, min(start + BLOCK, total))
        allowed = places <= places[rows, None] if allowed_tt is None else allowed_tt[rows]
        logits = ((q_gtd[:, rows].float() * scale) @ k_td.float().T).masked_fill(~allowed, -torch.inf)
        found += logits.softmax(-1).nan_to_num_(0.0).sum((0, 1))
    return found


def scores(names: set[str], q_gtd: Tensor, k_td: Tensor, scale: float, allowed_tt: Tensor | None) -> dict[str, Tensor]:
    """What rules go by after a prompt: `window` and `all` attention [T], where one of the rules `names` asks for it."""
    wanted = {SUMMED[name] for name in names if name in SUMMED}
    return {kind: mass(q_gtd, k_td, scale, allowed_tt, WINDOW if kind == "window" else None) for kind in sorted(wanted)}


def kept(
    rule: str, many: int, place_n: Tensor, seen: int, first: int, score_n: Tensor | None = None, marked_n: Tensor | None = None
) -> Tensor:
    """Which `many` of N entries a rule keeps: their indices, ascending.

    place [N]: of each entry among all tokens, ascending; the row's text starts at `first`, and `seen` is where the next token
    will be. score [N]: attention, for rules that go by it; marked [N]: whether its token is special or punctuation.
    """
    n = len(place_n)
    if many >= n:
        return torch.arange(n, device=place_n.device)
    order_n = torch.arange(n, device=place_n.device, dtype=torch.float32)
    rank_n = _rank(rule, order_n, place_n, seen, score_n, marked_n)
    latest = {"stream": many, "snap": min(WINDOW, many // 2), "h2o": many // 2, "heavy": min(8, many // 4)}.get(rule, many // 8)
    certain_n = (order_n >= n - latest) & (rule != "stream")
    certain_n |= place_n - first < min(SINKS, many // 4)
    best = rank_n.masked_fill(certain_n, torch.inf).sort(descending=True, stable=True).indices
    return best[:many].sort().values


def _rank(rule: str, order_n: Tensor, place_n: Tensor, seen: int, score_n: Tensor | None, marked_n: Tensor | None) -> Tensor:
    """What a rule ranks entries by, the more the better."""
    if rule == "stream":
        return order_n
    if rule == "punct":
        assert marked_n is not None
        return order_n + len(order_n) * marked_n
    assert score_n is not None, f"{rule} goes by attention"
    if rule == "snap":
        return avg_pool1d(score_n[None], POOL, 1, POOL // 2, count_include_pad=False)[0]
    if rule in ("h2o", "heavy"):
        return score_n
    assert marked_n is not None
    each_n = score_n / (seen - place_n)
    return torch.where(marked_n, each_n + each_n.max() + 1, each_n)


def after_prompt(
    rule: str,
    many: int,
    place_n: Tensor,
    seen: int,
    found: Mapping[str, Tensor],
    marked_t: Tensor | None,
) -> Tensor:
    """The places [many] of the entries that a rule keeps of a prompt, of which `place` [N] are resident: a row's tokens, but for
    those that a sliding window has left behind; all of them, where there are no more than `many`. found: see `scores`; marked
    [T]."""
    if many >= len(place_n):
        return place_n
    score = found[SUMMED[rule]][place_n] if rule in SUMMED else None
    marked = marked_t[place_n] if rule in MARKS and marked_t is not None else None
    return place_n[kept(rule, many, place_n, seen, int(place_n[0]), score, marked)]


# --- what entries are stored in --------------------------------------------------------------------------------------

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "int8": torch.int8}
SCALE = torch.float16


def codes(x_nd: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors as int8 [N, D] and a scale each, fp16 [N, 1]: the largest number of a vector becomes 127."""
    scale = (x_nd.float().abs().amax(-1, keepdim=True) / 127).clamp(6e-8, 65504.0).to(SCALE)
    return (x_nd.float() / scale.float()).round().clamp(-127, 127).to(torch.int8), scale


def stored(x_nd: Tensor, kind: str) -> Tensor:
    """Vectors as they come back from a cache of this kind, in their own dtype."""
    if kind != "int8":
        return x_nd.to(DTYPES[kind]).to(x_nd.dtype)
    held, scale = codes(x_nd)
    return (held.float() * scale.float()).to(x_nd.dtype)


def entry_bytes(kind: str, rule: str, width: int) -> int:
    """Bytes of one entry: a key and a value of `width` numbers each, their scales, its place, and what its rule remembers."""
    scales = 2 * SCALE.itemsize if kind == "int8" else 0
    return 2 * width * DTYPES[kind].itemsize + scales + 4 + 4 * (rule in SUMMED) + (rule in MARKS)
