"""What goes together out of a model: in every family, units that nothing reads can go and nothing changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from compress.errors import ModelError
from compress.model.couplings import KV_GROUPS, MLP, Coupling, couplings, spread, without
from compress.model.model import open_model
from tests.conftest import FAMILIES, covered, make_model
from tests.pass_laws import TOKENS

WIDE_HEADS = ("opt", "gpt2", "gpt_neox", "roberta")  # the width of a head is the model's, divided by their number


def of_kind(folder: Path, kind: str) -> list[Coupling]:
    return [c for c in couplings(open_model(str(folder)).state) if c.kind == kind]


def unread(folder: Path, found: list[Coupling], gone: list[int]) -> dict[str, torch.Tensor]:
    """The tensors of a model in which nothing reads what some units put out."""
    tensors = load_file(folder / "model.safetensors")
    for c in found:
        tensors[c.reader.weight].index_fill_(int(not c.reader.transposed), c.columns[gone].flatten(), 0.0)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def cut(folder: Path, source: Path, found: list[Coupling], kept: list[int]) -> Path:
    """The checkpoint without all other units, beside the one with them."""
    state = open_model(str(source)).state
    made = without(state, found, {found[0].kind: len(kept)})
    shutil.copytree(source, folder)
    tensors = load_file(source / "model.safetensors")
    for name, c in ((name, c) for coupling in found for name, c in coupling.cuts.items()):
        left = c.left(tensors[name].shape[c.dim], torch.tensor(kept))
        tensors[name] = tensors[name].index_select(c.dim, left).contiguous()
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {s.name: s.shape for s in made.specs}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    made.config.save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    kind = transformers.AutoModelForCausalLM
    if '"roberta"' in (folder / "config.json").read_text(encoding="utf-8"):
        kind = transformers.AutoModelForMaskedLM
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("kind", [MLP, KV_GROUPS])
@pytest.mark.parametrize("name", covered(sorted(FAMILIES), "llama", "gpt2", "mixtral"))
def test_units_that_nothing_reads_change_nothing(tmp_path: Path, name: str, kind: str) -> None:
    source = make_model(tmp_path / "model", FAMILIES[name](), torch.float32)
    found = of_kind(source, kind)
    if not found:
        assert (name, kind) in {("mixtral", MLP), ("qwen3_moe", MLP)}
        return
    units = found[0].units
    kept = sorted(torch.randperm(units, generator=torch.Generator().manual_seed(1))[: units // 2].tolist())
    unread(source, found, [u for u in range(units) if u not in kept])
    if kind == KV_GROUPS and name in WIDE_HEADS:
        with pytest.raises(ModelError, match=f"'{name}' has no shape with {len(kept)} of its groups of heads"):
            cut(tmp_path / "cut", source, found, kept)
        return
    smaller, whole = loaded(cut(tmp_path / "cut", source, found, kept)), loaded(source)
    with torch.no_grad():
        found, wanted = (m(input_ids=TOKENS.ids[:2]).logits for m in (smaller, whole))
        torch.testing.assert_close(
            found, wanted, rtol=1e-5, atol=1e-4
        )  # sums of fewer zeros are split otherwise on some machines
        if whole.can_generate():
            ours, theirs = (m.generate(TOKENS.ids[:1, :8], max_new_tokens=6, do_sample=False) for m in (smaller, whole))
            assert torch.equal(ours, theirs)


def test_one_head_for_keys_can_stay_of_two(tmp_path: Path) -> None:
    """Rows of q go by the heads that share a key; with 4 heads in 2 groups, group 1 has heads 2 and 3."""
    found = of_kind(make_model(tmp_path, FAMILIES["qwen3"](), torch.float32), KV_GROUPS)[0]
    rows = {name.rpartition("self_attn.")[2]: c.rows for name, c in found.cuts.items()}
    assert rows["q_proj.weight"][1].tolist() == list(range(32, 64))
    assert rows["k_proj.weight"][1].tolist() == rows["v_proj.weight"][1].tolist() == list(range(16, 32))
    assert found.columns[1].tolist() == list(range(32, 64))
    assert not any("norm" in name for name in rows)


def test_blocks_spread_to_their_entries() -> None:
    assert spread(torch.tensor([[0], [2]]), 3).tolist() == [[0, 1, 2], [6, 7, 8]]


def test_numbers_of_heads_that_a_family_refuses(tmp_path: Path) -> None:
    """A llama of width 64 has no config with 3 heads."""
    config = FAMILIES["llama"]()
    config.num_key_value_heads = config.num_attention_heads
    folder = make_model(tmp_path, config, torch.float32)
    with pytest.raises(ModelError, match="not a multiple of the number of attention heads"):
        without(open_model(str(folder)).state, of_kind(folder, KV_GROUPS), {KV_GROUPS: 3})
    assert without(open_model(str(folder)).state, of_kind(folder, KV_GROUPS), {KV_GROUPS: 2}).config.head_dim == 16


def test_a_norm_over_all_heads_keeps_them(tmp_path: Path) -> None:
    config = transformers.Olmo2Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=272, pad_token_id=0, eos_token_id=0)  # fmt: skip
    folder = make_model(tmp_path, config, torch.float32)
    assert all("q_norm.weight' is over all heads together" in c.obstacle for c in of_kind(folder, KV_GROUPS))
    assert without(open_model(str(folder)).state, of_kind(folder, MLP), {MLP: 64}).config.intermediate_size == 64
