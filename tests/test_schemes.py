"""What a compressed-tensors config says of its matrices: one parser for our reader and for the runtime, whoever wrote the
config, and no pattern in it that engines would be busy with for ever."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

from compress.cli import main
from compress.errors import ModelError
from compress.export import runtime
from compress.export.artifact.files import MARK
from compress.export.artifact.schemes import schemes
from compress.export.compressed_tensors import reader
from compress.formats import Int
from tests.cooking import bake

EVIL = "(.+.+)+[^a-z_.0-9]"
PACKED = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}


def said(**weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": PACKED | weights, "format": "pack-quantized"}
    return {"config_groups": {"group_0": group}, "ignore": ["lm_head"]}


@pytest.mark.parametrize(("weights", "form"), [
    ({}, Int(4, 32)), ({"strategy": None}, Int(4, 32)), ({"symmetric": False}, Int(4, 32, False)),
    ({"strategy": "channel", "group_size": None}, Int(4, None)), ({"strategy": "channel", "group_size": 128}, Int(4, None)),
    ({"strategy": None, "group_size": -1}, Int(4, None)), ({"actorder": "static"}, Int(4, 32)),
])  # fmt: skip
def test_formats(weights: dict[str, Any], form: Int) -> None:
    assert schemes(said(**weights)) == [(["Linear"], form)]


@pytest.mark.parametrize("weights", [
    {"strategy": "tensor"}, {"strategy": None, "group_size": None}, {"strategy": "block"}, {"actorder": "group"},
    {"type": "float"}, {"num_bits": True}, {"num_bits": "4"}, {"symmetric": "yes"}, {"group_size": None},
    {"group_size": 31}, {"num_bits": 16},
])  # fmt: skip
def test_what_is_not_read_is_one_line(weights: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"config\.json: ") as caught:
        schemes(said(**weights))
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def made(family: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    passes = {"quantize": {"method": "rtn", "format": "int4:g32"}}
    return bake(folder, family("llama"), None, "compressed_tensors", passes).artifacts["compressed_tensors"][0]


@pytest.fixture
def changed(made: Path, tmp_path: Path) -> Any:
    """changed(how) -> a copy with another config, as from another tool."""

    def make(how: Callable[[dict[str, Any]], Any]) -> Path:
        folder = Path(shutil.copytree(made, tmp_path / "a"))
        config = json.loads((folder / "config.json").read_text())
        how(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        (folder / MARK).unlink()
        return folder

    return make


def targets(*names: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda config: config["config_groups"]["group_0"].update(targets=[*names])


@pytest.mark.parametrize("how", [
    targets("Linear"), targets(r"re:.*\.(q|k|v|o|gate|up|down)_proj$"), targets("model.nothing", "Linear"),
    targets(r"re:model\.layers\.\d+\..*"), lambda config: config.update(ignore=["re:.*lm_head", "Embedding"]),
])  # fmt: skip
def test_reader_and_runtime_read_what_other_tools_write_alike(changed: Any, how: Any) -> None:
    folder = changed(how)
    state = reader.read(folder)
    held = [str(m.format) for m in runtime.load(folder).modules() if type(m).__name__ == "PackedLinear"]
    assert len(state.codes) == len(held) == 14
    assert {str(state.format(state.graph[name])) for name in state.codes} == set(held) == {"int4:g32"}


@pytest.mark.parametrize("how", [
    targets(f"re:{EVIL}"), lambda config: config.update(ignore=[f"re:{EVIL}"]), targets("Linear", "re:(a|a)*b"),
    lambda config: config["config_groups"].update(more={**config["config_groups"]["group_0"], "targets": [f"re:{EVIL}"]}),
])  # fmt: skip
def test_a_pattern_that_never_ends_is_refused_by_whoever_reads_the_folder(changed: Any, capsys: Any, how: Any) -> None:
    folder = changed(how)
    for command in (["inspect", str(folder)], ["bench", str(folder), "--against", str(folder)]):
        assert main(command) == 2
        line = capsys.readouterr().err
        assert f"{folder / 'config.json'}: a target, '" in line
        assert line.count("\n") == 1
    with pytest.raises(ModelError, match="is no pattern that is read"):
        runtime.load(folder)
    with runtime.keep_packed(), pytest.raises(ModelError, match="is no pattern that is read"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.slow
@pytest.mark.parametrize("change", [
    {"rank_pattern": {EVIL: 8}}, {"alpha_pattern": {"^model": 8, EVIL: 8}}, {"exclude_modules": EVIL}, {"target_modules": EVIL},
])  # fmt: skip
def test_a_pattern_of_an_adapter_that_never_ends_is_refused(baked: Any, tmp_path: Path, capsys: Any, change: Any) -> None:
    made = baked("llama", "compressed_tensors", {"lqlora": {"method": "rtn", "format": "int4:g32", "rank": 4}})
    folder = Path(shutil.copytree(made.artifacts["compressed_tensors"][0], tmp_path / "artifact"))
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert main(["inspect", str(folder)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(ModelError) as caught:
        runtime.load(folder)
    assert "\n" not in str(caught.value)
