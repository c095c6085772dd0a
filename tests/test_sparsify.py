"""Activation sparsity: thresholds keep what they say; the runtime reads just that, and computes what the stream does."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from compress import pipeline
from compress.cli import main
from compress.errors import CompressError, FormatError
from compress.evaluate import compare
from compress.export.artifact.proof import logits
from compress.export.native import reader
from compress.export.runtime import load, sparse
from compress.export.runtime.decode import named
from compress.export.runtime.linear import PackedLinear
from compress.export.runtime.neurons import Neurons
from compress.export.runtime.sparse import Matrix
from compress.formats import Can, parse
from compress.formats.grid import Grid
from compress.formats.sparsity import THRESHOLD, Sparsity, column_bytes, row_bytes
from compress.manager import Context
from compress.model.data import Tokens
from compress.model.model import open_model
from compress.model.skips import mlp_bytes, mlps
from compress.passes import sparsify_core as core
from compress.passes.sparse_layers import Layers
from compress.passes.sparsify import Sparsify
from compress.run import Step, step_inputs
from tests.conftest import IDS, covered, make_tokenizer
from tests.cooking import bake, recipe, refused

TEXTS = ("teal", "cats:silu", "cats:gelu_tanh:joined", "predictor:r16", "predictor:r4:joined")
PACKED = ("int4:g32", "int3:g64:asym", "int8:channel", "nf4:g32", "lut3:g64", "int5:g32")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_a_sparsity_is_its_text(text: str) -> None:
    assert str(Sparsity.parse(text)) == text


@pytest.mark.parametrize("text", ["", "cats", "cats:tanh", "predictor", "predictor:r0", "teal:joined", "cats:silu:r4", "TEAL"])
def test_what_is_no_sparsity_is_refused_in_a_line(text: str) -> None:
    with pytest.raises(FormatError, match="unknown sparsity"):
        Sparsity.parse(text)


@given(keep=st.floats(0.01, 0.99), seed=st.integers(0, 99), t=st.integers(1, 40), m=st.integers(1, 30))
@settings(max_examples=25, deadline=None)
def test_a_level_is_reached_by_the_share_that_was_asked_for(keep: float, seed: int, t: int, m: int) -> None:
    scores = torch.randn(t, m, generator=torch.Generator().manual_seed(seed))
    kept = int((scores >= core.level(scores, keep)).sum())
    assert kept == max(1, round(keep * t * m))


def test_the_best_low_rank_predictor_is_the_truncated_product() -> None:
    """On these inputs no other product of this rank is nearer: compared with the singular values of X W'."""
    g = torch.Generator().manual_seed(0)
    X, W = torch.randn(200, 12, generator=g) @ torch.diag(torch.linspace(3, 0.1, 12)), torch.randn(20, 12, generator=g)
    for rank in (1, 4, 11):
        A, B = core.low_rank(X, W, rank)
        lost = (X @ (W - B @ A).T).square().sum()
        best = torch.linalg.svdvals(X @ W.T)[rank:].square().sum()
        assert float(lost) == pytest.approx(float(best), rel=1e-3)


def test_damages_between_shares_lie_on_straight_lines_of_their_logarithm() -> None:
    measured = {0.4: 1e-2, 0.6: 1e-4}
    assert core.between(measured, 0.5) == pytest.approx(1e-3)
    assert core.between(measured, 0.6) == pytest.approx(1e-4)
    assert core.between(measured, 1.0) == 0.0


# --- matrices in parts ------------------------------------------------------------------------------------------------


def packed(text: str, n: int, k: int) -> PackedLinear:
    """A module of random weights in a format."""
    fmt: Any = parse(text)
    W = torch.randn(n, k, generator=torch.Generator().manual_seed(1))
    width = fmt.width(k)
    grouped = W.unflatten(1, (-1, width))
    grid = fmt.settle(fmt.fit(grouped.amin(-1), grouped.amax(-1), torch.bfloat16))
    wide = Grid(*(None if part is None else part.repeat_interleave(width, 1) for part in (grid.scale, grid.zero)), grid.table)
    module = PackedLinear(text, (n, k), torch.float32, device="cpu", bias=True)
    module.bias.data.normal_(generator=torch.Generator().manual_seed(2))
    for name, tensor in fmt.pack(fmt.encode(W, wide), grid).items():
        getattr(module, name).copy_(tensor)
    return module


@pytest.mark.parametrize("text", PACKED)
def test_rows_and_columns_alone_are_those_of_the_matrix(text: str) -> None:
    n, k = 48, 128
    module = packed(text, n, k)
    W, matrix = module.weight.clone(), Matrix(module)
    x, rows, columns = torch.randn(3, k), torch.tensor([0, 5, 6, 47]), torch.tensor([1, 2, 64, 127])
    y, read = matrix.some_rows(x, rows)
    assert torch.allclose(y, nn.functional.linear(x, W[rows], module.bias[rows]), atol=1e-5)
    assert read == row_bytes(parse(text), (n, k), len(rows))
    matrix.turn()
    assert module.layout == "neurons"
    assert torch.equal(module.weight, W), "turned over, it holds the same bits"
    h = torch.zeros(2, k)
    h[:, columns] = torch.randn(2, 4)
    assert torch.allclose(matrix.some_columns(h, columns)[0], nn.functional.linear(h, W, module.bias), atol=1e-5)
    assert torch.allclose(module(x), nn.functional.linear(x, W, module.bias), atol=1e-4)
    none = torch.arange(0)
    assert torch.equal(matrix.some_columns(0 * h, none)[0], module.bias.expand(2, n)), "a token may ask for no neuron"
    assert matrix.some_rows(x, none)[0].shape == (3, 0)
    held = Neurons(parse(text), (n, k), named(text, (n, k), module.parts, "neurons"), torch.float32)
    assert torch.equal(held.at(columns), W[:, columns].T)
    every = torch.arange(k)
    assert held.nbytes(every) == column_bytes(parse(text), (n, k), k)
    assert Can.SKIP_COLUMNS in parse(text).can


def test_what_several_rows_need_is_their_union_and_above_a_share_all_is_read() -> None:
    torch.manual_seed(0)
    n, k = 16, 1000
    module = nn.Linear(k, n, bias=False)
    plain = module.weight.detach().clone()
    skipper = sparse.Skipper(module)
    shares = []
    for batch in (1, 2, 4, 8):
        x = torch.randn(batch, k) * (torch.rand(batch, k) < 0.2)
        skipper.read = 0.0
        assert torch.allclose(skipper(x), x @ plain.T, atol=1e-4)
        shares.append(skipper.read / (4 * n * k))
    independent = [1 - 0.8**batch for batch in (1, 2, 4)]
    assert shares[:3] == pytest.approx(independent, abs=0.05)
    assert shares[3] == 1.0, "1 - .8^8 is above what is read apart"


# --- the pass, its artifact and the runtime ---------------------------------------------------------------------------

WAYS: dict[str, Any] = {
    "llama, cats": ("llama", [], {"kind": "cats", "keep": 0.4}),
    "llama, cats, int4": ("llama", [{"quantize": {"format": "int4:g32", "method": "rtn"}}], {"kind": "cats", "keep": 0.3}),
    "gemma3, teal, asym": (
        "gemma3",
        [{"quantize": {"format": "int4:g32:asym", "method": "rtn"}}],
        {"kind": "teal", "keep": 0.55},
    ),
    "phi3, cats, joined": ("phi3", [{"quantize": {"format": "nf4:g32", "method": "rtn"}}], {"kind": "cats", "keep": 0.3}),
    "opt, predictor, int8": (
        "opt",
        [{"quantize": {"format": "int8:channel", "method": "rtn"}}],
        {"kind": "predictor", "keep": 0.4, "rank": 8},
    ),
    "gpt2, cats": ("gpt2", [], {"kind": "cats", "keep": 0.5}),
    "llama, whole reads": ("llama", [{"quantize": {"format": "ecq3", "method": "rtn"}}], {"kind": "cats", "keep": 0.4}),
}


@pytest.mark.parametrize("way", covered(WAYS, "llama, cats, int4"))
def test_the_runtime_computes_what_the_stream_does_and_reads_what_was_foretold(
    family: Any, text: Path, tmp_path: Path, way: str
) -> None:
    name, first, options = WAYS[way]
    made = bake(tmp_path, family(name), text, "native", *first, {"sparsify": {"allocate": False, **options}})
    folder, proof = made.artifacts["native"]
    assert (proof.engine, proof.remark) == ("compress runtime", "compared in fp32"), "in 16 bits neurons change sides"
    state = reader.read(folder)
    assert state.sparsity
    whole = replace(state, sparsity={})
    ids = torch.randint(0, 256, (1, 24))
    ours, dense = (logits(replace(s, dtype=torch.float32), [ids], "cpu")[0] for s in (state, whole))
    assert float((ours - dense).abs().max()) > 1e-3, "it does something"
    model = load(folder, dtype=torch.float32)
    with torch.no_grad():
        assert float((model(ids).logits - ours).abs().max()) < 2e-2 * float(ours.abs().max())
        sparse.bytes_read(model)
        cache = model(ids[:, :16], use_cache=True).past_key_values
        prompt, _ = sparse.bytes_read(model)
        for i in range(16, 24):
            out = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
            assert float((out[:, 0] - ours[:, i]).abs().max()) < 2e-2 * float(ours.abs().max())
    read, layers = sparse.bytes_read(model)[0] / 8, Layers.of(whole, options["kind"], options.get("rank"))
    foretold = sum(layers.bytes(block, options["keep"]) for block in layers.units)
    assert read == pytest.approx(foretold, rel=0.2), "tiny models, few tokens"
    assert prompt >= sum(layers.bytes(block, 1.0) for block in layers.units) * 0.99 or options["kind"] == "predictor"


def test_a_threshold_that_takes_nothing_changes_nothing(family: Any, text: Path, tmp_path: Path) -> None:
    made = bake(tmp_path, family("llama"), text, "native", {"sparsify": {"allocate": False, "keep": 0.999999}})
    state = reader.read(made.artifacts["native"][0])
    ids = torch.randint(0, 256, (2, 16))
    a, b = (logits(s, [ids], "cpu")[0] for s in (state, replace(state, sparsity={})))
    assert float((a - b).abs().max()) < 1e-2 * float(b.abs().max())


def test_a_window_of_two_tokens_holds_one_out(family: Any, text: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, family("llama"), text, exports=False)
    content = yaml.safe_load(path.read_text()) | {"passes": [{"sparsify": {"allocate": False}}]}
    content["data"]["calibration"] |= {"sequences": 1, "length": 2}
    path.write_text(yaml.safe_dump(content))
    record = next((pipeline.run(path).out / "steps").glob("*/record.json")).read_text()
    assert all(math.isfinite(site["kept"]) for site in json.loads(record)["sites"])


@pytest.mark.slow
def test_bench_counts_what_is_read_of_sparse_matrices(family: Any, text: Path, tmp_path: Path, capsys: Any) -> None:
    made = bake(tmp_path, family("llama"), text, "native", {"sparsify": {"allocate": False, "keep": 0.3}})
    folder = made.artifacts["native"][0]
    capsys.readouterr()
    assert main(["bench", str(folder), "--repeats", "1", "--prompt", "8", "--new", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    dense, ours = (told[name]["weight_bytes_read_per_token"] for name in ("original", "artifact"))
    layers = Layers.of(replace(reader.read(folder), sparsity={}), "cats")
    spared = sum(layers.bytes(block, 1.0) - layers.bytes(block, 0.3) for block in layers.units)
    assert dense == told["original"]["weight_bytes"]
    assert dense - ours == pytest.approx(spared, rel=0.25), "tiny models, few tokens"


@pytest.mark.slow
def test_shares_by_layer_read_no_more_than_one_share(family: Any, text: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, family("llama"), text, exports=False)
    content = yaml.safe_load(path.read_text()) | {"passes": [{"sparsify": {"keep": 0.5, "windows": 4}}]}
    path.write_text(yaml.safe_dump(content))
    made = pipeline.run(path)
    records = made.report.records
    state = open_model(str(family("llama"))).state
    layers = Layers.of(state, "cats")
    assert sum(layers.bytes(r["block"], r["keep"]) for r in records) <= sum(layers.bytes(b, 0.5) for b in layers.units)
    assert all(0 < r["keep"] <= 1 for r in records)
    planned = pipeline.plan(path)
    assert any("a token reads" in remark for remark in planned.remarks)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "passes", "says"),
    [
        ("llama", [{"sparsify": {"kind": "predictor"}}], "silences no neuron"),
        ("mixtral", [{"sparsify": {}}], "mixture of experts"),
        ("llama", [{"sparsify": {}}, {"lqlora": {}}], "'lqlora' behind it changes them"),
        ("llama", [{"sparsify": {}}, {"quantize": {}}], "Move 'quantize' before 'sparsify'"),
        ("llama", [{"sparsify": {"rank": 4}}], "'cats' has no factors"),
        ("opt", [{"sparsify": {"kind": "predictor", "rank": 65}}], "has no rank of 65"),
        ("llama", [{"sparsify": {"keep": "half"}}], "is a share such as 50 %"),
        ("llama", [{"sparsify": {"keep": 1.5}}], "must be less than 1"),
    ],
)
def test_what_cannot_be_sparse_is_told_by_plan(
    family: Any, text: Path, tmp_path: Path, name: str, passes: Any, says: str
) -> None:
    refused(tmp_path, family(name), text, passes, says)


@pytest.mark.parametrize("exporter", ["compressed_tensors", "gptq", "gguf", "onnx"])
def test_other_exporters_refuse_it(family: Any, text: Path, tmp_path: Path, exporter: str) -> None:
    with pytest.raises(CompressError, match="tokens leave out a part of 'layers"):
        bake(tmp_path, family("llama"), text, exporter, {"sparsify": {"allocate": False}})


def test_bytes_of_an_mlp_are_those_of_its_parts(family: Any) -> None:
    """Of a dense gated MLP at a share ρ: the gate, and ρ of the other two; a threshold for each neuron."""
    state = open_model(str(family("llama"))).state
    (mlp, *_) = mlps(state)
    each = 2 * 64 * 128
    assert mlp_bytes(state, mlp, None, 0.5) == 3 * each
    assert mlp_bytes(state, mlp, Sparsity("cats", "silu"), 0.25) == each * 1.5 + 4 * 128
    assert list(Sparsity("cats", "silu").tensors((128, 64))) == [THRESHOLD]


# --- trained models ---------------------------------------------------------------------------------------------------


def relu_toy(folder: Path) -> tuple[Path, torch.Tensor]:
    """An OPT trained on counting in several steps, with a price on active neurons, and windows of what it was trained on."""
    torch.manual_seed(0)
    config = transformers.OPTConfig(hidden_size=48, ffn_dim=384, num_hidden_layers=2, num_attention_heads=4, vocab_size=272,
                                    max_position_embeddings=64, word_embed_proj_dim=48, dropout=0.0, **IDS)  # fmt: skip
    model, g = transformers.AutoModelForCausalLM.from_config(config), torch.Generator().manual_seed(1)

    def drawn(count: int) -> torch.Tensor:
        start, step = (torch.randint(1, high, (count, 1), generator=g) for high in (256, 12))
        return (start + step * torch.arange(32)) % 256

    active: list[torch.Tensor] = []
    for layer in model.model.decoder.layers:
        layer.fc1.register_forward_hook(lambda _, args, y: active.append(y.relu().mean()))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(150):
        active.clear()
        ids = drawn(16)
        loss = model(input_ids=ids, labels=ids).loss + 0.1 * sum(active)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(folder)
    make_tokenizer(folder)
    return folder, drawn(96)


@pytest.mark.slow
def test_a_predictor_on_relu_catches_what_is_positive(tmp_path: Path) -> None:
    """Recall of .95 where 1.2 times the true density is kept, and a KL of .01 there, on windows that it was not made of."""
    folder, ids = relu_toy(tmp_path / "toy")
    model = open_model(str(folder))
    fitted, judged = Tokens(ids[:64], "counting"), Tokens(ids[64:], "counting on")
    with torch.no_grad():
        active = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        shares: list[float] = []
        for layer in active.model.decoder.layers:
            layer.fc1.register_forward_hook(lambda _, args, y: shares.append(float((y > 0).float().mean())))
        active(ids)
    p = Sparsify(kind="predictor", keep=round(1.2 * max(shares), 3), rank=24, allocate=False)
    made, records = sparsified(model, fitted, tmp_path, p)
    assert max(shares) < 0.35
    assert min(r["recall"] for r in records) >= 0.95
    kl = compare(model.state, made, judged)[1].kl
    assert kl is not None
    assert kl <= 0.01


def sparsified(model: Any, tokens: Any, folder: Path, p: Sparsify) -> tuple[Any, list[dict[str, Any]]]:
    """What a pass makes of a model, and its records."""

    def context_of(step: Step) -> Context:
        return Context(0, tokens, "cpu", step, lambda record: None, lambda done, total, what: None)

    step = Step.of(folder / f"steps-{p.keep}", 1, step_inputs(p, "root", tokens.hash, 0, ()), context_of)
    return p.run(model.state, step.context()), step.records


@pytest.mark.slow
def test_a_trained_llama_loses_little_and_shares_by_layer_lose_less(assets: Path, tmp_path: Path) -> None:
    """CATS on a Llama of 7 M weights: KL of .003 at half of the neurons; shares by layer take 15 % off."""
    kl = {}
    for allocate in (False, True):
        texts = assets / "texts"
        path = tmp_path / f"{allocate}.yaml"
        windows = {"length": 256}
        content = {"model": str(assets / "models" / "ref-7m"), "out": str(tmp_path / "run"), "data": {
            "calibration": {"text": str(texts / "c4" / "c4.utf8"), "sequences": 32, **windows},
            "evaluation": {"text": str(texts / "wikitext2-raw" / "wiki.test.raw"), "sequences": 16, **windows}},
            "passes": [{"sparsify": {"keep": "50 %", "allocate": allocate}}]}  # fmt: skip
        path.write_text(yaml.safe_dump(content))
        kl[allocate] = pipeline.run(path).scores["compressed"]["kl"]
    assert kl[False] <= 0.003
    assert kl[True] <= 0.85 * kl[False]
