"""`plan` of a model without a recipe: what each width would cost, from the config alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Project, covered


def table(out: str) -> dict[str, list[str]]:
    """Rows of the table by format."""
    return {row.split()[0]: row.split()[1:] for row in out.splitlines() if re.match(r"(int|lut|nf)\d", row)}


@pytest.fixture
def bare(family: Any, tmp_path: Path) -> Any:
    """bare(family) -> a folder with nothing but its config."""

    def get(name: str) -> Path:
        (tmp_path / name).mkdir()
        shutil.copyfile(family(name) / "config.json", tmp_path / name / "config.json")
        return tmp_path / name

    return get


@pytest.mark.parametrize("name", covered(["llama", "qwen2", "gpt2", "mixtral", "roberta"], "qwen2", "roberta"))
def test_the_table_is_what_plan_says_of_a_recipe(project: Project, bare: Any, name: str):
    """Also of a bare config; and a folder may be named by its config."""
    folder = bare(name)
    told = project("plan", folder)
    assert told.code == 0, told.err
    assert table(project("plan", folder / "config.json").out) == (rows := table(told.out))
    assert {f"{kind}{bits}:g64" for kind, bits in (("int", 2), ("int", 8), ("lut", 3), ("nf", 4))} <= rows.keys()
    assert "left out: int2:g128, int3:g128, int4:g128" in told.out
    assert "int2:g128: groups of 128 do not divide 64 inputs; groups that do: g16, g32, g64, or channel\n" in told.out
    project.edit("compressed_tensors", "native")
    sets = [f"model={folder}", "quantize.format=int4:g64", "quantize.method=rtn"]
    for pins, at in (("{}", 1), ("{embed: 'int4:g64', lm_head: 'int4:g64'}", 5)):
        foreseen = project.plan(*sets, f"quantize.pins={pins}").out
        assert f"native: {rows['int4:g64'][at]} bytes" in foreseen
        assert f"{rows['int4:g64'][0]} bits per weight in linear layers" in foreseen
    assert ("which embedding and head share" in told.out) == (name not in ("llama", "mixtral"))


def test_memory_is_that_of_a_recipe(project: Project, family: Any):
    told = project("plan", family("llama")).out
    data = "{calibration: {text: words.txt, sequences: 128, length: 2048}}"
    bare_recipe = project.folder / "bare.yaml"
    (project.folder / "bare").mkdir()
    shutil.copyfile(project.model / "config.json", project.folder / "bare" / "config.json")
    bare_recipe.write_text(f"model: ./bare\ndata: {data}\npasses: [quantize: {{format: 'int2:g64'}}]\n")
    peak = re.search(r"peak memory about ([^,]*),", project("plan", bare_recipe).out)
    assert peak
    assert f"memory of a run: gptq on 128 windows of 2,048 tokens about {peak[1]}, rounding without data about" in told


def test_the_file_is_of_that_size(project: Project):
    rows = table(project("plan", project.model).out)
    project.edit("compressed_tensors", "native")
    assert project.run("quantize.format=int4:g64", "quantize.pins={}", "quantize.method=rtn").code == 0
    written = sum(p.stat().st_size for p in (project.out / "native").glob("*.safetensors"))
    assert rows["int4:g64"][1] == f"{written:,}"


def test_of_a_hub_id_the_config_alone_is_fetched(project: Project, family: Any, bare: Any, monkeypatch: pytest.MonkeyPatch):
    asked = []

    def fetched(repo: str, name: str, revision: str | None = None) -> str:
        asked.append((repo, name, revision))
        return str(family("llama") / "config.json")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    monkeypatch.chdir(project.folder)
    told = project("plan", "some/model@v1").out
    assert asked == [("some/model", "config.json", "v1")]
    assert table(told) == table(project("plan", bare("llama")).out)
    assert "some/model@v1: llama, 2 blocks" in told


def test_a_hub_that_does_not_answer(project: Project, monkeypatch: pytest.MonkeyPatch):
    def silent(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route to the hub\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", silent)
    assert (
        project("plan", "some/model").line == "model 'some/model': no folder of this name, and the hub says: no route to the hub"
    )


def test_a_config_that_cannot_be_read_goes_by_the_name_that_was_given(project: Project, monkeypatch: pytest.MonkeyPatch):
    broken = project.folder / "broken.json"
    broken.write_text("{")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(broken))
    assert project("plan", "some/model").line.startswith("some/model/config.json: transformers cannot read it (no JSON")


def test_what_is_no_model_and_what_is_for_recipes(project: Project, family: Any, baked: Any):
    for flag in (["--set", "a=b"], ["--out", "x"], ["--no-measure"]):
        assert project("plan", project.model, *flag).line == (
            f"{flag[0]} is for a recipe, and '{project.model}' is a model; write a recipe for it"
        )
    assert project("plan", project.folder / "none.yaml").line.endswith("none.yaml: No such file or directory")
    assert "no config.json" in project("plan", project.folder).line
    made = baked("llama", "gguf", {"quantize": {"method": "rtn", "format": "int4:g32"}})
    assert "is a run folder; plan its recipe" in project("plan", made.out).line
    assert "is compressed already; name the original model" in project("plan", made.artifacts["gguf"][0]).line
