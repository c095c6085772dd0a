"""Patterns of names out of artifacts: what tools write is matched as `re` does, all else is refused, and nothing takes long."""

from __future__ import annotations

import random
import re
import time

import pytest

from compress.errors import ModelError
from compress.export.artifact.patterns import matches

WRITTEN = [
    ".*q_proj$", r".*mlp\.(gate|up)_proj.*", r"model.layers.\d+.mlp.experts.\d+.gate_proj", ".*lm_head", "visual.*", "", "^$",
    r"^(?:model\.)?layers\.(0|1|10)\.(mlp\.experts|block_sparse_moe\.experts)\..+$", r".*layers\.\d+\..*experts\.\d+\..*proj",
    r"(?:model\.)?layers\.[0-9]+\.self_attn\.[qkv]_proj", ".*self_attn.*|.*mlp.*", r"(.*\.)?(^model\.layers\.0)$", "lm_head",
    r".*\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj.*", "(self_attn.q_proj|mlp.up_proj)", r"model\-x\/y",
    r"[^.]+\.layers\.[^.]+\..*?", "(a|)b", r"[\w.]+_proj",
]  # fmt: skip
NAMES = ["model.layers.0.self_attn.q_proj", "model.layers.10.mlp.experts.3.gate_proj", "lm_head", "visual.blocks", "", "b", "ab",
         "layers.5.self_attn.k_proj", "model.layers.0", "layers.10.block_sparse_moe.experts.7.w1", "mlpxup_proj",
         "model-x/y", "model.layers.100.mlp.experts.3.gate_proj"]  # fmt: skip
REFUSED = [
    "(.+.+)+[^a-z_.0-9]", "(a*)*b", "(a|a)*b", "(a|a)(a|a)(a|a)", "(a|aa)+$", ".*" * 30 + "x", "(.|.)" * 40, "(?=a)b", "(?!a)",
    r"(a)\1", "a{1,9999}", "(" * 5000, "(", "a)", "[", "[a-", "[]", "*", "\\", r"\Aa", "(?i)a", "(?P<x>a)", "a*+b", "a" * 30_000,
    "(.*a|.*b)c", "a?" * 40 + "a" * 40, "(a?)?" * 40, "\n(",
]  # fmt: skip


@pytest.mark.parametrize("pattern", WRITTEN)
def test_what_tools_write_is_matched_as_re_does(pattern: str) -> None:
    for name in NAMES:
        assert matches(pattern, name) == bool(re.match(pattern, name)), name


@pytest.mark.parametrize("pattern", REFUSED)
def test_all_else_is_refused_in_one_line(pattern: str) -> None:
    with pytest.raises(ModelError, match="is no pattern that is read") as caught:
        matches(pattern, "a" * 60)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 250


def test_whatever_is_not_refused_is_matched_as_re_does() -> None:
    rng, seen = random.Random(0), 0
    atoms = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^.]", "(a|b)", "(ab|a)", "^", "$", "(?:a.)?", "x"]
    for _ in range(5000):
        pattern = "".join(rng.choice(atoms) + rng.choice(["", "", "", "*", "+", "?", "*?"]) for _ in range(rng.randint(1, 6)))
        pattern += f"|{rng.choice(atoms)}" if rng.random() < 0.2 else ""
        name = "".join(rng.choice("ab.1x") for _ in range(rng.randint(0, 8)))
        try:
            found = matches(pattern, name)
        except ModelError:
            continue
        seen += 1
        assert found == bool(re.match(pattern, name)), (pattern, name)
    assert seen > 1000


def test_the_time_grows_with_the_name_and_no_faster() -> None:
    def seconds(length: int) -> float:
        start = time.process_time()
        assert not matches(".*a.*a.*a.*", "b" * length + "aa")
        return time.process_time() - start

    seconds(100)
    assert seconds(40_000) < 200 * max(seconds(4_000), 1e-4)  # of the fourth power it would be 10,000
