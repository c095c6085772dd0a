"""Formats with an activation half, and small floats: the numbers are those of compressed-tensors to the bit, every figure of a
run speaks of the model that is served, and what engines join has one global scale."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from compress.errors import FormatError
from compress.export.artifact.proof import logits
from compress.export.artifact.schemes import FLOATS, group_of, schemes
from compress.export.native import reader
from compress.export.runtime import load
from compress.export.table import EXPORTERS
from compress.formats import Float, Packed, Served, parse
from compress.formats.activations import RULES, Activation, divisor, to_e2m1
from compress.formats.grid import Grid
from compress.model.model import open_model
from compress.passes import clip_core, gptq_core
from compress.passes.quantize import Quantize
from compress.passes.rounding_core import Sample
from compress.passes.smooth import Smooth
from tests.conftest import covered
from tests.cooking import bake, refused
from tests.laws import bound, encode, packed_tensors
from tests.pass_laws import TOKENS, step_of, tensors_of
from tests.support import refusal

SCHEMES = {
    "int8:channel/int8:token": ("int-quantized", "W8A8"),
    "fp8:channel/fp8:token": ("float-quantized", "FP8_DYNAMIC"),
    "nvfp4/nvfp4": ("nvfp4-pack-quantized", "NVFP4"),
    "nvfp4": ("nvfp4-pack-quantized", "NVFP4A16"),
    "mxfp4/mxfp4": ("mxfp4-pack-quantized", "MXFP4"),
    "mxfp4": ("mxfp4-pack-quantized", "MXFP4A16"),
    "mxfp4/fp8:g128": ("mxfp4-pack-quantized", "MXFP4XFP8"),
    "mxfp8/mxfp8": ("mxfp8-quantized", "MXFP8"),
    "mxfp8": ("mxfp8-quantized", "MXFP8A16"),
    "int4:g128/int8:token": ("pack-quantized", "W4A8"),
    "int4:g128/fp8:token": ("pack-quantized", "W4AFP8"),
    "int4:g128/int4:token": ("pack-quantized", "W4A4"),
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def preset(name: str) -> Any:
    library = pytest.importorskip("compressed_tensors.quantization.quant_scheme")
    return library.preset_name_to_scheme(name, ["Linear"])


# --- the library's numbers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", [t for t in SCHEMES if "/" in t])
@given(st.sampled_from(DTYPES), st.sampled_from([1e-3, 1.0, 300.0]), st.integers(0, 5))
@settings(deadline=None, max_examples=12)
def test_inputs_are_rounded_as_compressed_tensors_does(text: str, dtype: torch.dtype, size: float, seed: int) -> None:
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 9, 256, generator=generator) * size * torch.rand(256, generator=generator).pow(4)
    x[0, 3] = 0
    number = torch.tensor([divisor(0.7 * float(x.abs().max()))])
    module: Any = torch.nn.Linear(1, 1)
    module.quantization_status = "frozen"
    if (ours := parse(text)).input.measured:  # type: ignore[union-attr]
        module.input_global_scale = number
    module.quantization_status = pytest.importorskip("compressed_tensors.quantization").QuantizationStatus.FROZEN
    theirs = forward.forward_quantize(module, x.to(dtype), "input", preset(SCHEMES[text][1]).input_activations)
    found = ours.input.round(x.to(dtype), number)  # type: ignore[union-attr]
    assert found.dtype == theirs.dtype == dtype
    assert torch.equal(found, theirs)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("size", [1e-4, 0.03, 5.0])
def test_weights_are_what_compressed_tensors_unpacks(text: str, size: float) -> None:
    base = pytest.importorskip("compressed_tensors.compressors.base")
    fmt, (layout, name) = parse(text), SCHEMES[text]
    W = torch.randn(64, 256, generator=torch.Generator().manual_seed(1)) * size
    W[3], W[5, :32] = 0, 0
    tensors = packed_tensors(fmt, W)
    peer = base.BaseCompressor.get_value_from_registry(layout)
    theirs = peer.decompress(dict(tensors), preset(name))["weight"]
    assert torch.equal(theirs, Packed(fmt, (64, 256), tensors).dequantize(theirs.dtype))


@pytest.mark.parametrize("text", SCHEMES)
def test_config_says_what_the_presets_say(text: str) -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    group, (layout, name) = group_of(parse(text)), SCHEMES[text]  # type: ignore[arg-type]
    theirs = preset(name)
    assert group["format"] == layout
    for half in ("weights", "input_activations"):
        ours, wanted = group[half], getattr(theirs, half)
        assert (ours is None) == (wanted is None)
        if ours is not None:
            made = quantization.QuantizationArgs(**ours)
            for key in ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype"):
                assert getattr(made, key) == getattr(wanted, key), (half, key)
    config = {"config_groups": {"group_0": {"targets": ["Linear"], **json.loads(json.dumps(group))}}}
    assert schemes(config) == [(["Linear"], parse(text))]


def test_e2m1_rounds_to_the_even_code() -> None:
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 9.0])
    wanted = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0])
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(to_e2m1(halves.to(dtype)), wanted.to(dtype))
        assert torch.equal(to_e2m1(-halves.to(dtype)), -wanted.to(dtype))


# --- grids whose scales are restricted -------------------------------------------------------------------------------


@given(st.sampled_from(sorted(FLOATS)), st.integers(0, 50), st.floats(0.5, 2.0))
@settings(deadline=None, max_examples=20)
def test_a_scale_is_moved_to_the_nearest_that_can_be_stored(text: str, seed: int, by: float) -> None:
    """So no other scale that is stored lies nearer, up to fp32, and a refit by least squares cannot lose."""
    W = torch.randn(4, 64, generator=torch.Generator().manual_seed(seed))
    fmt = bound(Float(text), W)
    assert isinstance(fmt, Float)
    grid = encode(fmt, W)[1]
    moved = fmt.rescale(grid, torch.full_like(grid.scale, by))
    wanted = grid.scale.float() * by
    for near in (0.5, 0.85, 0.95, 1.06, 1.2, 2.0):
        other = fmt.rescale(moved, torch.full_like(moved.scale, near))
        assert ((moved.scale.float() - wanted).abs() <= (other.scale.float() - wanted).abs() + 1e-6 * wanted).all()
    again = fmt.unpack(fmt.pack(torch.zeros(4, 64, dtype=torch.uint8), moved))[1]
    assert torch.equal(again.scale, moved.scale)


def test_searching_scales_never_loses_and_four_over_six_wins() -> None:
    W = torch.randn(128, 256, generator=torch.Generator().manual_seed(2))
    fmt = Float("nvfp4").bound(W)
    errors = {}
    for clip in ("minmax", "mse"):
        grid = clip_core.fit(W, fmt, clip, torch.bfloat16, torch.ones(256))
        made = fmt.dequantize(fmt.pack(clip_of(W, fmt, grid), grid), torch.float32)
        errors[clip] = float((made - W).square().sum())
    assert errors["mse"] < 0.9 * errors["minmax"]


def clip_of(W: Tensor, fmt: Float, grid: Grid) -> Tensor:
    from compress.formats.grid import encoded

    return encoded(W, grid, fmt)


@pytest.mark.parametrize("text", sorted(FLOATS))
def test_gptq_is_never_worse_than_rounding(text: str) -> None:
    generator = torch.Generator().manual_seed(3)
    W, X = torch.randn(32, 128, generator=generator), torch.randn(400, 128, generator=generator)
    X = X @ torch.randn(128, 128, generator=generator)
    H = gptq_core.finish(X.T @ X)
    fmt = Float(text).bound(W)
    found = gptq_core.quantize(W, gptq_core.factor(H), fmt)
    assert (found.loss_n <= found.rounding_loss_n * (1 + 1e-5)).all()
    assert float(found.loss_n.sum()) < 0.9 * float(found.rounding_loss_n.sum())


# --- the model that is served ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """served(format) -> the outcome of rounding a llama to it, in both kinds of artifact, made once."""
    made: dict[str, Any] = {}

    def get(form: str) -> Any:
        if form not in made:
            step = {"quantize": {"method": "rtn", "format": form}}
            folder = tmp_path_factory.mktemp("served")
            made[form] = bake(folder, family("llama", blocks=1), text, "compressed_tensors native", step)
        return made[form]

    return get


ENDS = ["int8:channel/int8:token", "fp8:channel/fp8:token", "int4:g32/fp8:token", "nvfp4/nvfp4", "mxfp4", "mxfp8/mxfp8"]


@pytest.mark.parametrize("form", covered(ENDS, ENDS[0]))
def test_stock_transformers_and_our_runtime_compute_what_the_run_measured(served: Any, form: str) -> None:
    done = served(form)
    folder, proof = done.artifacts["compressed_tensors"]
    assert proof.engine == "transformers"
    assert proof.difference == 0
    assert done.artifacts["native"][1].difference == 0
    site = done.state.graph["layers.0.mlp.down"]
    held = sum(t.nbytes for n, t in load_file(folder / "model.safetensors").items() if n.startswith(f"{site.stem}."))
    assert held == parse(form).nbytes(site.shape)
    assert {str(f) for f in reader.read(done.artifacts["native"][0]).formats.values()} == {form}


@pytest.mark.slow
def test_onnxruntime_multiplies_bytes(family: Any, text: Path, tmp_path: Path) -> None:
    """What is rounded is rounded once for all that read it; the proof has compared logits."""
    step = {"quantize": {"method": "rtn", "format": "int8:channel/int8:token"}}
    folder, _ = bake(tmp_path, family("llama", blocks=1), text, "onnx", step).artifacts["onnx"]
    graph = pytest.importorskip("onnx").load(folder / "model.onnx", load_external_data=False)
    kinds = [node.op_type for node in graph.graph.node]
    assert kinds.count("MatMulInteger") == 7
    assert kinds.count("ReduceMax") == 4


def test_the_nodes_are_our_arithmetic() -> None:
    """One matrix as onnxruntime runs it, told to add products of bytes in 32 bits: ours to a millionth."""
    onnx, ort = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from compress.export.onnx.encode import slots
    from compress.export.onnx.nodes import Nodes, operators
    from compress.export.onnx.session import PRECISE

    fmt, generator = parse("int8:channel/int8:token"), torch.Generator().manual_seed(5)
    W, x = torch.randn(24, 96, generator=generator), torch.randn(5, 96, generator=generator)
    x[2] = 0
    held = packed_tensors(fmt, W)
    nodes = Nodes(slots(fmt, (24, 96), torch.float32, "m."), "fp32", 4)
    site: Any = SimpleNamespace(stem="m", shape=(24, 96), transposed=False)
    nodes.product_of_bytes(fmt, site, "x", "y")  # type: ignore[arg-type]
    stored = {"m.weight": held["weight"].numpy(), "m.weight_scale": held["weight_scale"].float().numpy()}
    ends = [onnx.helper.make_tensor_value_info(name, 1, [None, n]) for name, n in (("x", 96), ("y", 24))]
    graph = onnx.helper.make_graph(nodes.take(), "g", ends[:1], ends[1:], [
        *(onnx.numpy_helper.from_array(t, name) for name, t in stored.items()), *nodes.constants.values(),
    ])  # fmt: skip
    model = onnx.helper.make_model(graph, opset_imports=operators(), ir_version=10)
    options = ort.SessionOptions()
    options.add_session_config_entry(PRECISE, "1")
    (y,) = ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x.numpy()})
    wanted = fmt.input.round(x) @ fmt.dequantize(held, torch.float32).T  # type: ignore[union-attr]
    assert float((torch.from_numpy(y) - wanted).abs().max()) < 1e-6 * float(wanted.abs().max())


def test_figures_speak_of_rounded_inputs(served: Any) -> None:
    """The logits of a state are not those of its stored weights alone, and are those of the runtime."""
    done = served("nvfp4/nvfp4")
    state, ids = done.state, TOKENS.ids[:2]
    alone = replace(state, codes={n: replace(c, format=parse("nvfp4")) for n, c in state.codes.items()})
    ours, theirs = (logits(s, [ids], "cpu")[0] for s in (state, alone))
    assert float((ours - theirs).abs().max()) > 1e-3 * float(ours.abs().max())
    model = load(done.artifacts["native"][0]).eval()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids).logits.float(), ours)


def test_inputs_behind_a_matrix_carry_the_rounding_in_front_of_it(family: Any, tmp_path: Path) -> None:
    """A later matrix sees what the earlier ones put out as they are served."""
    source = open_model(str(family("llama")))
    made = {}
    for text in ("int8:channel", "int8:channel/int4:token"):
        p = Quantize(format=parse(text), method="rtn", clip="hessian")
        step = step_of(p, source, tmp_path / text.replace("/", "_").replace(":", "_"))
        p.run(source.state, step.context())
        made[text] = {r["site"]: r["error"] for r in step.records}
    plain, rounded = made.values()
    assert plain["layers.0.attn.q"] == rounded["layers.0.attn.q"]
    assert plain["layers.1.attn.q"] != rounded["layers.1.attn.q"]


@pytest.mark.parametrize("form", ["int8:channel/int8:token", "int8:channel"])
def test_few_tokens_do_not_move_weights_for_what_rounding_does_to_inputs(
    family: Any, text: Path, tmp_path: Path, form: str
) -> None:
    """192 tokens for 64 inputs and more. Where inputs are taken as they are, drift is that of weights, and is made up for."""
    made = [bake(tmp_path / str(drift), family("llama"), text, "native", {"quantize": {"format": form, "drift": drift}})
            for drift in (0.5, 0)]  # fmt: skip
    moved, still = (tensors_of(m.state) for m in made)
    same = all(torch.equal(t, still[name]) for name, t in moved.items())
    assert same == ("/" in form)
    assert ("few for inputs that are rounded: no drift" in (made[0].out / "report.md").read_text()) == same


@pytest.mark.parametrize("calibrated", [True, False])
def test_matrices_that_engines_join_share_their_global_scale(family: Any, text: Path, tmp_path: Path, calibrated: bool) -> None:
    step = {"quantize": {"method": "rtn", "format": "nvfp4"}}
    done = bake(tmp_path, family("llama", blocks=1), text if calibrated else None, "native", step)
    held = load_file(done.artifacts["native"][0] / "compress-00001.safetensors")
    scale = {n.split(".")[-2]: float(t) for n, t in held.items() if n.endswith("weight_global_scale")}
    assert scale["q_proj"] == scale["k_proj"] == scale["v_proj"]
    assert scale["gate_proj"] == scale["up_proj"]
    assert len(set(scale.values())) == 4


def test_what_rounding_inputs_adds_is_what_it_adds() -> None:
    generator = torch.Generator().manual_seed(4)
    X, W = torch.randn(64, 32, generator=generator), torch.randn(8, 32, generator=generator)
    fmt, sample = parse("int8:channel/int4:token"), Sample()
    assert isinstance(fmt, Served)
    sample.see(X)
    direct = ((Activation("int4:token").round(X) - X) @ W.T).square().sum(0)
    assert torch.allclose(sample.loss_n(W, fmt), direct, rtol=1e-5)
    twice = Sample()
    twice.see(torch.cat([X] * 2), torch.full((128,), 3.0))
    assert torch.allclose(twice.loss_n(W, fmt).sum(), 6 * direct.sum(), rtol=0.3)


@pytest.mark.slow
def test_smoothing_is_searched_with_inputs_rounded(family: Any, tmp_path: Path) -> None:
    """Where weights are exact and inputs are not, scales move what is large in the inputs into the weights."""
    source = open_model(str(family("llama", dtype=torch.float32)))
    strengths = {}
    for text in ("int8:channel", "int8:channel/int4:token"):
        p, behind = Smooth(pairs="norms"), (Quantize(format=parse(text), method="rtn"),)
        step = step_of(p, source, tmp_path / text.replace("/", "_").replace(":", "_"), behind)
        p.run(source.state, step.context())
        strengths[text] = [r["strength"] for r in step.records if r["strength"] is not None]
    plain, rounded = strengths.values()
    assert plain != rounded


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["output", "kl"])
def test_an_allocation_counts_what_rounded_inputs_add(family: Any, text: Path, tmp_path: Path, metric: str) -> None:
    """Of two formats with the same bytes it takes the one whose inputs are rounded less."""
    formats = ["int4:g64/int8:token", "int4:g64/int4:token", "int8:channel/int8:token"]
    passes = {"allocate": {"budget": "5 bits", "formats": formats, "metric": metric}}, {"quantize": {"method": "rtn"}}
    done = bake(tmp_path, family("llama", blocks=1), text, "native", *passes)
    chosen = {str(f) for f in done.state.formats.values()}
    assert chosen == {"int4:g64/int8:token", "int8:channel/int8:token"}


# --- what is refused -------------------------------------------------------------------------------------------------

FIRST = {"quantize": {"format": "int8:channel/int8:token"}}


@pytest.mark.parametrize(("passes", "says"), [
    ([{"quantize": {"format": "int8:channel", "pins": {"lm_head": "nvfp4/nvfp4"}}}], "'lm_head' lies outside .* to nvfp4"),
    ([{"quantize": {"format": "mxfp4/int9:token"}}], "activations are one of int8:token, .* not 'int9:token'; did you mean"),
    ([{"quantize": {"format": "nf4:g64/int8:token"}}], "activations are rounded for int formats without ':asym'"),
    ([{"quantize": {"format": "int4:g64:asym/int8:token"}}], "activations are rounded for int formats without ':asym'"),
    ([{"quantize": {"format": "fp8:channel/fp8:g128"}}], "groups of 128 do not divide 64 inputs"),
    ([{"quantize": {"method": "learned", "format": "nvfp4"}}], "which is not learned"),
    ([FIRST, {"lqlora": {"rank": 4}}], "low-rank"),
    ([FIRST, {"distill": {"loss": {"ce": 1.0}, "train": "norms"}}], "nothing is trained while inputs are rounded"),
    ([{"quantize": {"format": "nvfp4"}}, {"distill": {"loss": {"ce": 1.0}, "train": "scales"}}], "nvfp4, which is not trained"),
])  # fmt: skip
def test_what_does_not_go_with_them_is_said_in_a_line(
    family: Any, text: Path, tmp_path: Path, passes: list[dict[str, Any]], says: str
) -> None:
    refused(tmp_path, family("llama"), text, passes, says)


@pytest.mark.parametrize("form", ["int8:channel/int8:token", "nvfp4"])
@pytest.mark.parametrize("exporter", sorted(EXPORTERS))
def test_exporters_hold_them_or_say_so_beforehand(family: Any, exporter: str, form: str) -> None:
    why = refusal(exporter, family("llama"), form)
    held = {"compressed_tensors", "native"} | ({"onnx"} if "/" in form else set())
    assert (why is None) == (exporter in held)
    assert why is None or ("\n" not in why and "layers.0.attn.q" in why)


@pytest.mark.parametrize("form", ["int8:channel/int8:token", "nvfp4"])
def test_experts_are_refused(family: Any, text: Path, tmp_path: Path, form: str) -> None:
    why = refusal("compressed_tensors", family("mixtral"), form)
    assert why is not None
    assert "experts" in why


def test_a_measured_scale_needs_text(project: Any) -> None:
    project.edit("  calibration: {text: words.txt, sequences: 8, length: 32}\n", "")
    project.edit('format: "int4:g32"', 'format: "nvfp4/nvfp4"\n      method: rtn')
    line = project.plan().line
    assert "has a scale that is measured on activations; add data.calibration" in line


def test_every_rule_is_named_in_the_head_of_its_file() -> None:
    from compress.formats import activations, floats

    assert all(text.split(":")[0] in (activations.__doc__ or "") for text in RULES)
    assert all(text in (floats.__doc__ or "") for text in floats.KINDS)
    with pytest.raises(FormatError, match="small floating-point formats are"):
        Float("fp4")
