"""Merged rotations: what a model computes stays, what its weights look like does not, and where they cannot go is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compress.errors import ModelError
from compress.export.artifact.proof import logits
from compress.model.model import open_model
from compress.passes.rotate import Rotate
from tests.conftest import FAMILIES, GROUPED, SMALL, covered, make_model, rare
from tests.conftest import IDS as IDS_OF
from tests.cooking import bake, refused

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(4))
UNTIED = ("llama", "mistral", "qwen3", "phi3", "mixtral", "qwen3_moe")


def turned(folder: Path, source: Path, **options: Any) -> tuple[Any, Any]:
    """The model before and after, as states."""
    done = bake(folder, source, None, "native", {"rotate": options})
    return open_model(str(source)).state, done.state


def apart(one: Any, other: Any) -> float:
    a, b = (logits(state, [IDS], "cpu")[0].float() for state in (one, other))
    return float((a - b).abs().max() / a.abs().max())


@pytest.mark.parametrize("kind", covered(["hadamard", "random"], "hadamard"))
@pytest.mark.parametrize("name", covered(UNTIED, "llama"))
def test_logits_stay_and_weights_do_not(tmp_path: Path, name: str, kind: str) -> None:
    source = make_model(tmp_path / "model", FAMILIES[name](), torch.float32)
    before, after = turned(tmp_path / "run", source, kind=kind)
    assert apart(before, after) < 1e-4
    for site in before.graph:
        assert not torch.allclose(before.weight(site), after.weight(site), atol=1e-3), site.name


@pytest.mark.parametrize(("stream", "heads"), [rare(True, False), (False, True)])
def test_either_alone(tmp_path: Path, stream: bool, heads: bool) -> None:
    source = make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)
    before, after = turned(tmp_path / "run", source, stream=stream, heads=heads)
    assert apart(before, after) < 1e-4
    q = before.graph["layers.0.attn.q"]
    assert torch.equal(before.weight(q), after.weight(q)) == (not stream)


@pytest.mark.slow
def test_norms_go_into_their_readers(tmp_path: Path) -> None:
    """Norms that differ from number to number, and biases of v and q."""
    config = FAMILIES["qwen2"]()
    config.tie_word_embeddings = False
    source = make_model(tmp_path / "model", config, torch.float32)
    model = open_model(str(source))
    import safetensors.torch as files

    path = source / "model.safetensors"
    tensors = files.load_file(path)
    for name, t in tensors.items():
        if t.ndim == 1:
            tensors[name] = t + 0.5 * torch.randn(t.shape, generator=torch.Generator().manual_seed(len(name)))
    files.save_file(tensors, path, {"format": "pt"})
    before, after = turned(tmp_path / "run", source)
    assert apart(before, after) < 1e-4
    norm = next(n for n in model.graph.parameters if "input_layernorm" in n)
    assert bool((after.dense.read(norm) == 1).all())


@pytest.mark.slow
def test_outliers_spread(tmp_path: Path) -> None:
    """A column of the embedding that is twenty times the others: after turning no input of q is so."""
    source = make_model(tmp_path / "model", FAMILIES["llama"](), torch.float32)
    import safetensors.torch as files

    tensors = files.load_file(source / "model.safetensors")
    tensors["model.layers.0.input_layernorm.weight"][5] = 20.0
    files.save_file(tensors, source / "model.safetensors", {"format": "pt"})
    before, after = turned(tmp_path / "run", source)
    q = before.graph["layers.0.attn.q"]
    sizes = after.weight(q).norm(dim=0)
    assert float(sizes.max() / sizes.median()) < 3
    assert apart(before, after) < 1e-4


@pytest.mark.slow
def test_a_tied_head_is_turned_once_it_is_untied(tmp_path: Path, text: Path) -> None:
    source = make_model(tmp_path / "model", FAMILIES["qwen2"](), torch.float32)
    refused(tmp_path / "tied", source, text, [{"rotate": {}}], "shares the embedding's matrix.*untie: true")
    done = bake(tmp_path / "run", source, None, "native", {"edit": {"untie": True}}, {"rotate": {}})
    assert apart(open_model(str(source)).state, done.state) < 1e-4


@pytest.mark.parametrize(("name", "says"), [
    ("gemma3", "shares the embedding's matrix"), ("gemma2", "shares the embedding's matrix"), ("gpt_neox", "subtracts a mean"),
    ("gpt2", "shares the embedding's matrix"),
])  # fmt: skip
def test_where_it_cannot_go_is_said(tmp_path: Path, text: Path, family: Any, name: str, says: str) -> None:
    refused(tmp_path, family(name), text, [{"rotate": {}}], says)


@pytest.mark.slow
def test_norms_on_what_is_added_are_named(tmp_path: Path, text: Path) -> None:
    """A Gemma with a head of its own still has norms behind o and down; its values can be turned."""
    config = FAMILIES["gemma3"]()
    config.tie_word_embeddings = False
    source = make_model(tmp_path / "model", config, torch.float32)
    refused(
        tmp_path / "r", source, text, [{"rotate": {}}], "post_attention_layernorm' acts on what is added to it.*stream: false"
    )
    before, after = turned(tmp_path / "run", source, stream=False)
    assert apart(before, after) < 1e-4


def test_nothing_to_turn_is_refused(tmp_path: Path, text: Path, family: Any) -> None:
    refused(tmp_path, family("llama"), text, [{"rotate": {"stream": False, "heads": False}}], "turn nothing")


@pytest.mark.slow
def test_a_gate_on_values_is_seen_before_a_weight_is_read(tmp_path: Path, text: Path) -> None:
    """Norms of heads and of linear attention lie within the block, where the stream is not; gates of values stop R2."""
    sizes: dict[str, Any] = {
        **SMALL,
        **GROUPED,
        **IDS_OF,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
    }
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16}
    config = transformers.Qwen3NextConfig(**sizes, **linear, head_dim=16, shared_expert_intermediate_size=64,
                                          layer_types=["full_attention", "linear_attention"])  # fmt: skip
    source = make_model(tmp_path / "model", config, torch.float32)
    refused(tmp_path / "r", source, text, [{"rotate": {}}], "half of 'layers.0.attn.q' is a gate on them; set heads: false")
    before, after = turned(tmp_path / "run", source, heads=False)
    assert apart(before, after) < 1e-4


@pytest.mark.slow
def test_matrices_between_latents_stay(tmp_path: Path, text: Path) -> None:
    """Attention by latents: what reads a latent behind its norm does not read the stream."""
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 64}
    config = transformers.DeepseekV3Config(**SMALL, **IDS_OF, **ranks, **experts, num_key_value_heads=4, first_k_dense_replace=1)
    source = make_model(tmp_path / "model", config, torch.float32)
    before, after = turned(tmp_path / "run", source, heads=False)
    assert apart(before, after) < 1e-4
    for name in ("q_b", "kv_b"):
        site = before.graph[f"layers.0.attn.{name}"]
        assert torch.equal(before.weight(site), after.weight(site))


def test_experts_of_an_unread_layout_are_passed_by_in_any_dtype(tmp_path: Path) -> None:
    """Their products have no kernels on the meta device in fp32; what feeds the matrices around them is known all the same."""
    config = transformers.GptOssConfig(**SMALL, **GROUPED, **IDS_OF, head_dim=16, num_local_experts=4, num_experts_per_tok=2)
    state = open_model(str(make_model(tmp_path, config, torch.float32))).state
    Rotate(stream=False).foresee(state)
    with pytest.raises(ModelError, match=r"cannot be turned: '.*post_attention_layernorm' acts on what is added to it"):
        Rotate().foresee(state)
