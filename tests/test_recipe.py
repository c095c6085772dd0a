"""A recipe is right, or one line says where it is wrong and what would be right."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.errors import CompressError, OrderError, RecipeError
from compress.export.table import EXPORTERS
from compress.manager import Pass, check_order
from compress.passes import PASSES
from compress.recipe import load
from compress.state import Fact
from tests.conftest import RECIPE, ROOT, Project

LAYERS = 2  # of a project

FORMATS = (
    "int<2..8>:g<16..256>[:asym], int<2..8>:channel[:asym], nf<2,3,4,8>:g<16..256>[:dq<2,3,4,8>x<16..4096>[:fp16|:fp32]], "
    "lut<2..4>:g<16..256>[:shared], ecq<1.00..6.00>, tcq<1..5>[:l10|:l8], <any of these six>:r[i]<16,32,64,128,256>, "
    "<int, nf or lut>+r<rank>[:<format of factors>], lr<rank>[:<format of factors>], "
    "q2_k, q3_k, q4_k, q5_k, q6_k, iq4_xs, iq4_nl, q4_1, q5_1, iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s, "
    "fp8:channel, nvfp4, mxfp4, mxfp8, "
    "<int without :asym, or any of these four>/<int8:token|int4:token|fp8:token|fp8:g128|nvfp4|mxfp4|mxfp8>, bf16, fp16, fp32"
)
TOP = "model, out, seed, leave, data, passes, export"
WINDOWS = "text, jsonl, dataset, field, split, weight, sequences, length, bos, sources, select, pool, generate"
QUANTIZE = ", ".join(PASSES["quantize"].model_fields)
NO_FIT = "groups of 48 do not divide 64 inputs; groups that do: g16, g32, g64, or channel  (or pin this site to another format)"

# A part of RECIPE, what stands there instead, and the line it earns, after the file's name.
EDITS = [
    ("out:", "otu:", f":2:1  a recipe has no option 'otu'; did you mean 'out'?   options: {TOP}"),
    ("model: ./model\n", "", ":1:1  a recipe needs 'model': a local folder, a GGUF file, or a hub id, optionally id@revision"),
    ("model: ./model", "model: [a]", ":1:1  'model' needs text, not a list"),
    ("model: ./model", "model: a\nmodel: b", ":2:1  'model' is given twice; keep one"),
    ("seed: 0", "seed: none", ":3:1  'seed' needs a whole number, not 'none'"),
    ("seed: 0", "seed: 1.5", ":3:1  'seed' needs a whole number, not '1.5'"),
    ("seed: 0", "seed: -1", ":3:1  'seed' must be greater than or equal to 0, not '-1'"),
    ("seed: 0", "seed: 2001-99-99", ":3:7  '2001-99-99': month must be in 1..12; put it in quotes"),
    ("seed: 0", "seed: !!python/object:os.system x", ":3:7  could not determine a constructor for the tag "
     "'tag:yaml.org,2002:python/object:os.system'"),
    ("seed: 0", "3: x", ":3:1  a key is text, not '3'; put it in quotes"),
    ("seed: 0", "? [a, b]\n: c", ":3:3  a key is a word; lists, mappings and '<<' are none"),
    ("seed: 0", "<<: {seed: 0}", ":3:1  a key is a word; lists, mappings and '<<' are none"),
    ("seed: 0", "\tseed: 0", ":3:1  found character '\\t' that cannot start any token; indent with spaces, YAML allows no tabs"),
    ("seed: 0", "seed: a: b", ":3:8  mapping values are not allowed here; put a text that holds ': ' in quotes"),
    ("seed: 0", "---", ":3:1  but found another document, expected a single document in the stream from line 1 on; "
     "a recipe is one document"),
    ("data:\n", "data:\n  test: {}\n", ":5:3  'data' has no option 'test'   options: calibration, training, evaluation"),
    ("sequences: 8", "sequenses: 8", f":5:34  'calibration' has no option 'sequenses'; did you mean 'sequences'?   "
     f"options: {WINDOWS}"),
    ("sequences: 8", "sequences: many", ":5:34  'sequences' needs a whole number, not 'many'"),
    ("sequences: 8", "sequences: 0", ":5:34  'sequences' must be greater than 0, not '0'"),
    ("sequences: 4, length: 32", "sequences: 4, length: 1", ":6:47  'length' must be greater than 1, not '1'"),
    ("calibration: {text: words.txt, ", "calibration: {", ":5:3  'calibration': give one source (text, jsonl or dataset) "
     "or a list of sources, not both"),
    ("calibration: {text: words.txt, ", "calibration: {text: a, jsonl: b, ", ":5:3  'calibration': give only one of text, "
     "jsonl, dataset"),
    ("calibration: {text: words.txt, ", "calibration: {sources: [{text: a}, {txt: b}], ", ":5:39  item 2 of 'sources' has no "
     "option 'txt'; did you mean 'text'?   options: text, jsonl, dataset, field, split, weight"),
    ("calibration: {text: words.txt, ", "calibration: {sources: {text: a}, ", ":5:17  'sources' needs a list, not a mapping"),
    ("calibration: {text: words.txt, sequences: 8, length: 32}", "calibration: words.txt", ":5:3  'calibration' needs a mapping, "
     "not 'words.txt'"),
    ("  - quantize:\n", "  - quantise:\n", ":8:5  no pass 'quantise'; did you mean 'quantize'?   known: edit, depth, prune, "
     "rotate, smooth, allocate, factorize, quantize, lqlora, distill, sparsify, importance, kv_cache, kv_policy, "
     "context_merge"),
    ("  - quantize:\n", "    quantize:\n", ":7:1  'passes' needs a list, not a mapping"),
    ("  - quantize:\n", "  - quantize\n  - quantize:\n", ":8:5  item 1 of 'passes' is written 'NAME: {OPTION: VALUE}', here "
     "'quantize: {}'"),
    ("  - quantize:\n", "  - prune: {}\n    quantize:\n", ":8:5  each item names one pass; this one holds prune, quantize"),
    ("  - quantize:\n", "  - {}\n  - quantize:\n", ":8:5  each item names one pass; this one holds nothing"),
    ("  - quantize:\n", "  - quantize: fast\n  - quantize:\n", ":8:5  the options of 'quantize' are a mapping, not 'fast'"),
    ("format:", "fromat:", f":9:7  pass 'quantize' has no option 'fromat'; did you mean 'format'?   options: {QUANTIZE}"),
    ('format: "int4:g32"', "method: gtpq", ":9:7  'method' is 'gptq', 'rtn' or 'learned', not 'gtpq'; did you mean 'gptq'?"),
    ('format: "int4:g32"', "damp: 2", ":9:7  'damp' must be less than or equal to 1, not '2'"),
    ('format: "int4:g32"', "damp: .nan", ":9:7  'damp' must be less than or equal to 1, not 'nan'"),
    ('format: "int4:g32"', "damp: little", ":9:7  'damp' needs a number, not 'little'"),
    ('format: "int4:g32"', "format: int4:32", f":9:7  'format': unknown format 'int4:32'; did you mean 'int4:g32'?   "
     f"allowed: {FORMATS}"),
    ('format: "int4:g32"', "format: int9:g32", ":9:7  'format': an integer format has 2 to 8 bits, not 9"),
    ('format: "int4:g32"', "format: int4:g33", ":9:7  'format': a group has 16 to 256 inputs, a multiple of 8, not 33; "
     "or use 'channel'"),
    ('{"lm_head": "int8:g32"}', "[lm_head]", ":10:7  'pins' needs a mapping, not a list"),
    ('"lm_head": "int8:g32"', '"lm_head": 8', ":10:14  'lm_head' needs text, not '8'"),
    ('"lm_head": "int8:g32"', "0: bf16", ":10:14  a key is text, not '0'; put it in quotes"),
    ("compressed_tensors", "compressed-tensors", ":12:5  no exporter 'compressed-tensors'; did you mean "
     "'compressed_tensors'?   known: compressed_tensors, gptq, gguf, native, onnx"),
    ("tensors: {}", "tensors: {shard: 1}", ":12:26  exporter 'compressed_tensors' has no option 'shard'; did you mean "
     "'shard_bytes'?   options: shard_bytes, engine"),
    ("tensors: {}\n", "tensors: {}\n  - compressed_tensors: {}\n", ":13:5  exporter 'compressed_tensors' is given twice; "
     "keep one"),
]  # fmt: skip

# These need the model: format against shape, patterns against sites, exporter against formats, order of steps.
MODEL_EDITS = [
    ('"int4:g32"', '"int4:g48"', f":9:7  'layers.0.attn.q': int4:g48: {NO_FIT}"),
    ('{"lm_head": "int8:g32"}', '\n        lm_head: bf16\n        "layers.*.mlp.upp": bf16', ":12:9  pattern 'layers.*.mlp.upp' "
     "matched no site.  Nearest: 'layers.*.mlp.up' (2 sites)"),
    ('{"lm_head": "int8:g32"}', '\n        lm_head: bf16\n        "layers.*.mlp.*": int8:32', ":12:9  unknown format 'int8:32'; "
     f"did you mean 'int8:g32'?   allowed: {FORMATS}"),
    ('{"lm_head": "int8:g32"}', '\n        lm_head: bf16\n        "layers.1.*": int4:g48', f":12:9  'layers.1.attn.q': int4:g48: "
     f"{NO_FIT}"),
    ('"lm_head": "int8:g32"', '"embed": "int8:g32"', ":12:5  compressed_tensors: 'embed' has int8:g32, and engines of this "
     "layout look rows up in dense tables only; leave it out of 'pins', or export native, onnx or gguf"),
    ('"lm_head": "int8:g32"', '"*.attn.q": "int8:g32"', ":12:5  compressed_tensors: vLLM joins q,k,v into one matrix and needs "
     "one format for them, here layers.0.attn.q int8:g32, layers.0.attn.k int4:g32, layers.0.attn.v int4:g32; pin them together"),
    ("  calibration: {text: words.txt, sequences: 8, length: 32}\n", "", ":7:5  'gptq' needs data.calibration; add it, "
     "or use method: rtn"),
    ("model: ./model", "model: ./modell", ":1:1  model './modell': no folder {base}/modell, and no hub id either (owner/name or "
     "owner/name@revision)"),
]  # fmt: skip


def refused(path: Path, *sets: str) -> str:
    """The message of the RecipeError that loading earns; it is one line."""
    with pytest.raises(RecipeError) as caught:
        load(path, PASSES, EXPORTERS, sets)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.mark.parametrize(("old", "new", "expected"), EDITS)
def test_a_mistake_is_located_and_the_right_answer_named(recipe: Path, old: str, new: str, expected: str):
    assert RECIPE.count(old) == 1, old
    recipe.write_text(RECIPE.replace(old, new))
    assert refused(recipe) == f"{recipe}{expected}"


@pytest.mark.parametrize(("old", "new", "expected"), MODEL_EDITS)
def test_a_mistake_that_only_the_model_shows(project: Project, old: str, new: str, expected: str):
    project.edit(old, new)
    assert project.plan().line == f"{project.recipe}{expected.format(base=project.folder)}"
    assert not project.out.exists()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", ":1:1  a recipe needs 'model': a local folder, a GGUF file, or a hub id, optionally id@revision"),
        (b"# nothing yet\n", ":1:1  a recipe needs 'model': a local folder, a GGUF file, or a hub id, optionally id@revision"),
        (b"- a\n- b\n", f":1:1  a recipe is a mapping: {TOP}"),
        (b"compress it", f":1:1  a recipe is a mapping: {TOP}"),
        (b"model: \xff\xfe", ":1:8  is no UTF-8 text"),
        (b"model: a\x00b", ":1:9  is no YAML (the character U+0000 is not allowed)"),
        (b"model: [a\nout: b\n", ":2:4  expected ',' or ']', but got ':', while parsing a flow sequence from line 1 on"),
        (b"model: 'a\n\n", ":3:1  found unexpected end of stream, while scanning a quoted scalar from line 1 on"),
        (b"model: &a [*a]", ":1:12  is nested without end: an alias of what it stands in"),
        (b"[" * 5000, ":1:51  is nested deeper than 50 levels"),
        (b"model: *a", ":1:8  found undefined alias 'a'"),
    ],
)
def test_a_text_that_is_no_recipe(recipe: Path, data: bytes, expected: str):
    recipe.write_bytes(data)
    assert refused(recipe) == f"{recipe}{expected}"


def test_a_file_that_is_not_there(tmp_path: Path):
    assert refused(tmp_path / "no.yaml") == f"{tmp_path / 'no.yaml'}: No such file or directory"
    assert refused(tmp_path) == f"{tmp_path}: Is a directory"


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
@settings(max_examples=30, deadline=None)
def test_no_bytes_give_anything_but_a_recipe_error(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    path = tmp_path_factory.getbasetemp() / "noise.yaml"
    path.write_bytes(data)
    refused(path)


@given(at=st.integers(0, len(RECIPE) - 1), byte=st.sampled_from("\t\0:-[]{}#&*!|>'\"%@,\n 3x"), drop=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_a_spoilt_recipe_is_a_recipe_or_a_recipe_error(tmp_path_factory: Any, at: int, byte: str, drop: int):
    path = tmp_path_factory.getbasetemp() / "spoilt.yaml"
    path.write_text(RECIPE[:at] + byte + RECIPE[at + drop :])
    with suppress(RecipeError):
        load(path, PASSES, EXPORTERS)


# --- --set ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("quantize.format=int3:64", "quantize.format  'format': unknown format 'int3:64'; did you mean 'int3:g64'?   "
         f"allowed: {FORMATS}"),
        ("quantize.fromat=x", "quantize.fromat  pass 'quantize' has no option 'fromat'; did you mean 'format'?   "
         f"options: {QUANTIZE}"),
        ("quantise.format=x", "quantise.format=x  the recipe has no 'quantise'; did you mean 'quantize'?"),
        ("quantize=x", "quantize=x  name an option of 'quantize': quantize.OPTION=VALUE"),
        ("quantize.method=gtpq", "quantize.method  'method' is 'gptq', 'rtn' or 'learned', not 'gtpq'; did you mean 'gptq'?"),
        ("quantize.format=[", "quantize.format=[  the value is no YAML"),
        ("quantize.format=2001-99-99", "quantize.format=2001-99-99  the value is no YAML"),
        ("quantize.format.bits=3", "quantize.format.bits=3  'format' holds no options"),
        ("sede=3", "sede=3  the recipe has no 'sede'; did you mean 'seed'?"),
        ("seed=x", "seed  'seed' needs a whole number, not 'x'"),
        ("seed.x=3", "seed.x=3  'seed' holds no options"),
        ("seed", "seed  is not NAME.OPTION=VALUE"),
        ("export.gguf.x=3", "export.gguf.x=3  'export' holds no options; name one of its entries: NAME.OPTION=VALUE"),
        ("=3", "=3  is not NAME.OPTION=VALUE"),
        ("quantize.=3", "quantize.=3  is not NAME.OPTION=VALUE"),
        ("passes=3", "passes  'passes' needs a list, not '3'"),
        ("data=3", "data  'data' needs a mapping, not '3'"),
        ("data.calibration.sequences=many", "data.calibration.sequences  'sequences' needs a whole number, not 'many'"),
        ("data.sequences=3", "data.sequences  'data' has no option 'sequences'   options: calibration, training, evaluation"),
        ("compressed_tensors.shards=1", "compressed_tensors.shards  exporter 'compressed_tensors' has no option 'shards'; "
         "did you mean 'shard_bytes'?   options: shard_bytes, engine"),
    ],
)  # fmt: skip
def test_a_bad_override_is_refused_like_a_bad_recipe(recipe: Path, text: str, expected: str):
    assert refused(recipe, text) == f"--set {expected}"


def test_an_override_names_itself_as_the_place_of_what_it_wrote(project: Project):
    nearest = "matched no site.  Nearest: 'lm_head' (1 site)"
    assert project.plan("quantize.pins={lm_haed: bf16}").line == f"--set quantize.pins  pattern 'lm_haed' {nearest}"
    assert project.plan("quantize.pins.lm_haed=bf16").line == f"--set quantize.pins.lm_haed  pattern 'lm_haed' {nearest}"
    # lm_head has a line of its own in the file, but its value is the override's by now
    assert project.plan("quantize.pins={lm_head: int8}").line.startswith("--set quantize.pins  unknown format 'int8'")


def test_overrides_reach_every_level(recipe: Path):
    sets = ["seed=3", "quantize.format=int3:g64", "data.calibration.sequences=5", "data.evaluation.bos=true",
            "quantize.pins.layers.0.*=bf16", "compressed_tensors.shard_bytes=1000000"]  # fmt: skip
    made = load(recipe, PASSES, EXPORTERS, sets)
    (quantize,), (exporter,) = made.passes, made.exports
    assert (made.document.seed, str(quantize.format), exporter.shard_bytes) == (3, "int3:g64", 1_000_000)
    assert made.document.data.calibration.sequences == 5
    assert made.document.data.evaluation.bos is True
    assert quantize.pins == {"lm_head": "int8:g32", "layers.0.*": "bf16"}  # a pattern keeps its dots


def test_an_override_may_add_what_the_recipe_leaves_out(recipe: Path):
    recipe.write_text("model: m\npasses:\n- quantize:\n")
    made = load(recipe, PASSES, EXPORTERS, ["data.calibration.text=t.txt", "quantize.damp=1e-3"])
    assert made.document.data.calibration.text == "t.txt"
    assert made.passes[0].damp == 1e-3


def test_an_override_of_a_pass_that_stands_twice_is_refused(recipe: Path):
    recipe.write_text("model: m\npasses: [quantize: {}, quantize: {}]\n")
    assert refused(recipe, "quantize.damp=1") == "--set quantize.damp=1  the recipe has 2 'quantize'; change the recipe instead"


# --- round trip -------------------------------------------------------------------------------------------------------

words = st.text("abcxyz.*_-:/ üé0123", min_size=1, max_size=12)
formats = st.sampled_from(["int2:channel", "int3:g64:asym", "int4:g128", "int8:g16", "bf16", "fp16", "fp32"])
windows = st.fixed_dictionaries(
    {"sequences": st.integers(1, 9999), "length": st.integers(2, 9999), "bos": st.booleans()},
    optional={"weight": st.floats(0.001, 1e9)},
).flatmap(
    lambda rest: (
        st.fixed_dictionaries({"text": words})
        | st.fixed_dictionaries({"jsonl": words, "field": words})
        | st.fixed_dictionaries({"dataset": words, "split": words})
        | st.fixed_dictionaries({"sources": st.lists(st.fixed_dictionaries({"jsonl": words}), min_size=1, max_size=3)})
    ).map(lambda source: {**rest, **source})
)
options = st.fixed_dictionaries(
    {},
    optional={
        "method": st.sampled_from(["gptq", "rtn"]),
        "format": formats,
        "pins": st.dictionaries(words, formats, max_size=3),
        "damp": st.floats(1e-9, 1),
        "order": st.sampled_from(["activation", "natural"]),
        "clip": st.sampled_from(["minmax", "mse", "hessian"]),
    },
)
documents = st.fixed_dictionaries(
    {"model": words, "passes": st.lists(options.map(lambda o: {"quantize": o}), max_size=2)},
    optional={
        "out": words,
        "seed": st.integers(0, 2**63),
        "data": st.dictionaries(st.sampled_from(["calibration", "evaluation"]), windows),
        "export": st.just([{"compressed_tensors": {"shard_bytes": 10**7}}]),
    },
)


@given(documents)
@settings(max_examples=20, deadline=None)
def test_the_resolved_recipe_is_the_same_recipe(tmp_path_factory: pytest.TempPathFactory, document: dict[str, Any]):
    base = tmp_path_factory.getbasetemp()
    first, second = base / "first.yaml", base / "elsewhere" / "recipe.resolved.yaml"
    second.parent.mkdir(exist_ok=True)
    first.write_text(yaml.safe_dump(document, allow_unicode=True))
    one = load(first, PASSES, EXPORTERS)
    second.write_text(one.resolved(one.base))
    two = load(second, PASSES, EXPORTERS)
    assert (two.passes, two.exports, two.document.seed) == (one.passes, one.exports, one.document.seed)
    assert two.out == Path(one.out).absolute()
    assert two.resolved(two.base) == one.resolved(one.base)


def test_a_run_writes_a_recipe_that_runs_the_same(project: Project):
    assert project.run("quantize.method=rtn").code == 0
    made = load(project.out / "recipe.resolved.yaml", PASSES, EXPORTERS)
    wanted = load(project.recipe, PASSES, EXPORTERS, ["quantize.method=rtn"])
    assert (made.passes, made.exports, made.out) == (wanted.passes, wanted.exports, wanted.out)
    assert made.document.model == str(project.model)
    assert made.document.data.calibration.text == str(project.text)
    assert project("plan", project.out / "recipe.resolved.yaml").code == 0


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nout: ~/runs/a\ndata: {calibration: {text: ~/t.txt}}\n")
    made = load(path, PASSES, EXPORTERS)
    assert made.out == Path("/home/somebody/runs/a")
    assert yaml.safe_load(made.resolved(made.base))["data"]["calibration"]["text"] == "/home/somebody/t.txt"


# --- order ------------------------------------------------------------------------------------------------------------


class Prune(Pass):
    """A pass that there is not yet."""

    name: ClassVar[str] = "prune"
    needs: ClassVar[Fact] = Fact.DENSE
    gives: ClassVar[Fact] = Fact.PRUNED

    def foresee(self, state: Any) -> Any:
        return state

    def run(self, state: Any, ctx: Any) -> Any:
        return state


class Heal(Prune):
    """A pass that wants another before it."""

    name: ClassVar[str] = "heal"
    needs: ClassVar[Fact] = Fact.PRUNED


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ("quantize: {}}, {prune: {}}", ":2:26  step 2 'prune' needs DENSE weights; step 1 'quantize' removed them."),
        ("heal: {}}", ":2:10  step 1 'heal' needs PRUNED; no earlier step gives it."),
    ],
)
def test_an_illegal_order_names_both_steps(tmp_path: Path, steps: str, expected: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"model: m\npasses: [{{{steps}]\n")
    made = load(path, PASSES | {"prune": Prune, "heal": Heal}, EXPORTERS)
    with pytest.raises(OrderError) as caught:
        check_order(made.passes)
    assert str(made.located(caught.value)).startswith(f"{path}{expected}")


def test_a_legal_order_passes(tmp_path: Path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\npasses: [prune: {}, heal: {}, quantize: {}]\n")
    check_order(load(path, PASSES | {"prune": Prune, "heal": Heal}, EXPORTERS).passes)


# --- schema -----------------------------------------------------------------------------------------------------------


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a JSON value satisfies a schema, as far as the keywords go that pydantic writes."""
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        return accepts(root["$defs"][name], value, root)
    if "anyOf" in schema and not any(accepts(s, value, root) for s in schema["anyOf"]):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool}
    if "type" in schema and not isinstance(value, kinds.get(schema["type"], type(None))):
        return False
    if isinstance(value, list):
        return all(accepts(schema.get("items", {}), v, root) for v in value)
    if not isinstance(value, dict):
        return True
    known, rest = schema.get("properties", {}), schema.get("additionalProperties", True)
    inner = {k: known.get(k, rest if isinstance(rest, dict) else {}) for k in value}
    return (rest is not False or value.keys() <= known.keys()) and set(schema.get("required", ())) <= value.keys() and all(
        accepts(inner[k], v, root) for k, v in value.items()
    )  # fmt: skip


def test_the_schema_accepts_every_shipped_recipe_and_no_typo(project: Project):
    schema = json.loads(project("passes", "--schema").out)
    recipes = sorted((ROOT / "recipes").glob("*.yaml"))
    assert recipes
    for path in recipes:
        assert accepts(schema, yaml.safe_load(path.read_text()), schema), path
    assert accepts(schema, yaml.safe_load(RECIPE), schema)
    for old, new in [("seed", "sede"), ("quantize", "quantise"), ("format", "fromat"), ("sequences: 8", "sequenses: 8"),
                     ("compressed_tensors", "ggml"), ("seed: 0", "seed: x"), ("model: ./model", "name: m")]:  # fmt: skip
        assert not accepts(schema, yaml.safe_load(RECIPE.replace(old, new)), schema), new


def test_the_schema_tells_what_every_option_means():
    for cls in [*PASSES.values(), *EXPORTERS.values()]:
        for name, option in cls.model_json_schema()["properties"].items():
            assert option.get("description"), (cls, name)


def test_an_error_of_a_pass_keeps_its_kind_when_it_is_located(recipe: Path):
    made = load(recipe, PASSES, EXPORTERS)
    for kind in (RecipeError, OrderError, CompressError):
        error = made.located(kind("no", ("pins", "lm_head")))
        assert type(error) is kind
        assert str(error) == f"{recipe}:10:14  no"
