"""An ONNX artifact is the run's model: onnxruntime computes with it what transformers does with the dequantized matrices.

One export takes seconds, so what can be asked of one artifact is asked of the same.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import AttributeProto, ModelProto, TensorProto, helper
from torch import Tensor

from compress import pipeline
from compress.cli import main
from compress.errors import ExportError, ModelError
from compress.export.artifact.config import declared
from compress.export.artifact.engines import EngineError, greedy
from compress.export.artifact.exporter import Job
from compress.export.artifact.files import MARK
from compress.export.onnx import datafile, graph, reader
from compress.export.onnx.datafile import DATA, GRAPH
from compress.export.onnx.exporter import Onnx
from compress.export.onnx.nodes import serialized
from compress.export.onnx.session import Session
from compress.formats import parse
from compress.model.model import Model, open_model
from compress.state import State
from tests import stock
from tests.conftest import FAMILIES, contents, make_model, rare
from tests.cooking import bake, steps

FAMILY = "mistral"
DECODERS = [f for f in FAMILIES if f not in ("mixtral", "qwen3_moe", "roberta")]
PINS = {"*.v": "nf4:g32:dq8x16", "*.o": "int3:g64:asym", "*.k": "fp16", "*.down": "lut3:g32:shared", "lm_head": "int8:channel"}
Q = "model.layers.0.self_attn.q_proj"


def artifact_of(outcome: pipeline.Outcome) -> Path:
    return outcome.artifacts["onnx"][0]


@pytest.fixture(scope="module")
def small(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., pipeline.Outcome]:
    """small(family, format) -> the outcome of one run on a model of one block, made once."""
    made: dict[tuple[str, str], pipeline.Outcome] = {}

    def get(name: str, form: str = "int4:g32") -> pipeline.Outcome:
        if (name, form) not in made:
            made[name, form] = bake(tmp_path_factory.mktemp(name), family(name, blocks=1), text, "onnx", steps(form))
        return made[name, form]

    return get


@pytest.fixture(scope="module")
def mixed(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """A mistral, which is a llama with a sliding window, of one block with a matrix of every kind."""
    source = family(FAMILY, blocks=1)
    return bake(tmp_path_factory.mktemp("mixed"), source, text, "onnx", steps("int4:g32+r4", pins=PINS))


@pytest.fixture
def copy(mixed: pipeline.Outcome, tmp_path: Path) -> Path:
    """An artifact to damage."""
    return Path(shutil.copytree(artifact_of(mixed), tmp_path / "artifact"))


def dequantized(source: Path, state: State) -> Any:
    """The original in transformers, in fp32, every changed matrix replaced by what ours dequantizes to."""
    model, state = stock.load(source, dtype=torch.float32), replace(state, dtype=torch.float32)
    stock.substitute(model, state.graph, {name: state.weight(state.graph[name]) for name in state.codes})
    return model


def ids(count: int, length: int) -> Tensor:
    return torch.randint(0, 256, (count, length), generator=torch.Generator().manual_seed(7))


def close(ours: Tensor, theirs: Tensor) -> None:
    assert float((ours - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


# --- it computes what transformers computes ---------------------------------------------------------------------------


def as_transformers(done: pipeline.Outcome, source: Path) -> None:
    """Whole windows, a prompt of one token that grows token by token, left padding, and a greedy text."""
    model, session = dequantized(source, done.state), Session(artifact_of(done), done.state, level=1)
    tokens = ids(2, 40)  # longer than a sliding window of 16
    wanted = stock.logits(model, [tokens])[0]
    close(session.prefill(tokens)[0], wanted)
    logits, cache = session.prefill(tokens[:, :1])
    found = [logits]
    for i in range(1, 40):
        logits, cache = session.step(tokens[:, i : i + 1], cache)
        found.append(logits)
    close(torch.cat(found, 1), wanted)
    padded(model, session, tokens)
    said = greedy(session, tokens[:1, :8], 12)
    generated = model.generate(tokens[:1, :8], max_new_tokens=12, do_sample=False, eos_token_id=None, use_cache=True)
    assert said.tolist() == generated[:, 8:].tolist()


def padded(model: Any, session: Session, tokens: Tensor) -> None:
    """Two prompts of different lengths, padded on the left, and one step more: each gives what it gives alone."""
    mask = torch.ones_like(tokens)
    mask[0, :13] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        takes = {"position_ids": positions} if "position_ids" in session._inputs else {}
        wanted = model(input_ids=tokens, attention_mask=mask, **takes).logits
        alone = model(input_ids=tokens[:1, 13:]).logits
    past = {i.name: np.zeros((2, i.shape[1], 0, i.shape[3]), np.float32) for i in session._past}
    first, *cache = run(session, tokens[:, :-1], mask[:, :-1], positions[:, :-1], past)
    last, *_ = run(session, tokens[:, -1:], mask, positions[:, -1:], dict(zip(past, cache, strict=True)))
    ours = torch.cat([torch.from_numpy(first), torch.from_numpy(last)], 1)
    seen = mask.bool()
    close(ours[seen], wanted[seen])
    close(ours[0, 13:], alone[0])


def run(session: Session, tokens: Tensor, mask: Tensor, positions: Tensor, past: dict[str, Any]) -> list[Any]:
    given = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    feeds = {n: t.numpy() for n, t in given.items() if n in session._inputs}
    found: list[Any] = session._session.run(None, feeds | past)
    return found


@pytest.mark.slow
def test_gpt2_computes_what_transformers_does(small: Any, family: Any) -> None:
    as_transformers(small("gpt2"), family("gpt2", blocks=1))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["int4:g32", "int3:g16:asym", "nf3:g32:dq8x16", "int2:g32+r4:int8:channel"])
@pytest.mark.parametrize("name", DECODERS)
def test_every_family_computes_what_transformers_does(baked: Any, family: Any, name: str, form: str) -> None:
    as_transformers(baked(name, "onnx", steps(form)), family(name))


def test_a_matrix_of_every_kind(mixed: pipeline.Outcome, family: Any) -> None:
    as_transformers(mixed, family(FAMILY, blocks=1))
    proof = mixed.artifacts["onnx"][1]
    assert re.fullmatch(r"onnxruntime \S+ on CPU", proof.engine)
    assert proof.greedy > 8
    assert "within 20% of the largest logit, as activations are rounded" in proof.remark
    assert float(proof.remark.split("the difference is ")[1].split()[0]) < 1e-3


@pytest.mark.slow
def test_an_encoder(small: Any, family: Any) -> None:
    done = small("roberta", "int8:g32")
    model, session = dequantized(family("roberta", blocks=1), done.state), Session(artifact_of(done), done.state, level=1)
    assert set(session._inputs) == {"input_ids", "attention_mask"}
    close(session.prefill(ids(2, 20))[0], stock.logits(model, [ids(2, 20)])[0])
    assert done.artifacts["onnx"][1].greedy == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{"kv_cache": False}, {"dtype": "fp16"}, {"accuracy_level": 1}])
def test_options(family: Any, text: Path, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    done = bake(tmp_path, family(name), text, "onnx", steps("int4:g32"), **options)
    made, proof = onnx.load(artifact_of(done) / GRAPH, load_external_data=False), done.artifacts["onnx"][1]
    cached = [i for i in made.graph.input if i.name.startswith("past_key_values.")]
    assert len(cached) == (0 if "kv_cache" in options else 4)
    assert proof.greedy > 8
    kind = TensorProto.FLOAT16 if "dtype" in options else TensorProto.FLOAT
    assert made.graph.output[0].type.tensor_type.elem_type == kind
    levels = {a.i for n in made.graph.node if n.op_type == "MatMulNBits" for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {options.get("accuracy_level", 4)}
    again = reader.read(artifact_of(done))
    assert torch.equal(again.weight(again.graph["layers.0.attn.o"]), done.state.weight(done.state.graph["layers.0.attn.o"]))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_other_source_precisions(family: Any, text: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    done = bake(tmp_path, family("llama", dtype), text, "onnx", steps("int4:g32+r4", pins=PINS))
    as_transformers(done, family("llama", dtype))
    same_state(done.state, reader.read(artifact_of(done)))


# --- what is in the folder --------------------------------------------------------------------------------------------


def parsed(folder: Path) -> ModelProto:
    return onnx.load(folder / GRAPH, load_external_data=False)


def test_inputs_outputs_and_their_axes(mixed: pipeline.Outcome) -> None:
    made = parsed(artifact_of(mixed)).graph

    def axes(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    sides = [f"0.{side}" for side in ("key", "value")]
    assert axes(made.input) == {
        "input_ids": ["batch", "sequence"], "attention_mask": ["batch", "total"], "position_ids": ["batch", "sequence"],
        **{f"past_key_values.{s}": ["batch", 2, "past", 16] for s in sides}}  # fmt: skip
    assert axes(made.output) == {
        "logits": ["batch", "sequence", 272], **{f"present.{s}": ["batch", 2, "total", 16] for s in sides}}  # fmt: skip


def test_the_graph_has_high_level_nodes_and_every_tensor_is_used(mixed: pipeline.Outcome) -> None:
    made = parsed(artifact_of(mixed))
    assert {o.domain: o.version for o in made.opset_import} == {"": 23, "com.microsoft": 1}
    kinds = [n.op_type for n in made.graph.node]
    assert {k: kinds.count(k) for k in ("RMSNormalization", "RotaryEmbedding", "Attention")} == {
        "RMSNormalization": 3, "RotaryEmbedding": 2, "Attention": 1}  # fmt: skip
    assert kinds.count("MatMulNBits") == 5  # of 8 matrices 3 are dense or tables
    used = {name for node in made.graph.node for name in node.input}
    assert {t.name for t in made.graph.initializer} <= used
    external = [t for t in made.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert {e.value for t in external for e in t.external_data if e.key == "location"} == {DATA}


def test_nothing_of_this_machine_is_in_the_graph(mixed: pipeline.Outcome) -> None:
    raw = (artifact_of(mixed) / GRAPH).read_bytes()
    assert not re.search(rb"/[a-z]{2,}|\.py|torch|site-packages", raw)


def test_the_size_is_known_beforehand(mixed: pipeline.Outcome, tmp_path: Path) -> None:
    layout = pipeline.plan(mixed.out.parent / "recipe.yaml").layouts["onnx"]
    assert {f.name: f.nbytes for f in layout.files} == {DATA: (artifact_of(mixed) / DATA).stat().st_size}
    assert layout.nbytes - 64 * 200 < layout.tensor_bytes <= layout.nbytes
    assert reader.read(artifact_of(mixed)).dense.base.nbytes == layout.tensor_bytes


@pytest.mark.slow
def test_the_graph_is_the_same_every_time_and_made_without_weights(
    small: Any, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any) -> Any:
        raise AssertionError("a weight was read")

    done = small("roberta", "int8:g32")
    for name in ("read", "read_rows", "read_finite"):
        monkeypatch.setattr(type(done.state.dense), name, read)
    made = graph.build(done.state, False, "fp32", 4)
    assert serialized(made) == (artifact_of(done) / GRAPH).read_bytes()


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(mixed: pipeline.Outcome, tmp_path: Path) -> None:
    recipe = (mixed.out.parent / "recipe.yaml").read_text().replace(str(mixed.out), str(tmp_path / "out"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    subprocess.run([sys.executable, "-m", "compress", "run", str(tmp_path / "recipe.yaml")], check=True, capture_output=True)
    assert contents(tmp_path / "out" / "onnx") == contents(artifact_of(mixed))


def test_the_folder_says_what_it_is(mixed: pipeline.Outcome, family: Any) -> None:
    artifact = artifact_of(mixed)
    config, was = (json.loads((f / "config.json").read_text()) for f in (artifact, family(FAMILY, blocks=1)))
    said = config.pop("quantization_config")
    assert config == was
    assert (said["quant_method"], said["format_version"]) == ("compress-onnx", 1)
    assert {m: parse(t) for m, t in said["formats"].items()} == {
        mixed.state.graph[n].stem: mixed.state.format(mixed.state.graph[n]) for n in mixed.state.codes}  # fmt: skip
    assert {p.name for p in artifact.iterdir()} == {
        GRAPH, DATA, "config.json", MARK, "README.md", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json"}  # fmt: skip


@pytest.mark.parametrize(("name", "form"), [(FAMILY, ""), rare("roberta", "int8:g32")])
def test_the_card_runs(mixed: Any, small: Any, name: str, form: str, capsys: Any) -> None:
    artifact = artifact_of(small(name, form) if form else mixed)
    code = re.search(r"```python\n(.*?)```", (artifact / "README.md").read_text(), re.DOTALL)
    assert code is not None
    exec(compile(code[1].replace("THIS_FOLDER", str(artifact)), "card", "exec"), {})
    assert len(capsys.readouterr().out) > 10


# --- it is read back --------------------------------------------------------------------------------------------------


def same_state(ours: State, theirs: State) -> None:
    """Two states agree in every format and every bit."""
    for site in ours.graph:
        twin = theirs.graph[site.name]
        assert theirs.format(twin) == ours.format(site), site.name
        assert torch.equal(theirs.weight(twin), ours.weight(site)), site.name
        if site.name in ours.codes:
            held = theirs.codes[site.name].load().tensors
            assert all(torch.equal(held[s], t) for s, t in ours.codes[site.name].load().tensors.items())
    for name in ours.graph.parameters:
        assert torch.equal(theirs.dense.read(name), ours.dense.read(name)), name


@pytest.mark.slow
def test_what_is_written_is_read_back(mixed: pipeline.Outcome, small: Any) -> None:
    for done in (mixed, small("gpt2"), small("roberta", "int8:g32")):
        same_state(done.state, reader.read(artifact_of(done)))


def test_eval_and_inspect(mixed: pipeline.Outcome, text: Path, capsys: Any) -> None:
    artifact = artifact_of(mixed)
    assert main(["inspect", str(artifact), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert {s["site"]: s["format"] for s in shown["sites"] if s["format"] != "as it is"} == {
        n: str(mixed.state.format(mixed.state.graph[n])) for n in mixed.state.codes}  # fmt: skip
    assert main(["eval", str(artifact), "--text", str(text), "--length", "32", "--sequences", "2", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert "onnxruntime" in scores["engine"]
    assert scores["tensor_bytes"] == shown["tensor_bytes"]


@pytest.mark.slow
def test_bytes_that_one_pass_reads(small: Any) -> None:
    state = reader.read(artifact_of(small("gpt2")))
    session = Session(artifact_of(small("gpt2")), state)
    weights = sum(s.numel for s in state.graph.linear)
    rest = sum(int(np.prod(s)) for s in state.graph.parameters.values())
    head = state.graph["embed"].numel
    assert session.weight_bytes() == weights // 2 + weights // 32 * 4 + 4 * (rest + head)


# --- hostile and damaged folders --------------------------------------------------------------------------------------


def refused(folder: Path, says: str) -> None:
    with pytest.raises(ModelError, match=says) as caught:
        reader.read(folder)
    assert "\n" not in str(caught.value)
    assert main(["inspect", str(folder)]) == 2


def rewrite(folder: Path, change: Callable[[ModelProto], Any]) -> None:
    made = parsed(folder)
    change(made)
    (folder / GRAPH).write_bytes(made.SerializeToString())
    (folder / MARK).unlink()  # as an attacker would


def first(made: ModelProto) -> TensorProto:
    """The first tensor of the data file."""
    return next(t for t in made.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def entry(made: ModelProto, key: str, value: str) -> None:
    """Change where one tensor is said to lie."""
    next(e for e in first(made).external_data if e.key == key).value = value


def hidden(made: ModelProto, location: str) -> None:
    """A tensor outside of the graph, in the attribute of a node."""
    tensor = TensorProto(name="secret", data_type=TensorProto.FLOAT, dims=[4], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", "0"), ("length", "16")):
        tensor.external_data.add(key=key, value=value)
    made.graph.node.append(helper.make_node("Constant", [], ["secret"], value=tensor))


def deep(made: ModelProto) -> None:
    """The same in a subgraph in a function."""
    inner = ModelProto()
    hidden(inner, "/etc/passwd")
    branch = helper.make_node("If", ["x"], ["y"], domain="d")
    branch.attribute.append(AttributeProto(name="then_branch", type=AttributeProto.GRAPH, g=inner.graph))
    made.functions.append(helper.make_function("d", "f", ["x"], ["y"], [branch], [helper.make_opsetid("", 23)]))


@pytest.mark.parametrize(("change", "says"), [
    (lambda m: entry(m, "location", "/etc/passwd"), r"lies in '/etc/passwd', not in model\.onnx\.data; nothing else is read"),
    (lambda m: entry(m, "location", "../model.onnx.data"), r"lies in '\.\./model\.onnx\.data'"),
    (lambda m: entry(m, "location", ""), "lies in '', not in"),
    (lambda m: entry(m, "location", "a\nb"), "lies in 'a b'"),
    (lambda m: first(m).external_data.add(key="location", value="/etc/passwd"), "lies in '.*/etc/passwd"),
    (lambda m: first(m).external_data.add(key="checksum", value="0"), "nothing else is read"),
    (lambda m: hidden(m, "/etc/passwd"), "'secret' lies in '/etc/passwd'"),
    (lambda m: hidden(m, DATA), "from within a node"),
    (deep, "'secret' lies in '/etc/passwd'"),
    (lambda m: entry(m, "offset", "-4"), "is not where it must be"),
    (lambda m: entry(m, "offset", "64"), "is not where it must be"),
    (lambda m: entry(m, "length", "999999999"), "is not where it must be"),
    (lambda m: entry(m, "offset", "1e3"), "is not where it must be"),
    (lambda m: first(m).dims.append(0), "has a type or shape that we do not write"),
    (lambda m: first(m).dims.append(1 << 40), "is not where it must be"),
    (lambda m: setattr(first(m), "data_type", TensorProto.STRING), "has a type or shape that we do not write"),
    (lambda m: setattr(first(m), "name", "other"), "holds 'other', which config.json does not account for|asks for|missing"),
], ids=range(17))  # fmt: skip
def test_a_graph_that_reaches_elsewhere(copy: Path, change: Any, says: str) -> None:
    rewrite(copy, change)
    refused(copy, says)


def test_an_engine_never_opens_another_file(copy: Path, mixed: pipeline.Outcome) -> None:
    rewrite(copy, lambda m: entry(m, "location", "/etc/passwd"))
    with pytest.raises(ModelError, match="nothing else is read"):
        reader.engine(copy, mixed.state, "cpu")


@pytest.mark.parametrize("change", [
    lambda m: setattr(m.graph.input[-1].type.tensor_type, "elem_type", TensorProto.DOUBLE),
    lambda m: setattr(m.graph.input[-1].type.tensor_type.shape.dim[1], "dim_param", "heads"),
    lambda m: m.graph.output.pop(), lambda m: setattr(m.graph.node[9], "op_type", "Nonsense"),
    lambda m: m.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1])),
])  # fmt: skip
def test_a_graph_that_is_none_of_ours(copy: Path, mixed: pipeline.Outcome, change: Any) -> None:
    rewrite(copy, change)
    with pytest.raises(EngineError):
        reader.engine(copy, mixed.state, "cpu").prefill(ids(1, 4))


def test_a_device_without_a_provider(mixed: pipeline.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineError, match=r"onnxruntime \S+ is installed without a provider for cuda"):
        reader.engine(artifact_of(mixed), mixed.state, "cuda")


def damage_data(folder: Path, change: Callable[[bytearray], Any]) -> None:
    raw = bytearray((folder / DATA).read_bytes())
    change(raw)
    (folder / DATA).write_bytes(raw)


def test_damaged_files(copy: Path) -> None:
    whole = (copy / DATA).read_bytes()
    damage_data(copy, lambda raw: raw.__setitem__(len(raw) - 1, raw[-1] ^ 1))
    refused(copy, r"is not the file that was written \(see compress\.json\)")
    damage_data(copy, lambda raw: raw.pop())
    refused(copy, r"holds [\d,]+ bytes, the graph says [\d,]+; it is truncated")
    (copy / DATA).write_bytes(whole)
    graph_bytes = (copy / GRAPH).read_bytes()
    (copy / GRAPH).write_bytes(b"\xff" + graph_bytes)
    refused(copy, "is no ONNX graph")
    (copy / GRAPH).unlink()
    refused(copy, r"model\.onnx: no such file; the artifact is not whole")


def told(folder: Path, **changes: Any) -> None:
    """Change keys of the quantization_config; None removes one."""
    config = json.loads((folder / "config.json").read_text())
    kept = {k: v for k, v in {**config["quantization_config"], **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": kept}))
    (folder / MARK).unlink(missing_ok=True)


@pytest.mark.parametrize("shape", [None, [64], [64, -1], [64, 64, 1], "64x64", [64, True], [64, 1 << 40]])
def test_broken_shapes(copy: Path, shape: Any) -> None:
    known = declared(copy)["shapes"]
    told(copy, shapes=None if shape is None else known | {Q: shape})
    refused(copy, "'shapes' is to give the sides of every module in 'formats'")


@pytest.mark.parametrize(("form", "says"), [
    ("int4:g64+r4", "weight_codes' is UINT8 .* needs UINT8"), ("int5:g32+r4", r"needs UINT8 \[64, 2, 32\]"),
    ("int4:g32:asym+r4", "weight_zero_codes' is missing"), ("int4:g32", "lora_A.weight'.* does not account for"),
    ("int4:g24+r4", "24"), ("nf4:g32+r4", "weight_codes' is UINT8 .* needs UINT4"), ("bf16", "does not account for|missing"),
])  # fmt: skip
def test_a_format_that_is_not_that_of_the_tensors(copy: Path, form: str, says: str) -> None:
    told(copy, formats=declared(copy)["formats"] | {Q: form})
    refused(copy, says)


def test_sides_that_are_not_those_of_the_model(copy: Path) -> None:
    told(copy, shapes=declared(copy)["shapes"] | {Q: [32, 64]})
    refused(copy, "config and weights do not belong together")


def test_another_version(copy: Path) -> None:
    told(copy, format_version=2)
    refused(copy, "format_version is 2, and 1 is the newest that is read here; upgrade")


# --- it proves itself -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [f"{Q}.weight_codes", f"{Q}.lora_B.weight", "model.layers.0.self_attn.v_proj.weight_scale_top",
                                  "model.norm.weight", "model.layers.0.self_attn.k_proj.weight"])  # fmt: skip
def test_a_flipped_bit_is_caught(mixed: pipeline.Outcome, family: Any, copy: Path, name: str) -> None:
    slots = {slot.name: start for slot, start in datafile.places(datafile.layout(mixed.state).file.slots)}
    (copy / MARK).unlink()
    damage_data(copy, lambda raw: raw.__setitem__(slots[name], raw[slots[name]] ^ 1))
    job = Job(open_model(str(family(FAMILY, blocks=1))), mixed.state, None, "key", lambda facts: "")
    with pytest.raises(ExportError, match="on disk differs from the"):
        Onnx().prove(job, copy)


def test_a_node_that_computes_otherwise_is_caught(mixed: pipeline.Outcome, family: Any, copy: Path) -> None:
    """The tensors are right; two nodes read each other's."""

    def swap(made: ModelProto) -> None:
        nodes = {n.input[1]: n for n in made.graph.node if n.op_type == "MatMulNBits"}
        a, b = (nodes[f"model.layers.0.mlp.{name}_proj.weight_codes"] for name in ("gate", "up"))
        a.input[1], b.input[1] = b.input[1], a.input[1]

    rewrite(copy, swap)
    job = Job(open_model(str(family(FAMILY, blocks=1))), mixed.state, ids(1, 32), "key", lambda facts: "")
    with pytest.raises(ExportError, match="loads the artifact, but its logits differ"):
        Onnx().prove(job, copy)


# --- what is said beforehand ------------------------------------------------------------------------------------------


def planned(source: Model, form: str, **pins: str) -> State:
    formats = {s.name: parse(pins.get(s.role, form)) for s in source.graph.linear}
    return source.state.promising(formats)


def test_remarks(family: Any) -> None:
    source = open_model(str(family("llama")))
    said = "\n".join(Onnx().remarks(planned(source, "int3:g32", q="int2:g16", v="nf3:g32", o="int4:g32+r4", up="fp16")))
    for words in ("int3:g32 becomes MatMulNBits of 4 bits (there is no kernel for 3), block 32 (0.562 bytes a weight)",
                  "2 bits in blocks of 16 have no fast kernel on CPU",
                  "nf3:g32 is stored as uint4 codes (0.562 bytes a weight)", "bytes a weight in memory, and no faster than fp32",
                  "two products in full precision for the low-rank factors", "fp16 stays as it is on disk (2.000 bytes a weight)",
                  "CUDA provider has kernels for 4 and 8 bits", "the graph adds about 18 kB"):  # fmt: skip
        assert words in said, said
    level = "\n".join(Onnx(accuracy_level=1, dtype="fp16").remarks(planned(source, "int8:channel")))
    assert "8 bits at accuracy_level 1 have no fast kernel on CPU, and are 10 times slower than fp32: use 4" in level
    assert "outside of its range, 6e-8 to 65504" in level
    assert "CUDA" not in level


def test_what_cannot_be_held(family: Any, tmp_path: Path) -> None:
    Onnx().check(planned(open_model(str(family("llama"))), "int4:g32"))
    llama = FAMILIES["llama"]()
    llama.hidden_size, llama.head_dim = 96, 16
    wide = open_model(str(make_model(tmp_path / "m", llama)))
    with pytest.raises(ExportError, match=r"onnx cannot hold 'layers\.0\.attn\.q': int4:g24: blocks .*; use g32, g64 or g128"):
        Onnx().check(planned(wide, "int4:channel", q="int4:g24"))
    with pytest.raises(
        ExportError, match=r"onnx: 'mixtral' is left out: its experts are chosen by data, .*; export compressed_te"
    ):
        Onnx().check(open_model(str(family("mixtral"))).state)
