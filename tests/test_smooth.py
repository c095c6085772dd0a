"""The pass `smooth`: the function of the model stays what it was, in every family; and the search never leaves more error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from compress.errors import ModelError, RecipeError
from compress.export.artifact.proof import logits
from compress.formats import parse
from compress.model.feeds import feeds, rows
from compress.model.model import open_model
from compress.passes import gptq_core, smooth_core
from compress.passes.quantize import Quantize
from compress.passes.smooth import Pair, Smooth
from compress.state import State
from tests.conftest import FAMILIES, Project, covered, make_model, rare
from tests.cooking import bake
from tests.pass_laws import TOKENS, step_of

BEHIND = (Quantize(format=parse("int3:g32")),)


def uneven(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Path:
    """A random model whose norms, biases and rows of v and up differ in size, so that there is something to smooth."""
    make_model(folder, FAMILIES[name](), dtype)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(7)
    for key, tensor in tensors.items():
        if tensor.ndim == 1:
            tensor.add_((torch.rand(tensor.shape, generator=generator)).to(tensor.dtype))
        elif any(part in key for part in ("v_proj", "up_proj", "w3", "fc1", "value", "gate_up_proj", "qkv", "c_attn")):
            side = 1 if "c_attn" in key else -2
            shape = [n if i == side % tensor.ndim else 1 for i, n in enumerate(tensor.shape)]
            tensor.mul_((0.3 + torch.rand(shape, generator=generator)).to(tensor.dtype))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """model(name) -> folder of an uneven model, made once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = uneven(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def smoothed(folder: Path, work: Path, p: Smooth) -> tuple[State, State, list[dict[str, Any]]]:
    """(before, after, records)."""
    source = open_model(str(folder))
    step = step_of(p, source, work, BEHIND)
    return source.state, p.run(source.state, step.context()), step.records


@pytest.mark.parametrize("name", covered(FAMILIES, "llama", "gpt2"))
def test_the_function_of_the_model_does_not_change(model: Any, tmp_path: Path, name: str) -> None:
    before, after, records = smoothed(model(name), tmp_path, Smooth(strength=0.75))
    touched = {r["site"] for r in records if r["strength"]}
    assert touched, "something was smoothed"
    assert len(after.dense.written) >= 4
    ours, theirs = (logits(s, [TOKENS.ids[:2]], "cpu")[0] for s in (before, after))
    assert float((ours - theirs).abs().max()) <= 1e-5 * float(ours.abs().max())
    assert any(not torch.equal(before.dense.read(n), after.dense.read(n)) for n in after.dense.written)


@pytest.mark.parametrize(("name", "kinds"), [
    ("llama", {"norm", "attn.v", "mlp.up"}), ("phi3", {"norm", "attn.qkv", "mlp.gate_up"}), ("opt", {"norm", "attn.v", "mlp.up"}),
    ("gpt2", {"norm", "attn.qkv"}), rare("gpt_neox", {"norm", "attn.qkv"}), rare("gemma3", {"norm", "attn.v", "mlp.up"}),
    ("mixtral", {"norm", "attn.v", "experts.up"}), ("roberta", {"attn.v"}),
])  # fmt: skip
def test_what_feeds_what_is_found(model: Any, name: str, kinds: set[str]) -> None:
    state = open_model(str(model(name))).state
    norms = [f for (block, _), f in feeds(state).items() if block == 0]
    found = {"norm"} if any(not f.obstacle for f in norms) else set()
    sites = [r.site.split(".") for (block, _), r in rows(state).items() if block == 0 and not r.obstacle]
    assert found | {f"{s[2]}.{s[-1]}" for s in sites} == kinds
    if name in ("gemma2", "gemma3"):
        assert {f.offset for f in norms} == {1.0}
    if name == "mixtral":  # the router reads the norm too, so it is scaled with the experts
        assert any(f.others for f in norms)


def test_scales_grow_with_activations_and_are_equal_where_one_row_makes_several_inputs() -> None:
    diag = torch.tensor([1.0, 16.0, 4.0, 256.0, 0.0])
    s = smooth_core.scales(diag, 0.5)
    assert s[1] / s[0] == pytest.approx(2.0)  # a = sqrt(16), to the power of one half
    assert s[4] == 1
    assert s[3] > s[1] > s[0]
    shared = smooth_core.scales(diag[:4], 1.0, torch.tensor([0, 0, 1, 1]))
    assert shared[0] == shared[1] != shared[2] == shared[3]
    assert torch.equal(smooth_core.scales(diag, 0.0), torch.ones(5))


def test_the_error_of_scaled_weights_under_the_scaled_hessian_is_that_of_the_outputs() -> None:
    generator = torch.Generator().manual_seed(0)
    X, W = torch.randn(50, 8, generator=generator), torch.randn(3, 8, generator=generator)
    s = torch.tensor([1.0, 2, 4, 0.5, 1, 1, 8, 0.25])
    made = W * s + 0.1 * torch.randn(3, 8, generator=generator)
    outputs = (X @ W.T - (X / s) @ made.T).square().sum()
    assert smooth_core.error(made, W * s, smooth_core.scaled(X.T @ X, s)) == pytest.approx(float(outputs), rel=1e-4)


@pytest.mark.slow
def test_the_search_leaves_no_more_error_than_not_smoothing(model: Any, tmp_path: Path) -> None:
    """Of every pair: the strength that was chosen, on the rows that were tried, against none."""
    before, after, records = smoothed(model("llama"), tmp_path, Smooth())
    assert {r["strength"] for r in records} - {0.0}, "on an uneven model something is worth smoothing"
    fmt, totals = parse("int3:g32"), [0.0, 0.0]
    case: Any = SimpleNamespace(scale_dtype=torch.bfloat16)
    for site in before.graph.of_block(0):
        X = torch.randn(400, site.shape[1], generator=torch.Generator().manual_seed(1))
        factor = gptq_core.factor(X.T @ X)
        for i, state in enumerate((before, after)):
            W = state.reference(site).float()
            made = next(BEHIND[0].tries(W, factor, [fmt], case))[1]
            totals[i] += smooth_core.error(made, W, X.T @ X) / smooth_core.error(torch.zeros_like(W), W, X.T @ X)
    assert totals[1] < 4 * totals[0], "and nothing is blown up"


def test_pairs_of_norms_alone(model: Any, tmp_path: Path) -> None:
    """Rows of v and up stay what they were, but for the scales of their inputs; o and down stay altogether."""
    before, after, _ = smoothed(model("llama"), tmp_path, Smooth(strength=0.75, pairs="norms"))
    for name in ("layers.0.attn.v", "layers.0.mlp.up"):
        ratio = after.reference(after.graph[name]) / before.reference(before.graph[name])
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=0)
    for name in ("layers.0.attn.o", "layers.0.mlp.down"):
        assert torch.equal(after.reference(after.graph[name]), before.reference(before.graph[name]))


@pytest.mark.parametrize("text", ["int3:g64", "int4:g32:asym", "lut3:g32", "nf3:g32:dq8x16", "q4_1", "fp8:channel/fp8:token"])
@pytest.mark.parametrize("clip", ["mse", "hessian"])
def test_rounding_asks_no_more_of_a_hessian_than_its_diagonal(text: str, clip: str) -> None:
    g = torch.Generator().manual_seed(0)
    W, X, solver = torch.randn(32, 64, generator=g), torch.randn(256, 64, generator=g), Quantize(method="rtn", clip=clip)
    size = torch.rand(64, generator=g)
    H, fmt, case = X.T @ X * size.outer(size), parse(text), SimpleNamespace(scale_dtype=torch.bfloat16, largest=1.0)
    alone = replace(gptq_core.nothing_seen(H), diag_k=H.diagonal())
    whole, apart = (next(solver.tries(W, f, [fmt], case))[1] for f in (gptq_core.factor(H), alone))
    assert not solver.asks_all(fmt)
    assert torch.equal(whole, apart)
    assert Quantize().asks_all(fmt)


def test_a_family_in_which_nothing_can_be_folded_is_refused(model: Any) -> None:
    state = open_model(str(model("roberta"))).state
    with pytest.raises(
        ModelError, match=r"finds nothing in 'roberta' to fold factors into: '.*' reads what '.*' puts out as well"
    ):
        Smooth(pairs="norms").foresee(state)


def test_a_wrong_coupling_is_noticed(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = Smooth._pairs

    def wrong(self: Smooth, state: State) -> Any:
        for pair in right(self, state):
            source = pair.source
            if getattr(source, "site", "").endswith("v"):
                source = type(source)(source.site, source.rows.flip(0), "")
            yield Pair(pair.key, source, pair.readers)

    monkeypatch.setattr(Smooth, "_pairs", wrong)
    with pytest.raises(ModelError, match=r"layers\.0: factors folded into norms and rows change what it computes, by [\d.]+%"):
        smoothed(model("llama"), tmp_path, Smooth(strength=1.0))


def test_what_it_needs_is_one_line(project: Project) -> None:
    with pytest.raises(RecipeError, match="put 'quantize' behind 'smooth'"):
        Smooth().check(True, ())
    text = yaml.safe_load(project.recipe.read_text())
    text["passes"] = [{"smooth": {}}, {"quantize": {"method": "rtn"}}]
    del text["data"]["calibration"]
    project.recipe.write_text(yaml.safe_dump(text))
    assert "'smooth' needs data.calibration" in project.run().line


@pytest.mark.slow
def test_smoothed_and_quantized_artifacts_prove_themselves(model: Any, tmp_path: Path, text: Path) -> None:
    """In every kind: the norms that changed are in the artifact."""
    source, norm = open_model(str(model("llama"))), "model.layers.0.input_layernorm.weight"
    for kind in ("compressed_tensors", "gguf"):
        steps = [{"smooth": {"strength": 0.75}}, {"quantize": {"format": "int4:g32"}}]
        done = bake(tmp_path / kind, source.folder, text, kind, *steps)
        assert done.artifacts[kind][1].difference < 0.01
        assert not torch.equal(done.state.dense.read(norm), source.checkpoint.read(norm))


@pytest.mark.slow
def test_smoothing_helps_a_small_trained_model(assets: Path, tmp_path: Path) -> None:
    from tests.cooking import stories

    kl = {}
    for name, before in (("plain", []), ("smoothed", [{"smooth": {}}])):
        (tmp_path / name).mkdir()
        done = stories(assets, tmp_path / name, [*before, {"quantize": {"method": "rtn", "format": "int3:g64"}}], 16, 16, 96)
        kl[name] = done.scores["compressed"]["kl"]
    assert kl["smoothed"] < kl["plain"]
