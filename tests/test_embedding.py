"""A token embedding quantized by a pin: rounded before the first block, held by native, onnx and gguf, refused where engines are.

One run makes all three artifacts (conftest.py), and what can be asked of them is asked of the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import pipeline
from compress.cli import main
from compress.errors import CompressError, FormatError
from compress.export import runtime
from compress.export.artifact.engines import greedy
from compress.export.gguf import exporter as gguf
from compress.export.native import engine as native_engine
from compress.export.native import exporter as native
from compress.export.native import reader as native_reader
from compress.export.onnx import reader
from compress.export.onnx.exporter import Onnx
from compress.export.onnx.session import Session
from compress.export.table import EXPORTERS
from compress.formats import Int, parse
from compress.manager import Cost
from compress.model.model import open_model
from compress.passes import solver
from compress.passes.quantize import Quantize
from compress.passes.walk import UNSEEN
from compress.run import Parts
from compress.state import State
from compress.state.plan import BitPlan
from tests import stock
from tests.conftest import FAMILIES, contents, covered, make_model, rare
from tests.cooking import bake, several
from tests.test_native import same_state
from tests.test_runtime import with_packed

FORM = "int4:g32"
READ: dict[str, Callable[[Path], State]] = {"native": native_reader.read, "onnx": reader.read, "gguf": gguf.read}


def steps(form: str, **options: Any) -> dict[str, Any]:
    """The quickest pass that quantizes the embedding beside the matrices of the blocks."""
    return {"quantize": {"method": "rtn", "clip": "minmax", "format": "int4:g64", "pins": {"embed": form}, **options}}


def ids(count: int, length: int) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(7))


@pytest.fixture(scope="module")
def baked_in(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pipeline.Outcome]:
    """baked_in(exporters) -> the outcome of GPTQ of a llama of one block, its embedding in 4 bits, made once. Only to read."""

    @cache
    def get(*exporters: str) -> pipeline.Outcome:
        folder, pins = tmp_path_factory.mktemp("embedded"), {"embed": FORM, "lm_head": "int8:g32"}
        return several(folder, family("llama", blocks=1), text, *exporters, format="int4:g64", pins=pins)

    return get


@pytest.fixture(scope="module")
def made(baked_in: Callable[..., pipeline.Outcome]) -> pipeline.Outcome:
    return baked_in("native", "gguf")


@pytest.fixture(scope="module")
def in_onnx(baked_in: Callable[..., pipeline.Outcome]) -> pipeline.Outcome:
    """Apart, as an export to ONNX takes seconds."""
    return baked_in("onnx")


def folder_of(outcome: pipeline.Outcome, name: str) -> Path:
    return outcome.artifacts[name][0]


def dequantized(made: pipeline.Outcome, source: Path) -> Any:
    """The original in transformers, in fp32, every changed matrix replaced by what ours dequantizes to."""
    model, state = stock.load(source, dtype=torch.float32), replace(made.state, dtype=torch.float32)
    stock.substitute(model, state.graph, {name: state.weight(state.graph[name]) for name in state.codes})
    return model


# --- the pass ---------------------------------------------------------------------------------------------------------


def records(outcome: pipeline.Outcome) -> list[dict[str, Any]]:
    (step,) = (outcome.out / "steps").iterdir()
    listed: list[dict[str, Any]] = json.loads((step / "record.json").read_text())["sites"]
    return listed


def test_it_is_rounded_first_and_told_of(made: pipeline.Outcome, family: Any) -> None:
    first = records(made)[0]
    state, before = made.state, open_model(str(family("llama", blocks=1))).state
    site = state.graph["embed"]
    assert (first["site"], first["format"], first["tokens"], first["notes"]) == ("embed", FORM, None, [UNSEEN])
    assert first["bytes"] == parse(FORM).nbytes(site.shape)
    W, Q = (s.weight(s.graph["embed"]).float() for s in (before, state))
    assert first["error"] == pytest.approx(float((W - Q).square().sum() / W.square().sum()), rel=0.02)
    report = (made.out / "report.md").read_text()
    assert re.search(rf"\| embed +\| {FORM} ", report)
    assert UNSEEN in report


@pytest.mark.slow
def test_every_block_is_calibrated_on_what_it_gives(family: Any, text: Path, tmp_path: Path) -> None:
    """The first matrix of the first block sees other inputs; the twin, which is what it aims at, does not."""
    done = [several(tmp_path / str(i), family("llama", blocks=1), text, format="int3:g32", drift=drift, pins=pins)
            for i, (drift, pins) in enumerate([(0, {}), (0, {"embed": "int2:g32"}), (0.5, {"embed": "int2:g32"})])]  # fmt: skip
    codes = [d.state.codes["layers.0.attn.q"].load().tensors["weight_packed"] for d in done]
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[1], codes[2])


@pytest.mark.slow
def test_eight_bits_cost_little(family: Any, text: Path, tmp_path: Path) -> None:
    kl = [several(tmp_path / str(i), family("llama", blocks=1), text, format="int4:g32", pins=pins).scores["compressed"]["kl"]
          for i, pins in enumerate([{}, {"embed": "int8:g32"}, {"embed": "int2:g32"}])]  # fmt: skip
    assert kl[1] < 1.1 * kl[0] < 0.8 * kl[2]


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("stop", covered(["embedding", "block-0000"], "embedding"))
def test_a_run_that_stops_goes_on(
    family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: str, made: pipeline.Outcome
) -> None:
    """The part that is finished is read, not made again, and the artifact has the same bytes."""
    commit = Parts.commit

    def stopping(self: Parts, part: str, *rest: Any, **more: Any) -> Any:
        found = commit(self, part, *rest, **more)
        if part == stop:
            raise KeyboardInterrupt
        return found

    path = tmp_path / "recipe.yaml"
    same = (made.out.parent / "recipe.yaml").read_text().replace(str(made.out), str(tmp_path / "out"))
    path.write_text(same.replace("- onnx: {}\n", "").replace("- gguf: {}\n", ""))
    monkeypatch.setattr(Parts, "commit", stopping)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(path)
    stop, parts = "", []
    monkeypatch.setattr(
        Parts, "commit", lambda self, part, *rest, **more: parts.append(part) or commit(self, part, *rest, **more)
    )
    done = pipeline.run(path)
    assert "embedding" not in parts
    assert weights(folder_of(done, "native")) == weights(folder_of(made, "native"))


@pytest.mark.slow
def test_without_text_and_behind_other_passes(family: Any, text: Path, tmp_path: Path) -> None:
    done = bake(tmp_path / "rtn", family("gpt_neox"), None, "native", steps("lut4:g32"))
    assert str(done.state.format(done.state.graph["embed"])) == "lut4:g32"
    same_state(done.state, native_reader.read(folder_of(done, "native")))
    chosen = {"budget": "60 %", "formats": ["int4:g32", "int8:g32"], "trials": 0, "probe": 32, "pins": {"embed": FORM}}
    done = bake(tmp_path / "allocate", family("llama", blocks=1), text, "native", {"allocate": chosen}, {"quantize": {}})
    assert str(done.state.format(done.state.graph["embed"])) == FORM
    same_state(done.state, native_reader.read(folder_of(done, "native")))
    size = sum(p.stat().st_size for p in folder_of(done, "native").glob("*.safetensors"))
    assert size <= 0.6 * (family("llama", blocks=1) / "model.safetensors").stat().st_size
    ranked = {"format": "int3:g32", "rank": 2, "rounds": 0, "pins": {"embed": FORM}}
    done = bake(tmp_path / "lqlora", family("llama", blocks=1), text, "native", {"lqlora": ranked})
    assert str(done.state.format(done.state.graph["embed"])) == FORM


def test_cost(family: Any) -> None:
    state = open_model(str(family("llama"))).state

    def cost(**pins: str) -> Cost:
        quantize = Quantize(format=parse("int4:g32"), pins={name.replace("_", "*"): form for name, form in pins.items()})
        return quantize.cost(quantize.foresee(state), 1000)

    assert cost(embed=FORM).weights == cost().weights + state.graph["embed"].numel
    assert (cost(embed=FORM).exact_flops, cost(embed=FORM).model_flops) == (cost().exact_flops, cost().model_flops)
    assert cost(layers_="bf16", embed=FORM).peak_bytes > 0


# --- artifacts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(READ, "native"))
def test_artifacts_hold_it(baked_in: Callable[..., pipeline.Outcome], text: Path, capsys: Any, name: str) -> None:
    made = baked_in("onnx") if name == "onnx" else baked_in("native", "gguf")
    folder, proof = made.artifacts[name]
    again = READ[name](folder)
    same_state(made.state, again)
    assert str(again.format(again.graph["embed"])) == FORM
    layout = pipeline.plan(made.out.parent / "recipe.yaml").layouts[name]
    assert {f.name: f.nbytes for f in layout.files} == {f.name: (folder / f.name).stat().st_size for f in layout.files}
    engine = {"native": "compress runtime", "onnx": "onnxruntime", "gguf": "transformers, dequantized from GGUF"}[name]
    assert proof.engine.startswith(engine)
    assert proof.greedy == 16 or name == "onnx"
    assert proof.difference == 0 or name == "onnx"
    assert main(["inspect", str(folder), "--json"]) == 0
    (shown,) = (s for s in json.loads(capsys.readouterr().out)["sites"] if s["site"] == "embed")
    assert (shown["format"], shown["bytes"]) == (FORM, parse(FORM).nbytes(made.state.graph["embed"].shape))
    assert main(["eval", str(folder), "--text", str(text), "--length", "32", "--sequences", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["engine"].startswith(engine)
    assert 0 < scores["kl"] < 5


def test_the_runtime_keeps_it_packed(made: pipeline.Outcome, family: Any) -> None:
    model, peer = runtime.load(folder_of(made, "native"), dtype=torch.float32), dequantized(made, family("llama", blocks=1))
    assert type(model.model.embed_tokens).__name__ == "PackedEmbedding"
    assert torch.equal(stock.logits(model, [ids(2, 24)])[0], stock.logits(peer, [ids(2, 24)])[0])
    said, wanted = (m.generate(ids(1, 8), max_new_tokens=12, do_sample=False) for m in (model, peer))
    assert torch.equal(said, wanted)
    packed = native_engine.engine(folder_of(made, "native"), made.state, "cpu")
    held = sum(t.nbytes for m in packed.model.modules() if not isinstance(m, torch.nn.Embedding)  # type: ignore[attr-defined]
               for t in (*m.parameters(recurse=False), *m.buffers(recurse=False)))  # fmt: skip
    assert packed.weight_bytes() == held


@pytest.mark.slow
def test_onnxruntime_looks_rows_up(in_onnx: pipeline.Outcome, family: Any) -> None:
    folder, peer = folder_of(in_onnx, "onnx"), dequantized(in_onnx, family("llama", blocks=1))
    graph = reader.parsed(folder / "model.onnx").graph
    (node,) = (n for n in graph.node if n.op_type.startswith("Gather") and "input_ids" in n.input)
    said = {a.name: a.i for a in node.attribute}
    assert (node.op_type, said["bits"], said["block_size"]) == ("GatherBlockQuantized", 4, 32)
    session = Session(folder, in_onnx.state, level=1)
    wanted = stock.logits(peer, [ids(2, 24)])[0]
    assert float((session.prefill(ids(2, 24))[0] - wanted).abs().max()) <= 1e-4 * float(wanted.abs().max())
    generated = peer.generate(ids(1, 8), max_new_tokens=12, do_sample=False, eos_token_id=None)[:, 8:]
    assert torch.equal(greedy(session, ids(1, 8), 12), generated)
    exact = float(in_onnx.artifacts["onnx"][1].remark.split("the difference is ")[1].split()[0])
    assert exact < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", covered(["int8:g32", "int3:channel", "int4:g64:asym"], "int3:channel"))
def test_llamacpp_has_it_in_its_blocks(family: Any, text: Path, tmp_path: Path, form: str) -> None:
    oracle = pytest.importorskip("gguf")
    done = bake(tmp_path, family("llama", blocks=1), text, "gguf", steps(form))
    kinds = {t.name: t for t in oracle.GGUFReader(folder_of(done, "gguf") / gguf.FILE).tensors}
    held = kinds["token_embd.weight"]
    assert held.tensor_type.name == {"int8:g32": "Q8_0", "int3:channel": "Q4_0", "int4:g64:asym": "Q5_0"}[form]
    wanted = done.state.codes["embed"].load().dequantize(torch.float32)
    assert torch.equal(torch.from_numpy(oracle.dequantize(held.data, held.tensor_type)), wanted)
    assert done.artifacts["gguf"][1].difference == 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "form"), [("llama", "int2:channel:asym"), ("llama", "nf3:g32:dq8x16"), ("llama", "lut3:g48"),
                                            ("llama", "fp16"), ("gpt_neox", "int8:g32"), ("phi3", "int4:g16")])  # fmt: skip
def test_other_formats_and_families_in_onnx(family: Any, text: Path, tmp_path: Path, name: str, form: str) -> None:
    done = bake(tmp_path, family(name), text, "onnx", steps(form))
    if form != "fp16":
        same_state(done.state, reader.read(folder_of(done, "onnx")))
    assert "onnxruntime" in done.artifacts["onnx"][1].engine
    least = "1.27" if form.startswith("int2") else "1.24"
    assert f"onnxruntime >= {least}" in (folder_of(done, "onnx") / "README.md").read_text()


@pytest.mark.slow
def test_a_scaled_embedding_is_looked_up_too(text: Path, tmp_path: Path) -> None:
    """By a root that no 16-bit number is."""
    config = FAMILIES["gemma3"]()
    config.tie_word_embeddings, config.hidden_size = False, 96
    done = bake(tmp_path / "run", make_model(tmp_path / "model", config), text, "native", steps("int8:g32", format="int4:g32"))
    proof = done.artifacts["native"][1]
    assert (proof.engine, proof.difference, proof.greedy) == ("compress runtime", 0, 16)
    same_state(done.state, native_reader.read(folder_of(done, "native")))


# --- a matrix that embedding and head share ---------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("qwen2", "native"), rare("gemma3", "native"), rare("gpt2", "native"),
                                            rare("qwen2", "onnx"), rare("qwen2", "gguf"),
                                            rare("gemma3", "onnx")])  # fmt: skip
def test_a_tied_table_is_held_once_and_serves_both(family: Any, text: Path, tmp_path: Path, name: str, kind: str) -> None:
    options = {"pins": {"lm_head": "int4:g32"}, "format": "int4:g32"}
    source = family(name, blocks=1)
    done = bake(tmp_path, source, text, kind, {"quantize": options})
    folder, proof = done.artifacts[kind]
    assert proof.engine.startswith({"native": "compress runtime", "onnx": "onnxruntime", "gguf": "transformers"}[kind])
    assert {n: str(f) for n, f in done.state.formats.items() if n in ("embed", "lm_head")} == {"embed": "int4:g32"}
    again = READ[kind](folder)
    same_state(done.state, again)
    first = records(done)[0]
    assert first["site"] == "embed"
    assert first["tokens"] == 6 * 32
    assert any(note.startswith("rows looked up are off by ") for note in first["notes"])
    assert first["error"] < first["rounding"]  # it was solved for what the head is given
    layout = pipeline.plan(done.out.parent / "recipe.yaml").layouts[kind]
    assert {f.name: f.nbytes for f in layout.files} == {f.name: (folder / f.name).stat().st_size for f in layout.files}
    site, whole = done.state.graph["embed"], sum(f.nbytes for f in layout.files)
    assert whole < (source / "model.safetensors").stat().st_size - 0.6 * site.numel * 2 or kind == "onnx"
    if kind == "native":
        peer = runtime.load(folder)
        head, table = peer.get_output_embeddings(), peer.get_input_embeddings()
        assert [p.data_ptr() for p in head.parts] == [p.data_ptr() for p in table.parts]


@pytest.mark.slow
@pytest.mark.parametrize("data", covered([True, False], False))
def test_a_bias_that_the_head_shares_too(text: Path, tmp_path: Path, data: bool) -> None:
    """RoBERTa's, which a checkpoint holds under one of its names."""
    source = make_model(tmp_path / "model", FAMILIES["roberta"](), torch.float32)
    done = bake(tmp_path / "run", source, text if data else None, "native",
                {"quantize": {"method": "rtn", "format": FORM, "pins": {"embed": FORM}}})  # fmt: skip
    model = runtime.load(folder_of(done, "native"))
    assert model.get_output_embeddings().bias is model.lm_head.bias
    wanted = stock.logits(dequantized(done, source), [ids(2, 24)])[0]
    torch.testing.assert_close(stock.logits(model, [ids(2, 24)])[0], wanted, atol=1e-4, rtol=1e-4)
    if data:
        bake(tmp_path / "untied", source, text, "native", {"edit": {"untie": True}},
             {"quantize": {"method": "rtn", "format": FORM, "pins": {"lm_head": FORM}}})  # fmt: skip


@pytest.mark.slow
def test_a_table_in_pieces_is_the_same(family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are independent, zero points too, though their codes share words."""
    made = []
    for i, weights in enumerate((1 << 24, 32 * 64)):
        monkeypatch.setattr(solver, "TABLE", weights)
        options = {"format": "int4:g32", "pins": {"embed": "int3:g32:asym", "layers.*": "bf16"}}
        made.append(bake(tmp_path / str(i), family("qwen2", torch.float32, 1), text, "native", {"quantize": options}).state)
    one, two = (s.codes["embed"].load().dequantize(torch.float32) for s in made)
    torch.testing.assert_close(one, two)


def test_either_name_is_the_table_and_two_formats_are_none(family: Any) -> None:
    graph = open_model(str(family("qwen2"))).graph
    plans = [BitPlan.of(graph, parse("int4:g32"), pins, torch.bfloat16).formats for pins in (
        {"embed": "int8:g32"}, {"lm_head": "int8:g32"}, {"embed": "int8:g32", "lm_head": "int8:g32"})]  # fmt: skip
    assert plans[0] == plans[1] == plans[2]
    assert "lm_head" not in plans[0]
    with pytest.raises(FormatError, match="'embed' and 'lm_head' are one matrix, and the pins give it int8:g32 and bf16"):
        BitPlan.of(graph, parse("int4:g32"), {"embed": "int8:g32", "lm_head": "bf16"}, torch.bfloat16)
    assert "embed" not in planned(family("qwen2"), "bf16").formats


# --- refusals and what is said beforehand -----------------------------------------------------------------------------


def planned(source: Path, form: str) -> State:
    state = open_model(str(source)).state
    return state.promising(BitPlan.of(state.graph, parse("int4:g32"), {"embed": form}, state.dtype).formats)


def test_ranks_are_refused(family: Any) -> None:
    with pytest.raises(FormatError, match="no inputs that a low-rank correction could be fitted to: pin it to int4:g32"):
        planned(family("llama"), "int4:g32+r4")
    with pytest.raises(FormatError, match="groups of 48 do not divide 64"):
        planned(family("llama"), "int4:g48")


@pytest.mark.parametrize("name", ["compressed_tensors", "gptq"])
def test_engines_that_look_up_dense_rows_only(family: Any, name: str) -> None:
    says = rf"{name}: 'embed' has int8:g32, and engines .*dense tables only; leave it out of 'pins', or export native, onnx or g"
    with pytest.raises(CompressError, match=says):
        EXPORTERS[name]().check(planned(family("llama"), "int8:g32"))
    EXPORTERS[name]().check(planned(family("llama"), "fp16"))
    with pytest.raises(
        CompressError, match=r"edit: \{untie: true\}' in front and pin 'lm_head' alone: the dense table then takes 34"
    ):
        EXPORTERS[name]().check(planned(family("qwen2"), "int8:g32"))


def test_blocks_that_gguf_lacks(family: Any) -> None:
    with pytest.raises(CompressError, match="'embed' has int4:g16, and GGUF has blocks of 32 inputs"):
        EXPORTERS["gguf"]().check(planned(family("llama"), "int4:g16"))
    with pytest.raises(CompressError, match="gguf holds integers; 'embed' has nf4:g64"):
        EXPORTERS["gguf"]().check(planned(family("llama"), "nf4:g64"))


@pytest.mark.parametrize(("form", "says"), [
    ("int3:g32", "int3:g32 becomes GatherBlockQuantized of 4 bits (there is no kernel for 3), block 32 (0.562 bytes a weight)"),
    ("int2:g32", "int2:g32 becomes GatherBlockQuantized of 2 bits, block 32 (0.312 bytes a weight): it stays packed in memory, "
     "and only the rows that are asked for are decoded; 2 bits need onnxruntime >= 1.27"),
    ("lut4:g32", "lut4:g32 is stored as uint4 codes (0.564 bytes a weight), which onnxruntime turns into a dense table"),
    ("fp16", "fp16 stays as it is on disk and in memory (2.000 bytes a weight)"),
])  # fmt: skip
def test_remarks(family: Any, form: str, says: str) -> None:
    said = Onnx().remarks(planned(family("llama"), form))
    assert any(s.startswith(f"onnx: the embedding in {says}") for s in said), said
    assert any("MatMulNBits of 4 bits, block 32 (0.562" in s for s in said)
    (vllm,) = native.Native().remarks(planned(family("llama"), form))
    assert ("vLLM" in vllm) == (form == "fp16")


@pytest.mark.slow
def test_a_packed_matrix_that_two_modules_share_is_read_as_one(family: Any, text: Path, tmp_path: Path) -> None:
    """No run makes such an artifact; what reads it takes the head's matrix from the embedding."""
    folder = folder_of(bake(tmp_path, family("qwen2"), text, "native", {"quantize": {"method": "rtn", "format": FORM}}), "native")
    packed = with_packed(folder, "model.embed_tokens", "int8:g32", open_model(str(family("qwen2"))).state.dense.read(
        "model.embed_tokens.weight").float())  # fmt: skip
    state = native_reader.read(folder)
    assert isinstance(state.format(state.graph["embed"]), Int)
    assert torch.equal(state.weight(state.graph["lm_head"]), packed.to(state.dtype))
    text_of = ["--text", str(text), "--length", "32", "--sequences", "2", "--json", "--against", str(family("qwen2"))]
    assert main(["eval", str(folder), *text_of]) == 0
