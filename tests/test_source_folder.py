"""What lies in a model's folder beside weights: its code is never run, links out of it are not followed, what a library needs
goes along, and nothing else does."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
import yaml

from compress.export.table import EXPORTERS
from tests.conftest import Project, contents, rare

EVIL = "open({place!r}, 'w').write('x')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n" \
       "class Config(LlamaConfig): model_type = 'evil'\nclass Net(LlamaForCausalLM): pass\n" \
       "class Tok(PreTrainedTokenizerFast): pass\n"  # fmt: skip


def config(project: Project, file: str = "config.json", **options: Any) -> None:
    path = project.model / file
    path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.fixture
def evil(project: Project, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A project with code in its model's folder, and somebody who says yes to everything; evil() tells whether it ran."""
    place = project.folder / "PWNED"
    (project.model / "evil.py").write_text(EVIL.format(place=str(place)))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return place.exists


# --- code -------------------------------------------------------------------------------------------------------------

ASKS: dict[str, dict[str, Any]] = {
    "config": {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}},
    "config of another repository": {"model_type": "evil", "auto_map": {"AutoConfig": "somebody/else--evil.Config"}},
    "model": {"architectures": ["Net"], "auto_map": {"AutoModelForCausalLM": "evil.Net"}},
    "odd": {"model_type": "evil", "auto_map": ["evil.Config"]},
}


@pytest.mark.parametrize("name", ASKS)
def test_a_config_that_asks_for_code_is_refused(project: Project, evil: Any, name: str) -> None:
    config(project, **ASKS[name])
    for command in (("plan", project.recipe), ("run", project.recipe), ("inspect", project.model)):
        line = project(*command).line
        assert f"{project.model / 'config.json'}: asks for custom code (auto_map: " in line
        assert "not supported" in line
    assert not evil()


@pytest.mark.parametrize(
    "asked", [{"AutoTokenizer": ["evil.Tok", "evil.Tok"]}, ["evil.Tok", None], {"AutoTokenizer": [None, "evil.Tok"]}]
)
@pytest.mark.parametrize("named", ["Tok", None])
def test_a_tokenizer_that_asks_for_code_is_refused(project: Project, evil: Any, asked: Any, named: str | None) -> None:
    config(project, "tokenizer_config.json", tokenizer_class=named, auto_map=asked)
    line = project.run().line
    assert f"{project.model / 'tokenizer_config.json'}: asks for custom code (auto_map: evil.Tok)" in line
    assert not evil()


@pytest.mark.slow
@pytest.mark.parametrize("exporters", [[n for n in EXPORTERS if n != "onnx"], rare(["onnx"])])
def test_code_beside_classes_that_transformers_has_is_not_run_and_does_not_go_along(
    project: Project, evil: Any, exporters: list[str]
) -> None:
    """As with models that were published before transformers knew them."""
    config(project, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Net"})
    config(project, "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Tok", None]})
    (project.model / "custom_generate").mkdir()
    shutil.copy(project.model / "evil.py", project.model / "custom_generate" / "generate.py")
    project.edit("- compressed_tensors: {}", "\n  ".join(f"- {exporter}: {{}}" for exporter in exporters))
    made = project.run()
    assert made.code == 0, made.err
    assert "names code of its own (auto_map), which is not run and does not go along" in made.out
    assert not evil()
    for folder in (project.out / exporter for exporter in exporters):
        assert not any(name.endswith(".py") for name in contents(folder))
        assert not any(b"auto_map" in data for name, data in contents(folder).items() if name.endswith(".json"))
        assert project("inspect", folder).code == 0


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer.json", "config.json", "model.safetensors", "LICENSE", "more.jinja"])
@pytest.mark.parametrize("verb", ["plan", "run"])
def test_a_link_out_of_the_folder_is_refused_before_anything_is_computed(project: Project, name: str, verb: str) -> None:
    secret, place = project.folder / "secret", project.model / name
    if place.exists():
        place.rename(secret)
    else:
        secret.write_text("my private key")
    place.symlink_to(secret)
    assert project(verb, project.recipe).line.endswith(f"{place}: is a link out of the model's folder; copy the file itself")
    assert not project.out.exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_link_out_of_a_module_of_it_is_refused(project: Project, kind: str) -> None:
    outside = project.folder / "secrets"
    outside.mkdir()
    (outside / "config.json").write_text("my private key")
    (project.model / "modules.json").write_text(
        json.dumps([{"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}])
    )
    place = project.model / "1_Pooling"
    if kind == "folder":
        place.symlink_to(outside)
    else:
        place.mkdir()
        (place / "config.json").symlink_to(outside / "config.json")
    assert "is a link out of the model's folder; copy the file itself" in project.run().line


@pytest.mark.slow
def test_links_within_the_folder_and_into_its_hub_cache_are_followed(project: Project) -> None:
    snapshot, blobs = project.folder / "cache" / "snapshots" / "abc", project.folder / "cache" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(project.model.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    (snapshot / "again.txt").symlink_to("tokenizer.json")
    made = project.run(f"model={snapshot}")
    assert made.code == 0, made.err
    assert not any(path.is_symlink() for path in project.artifact.rglob("*"))
    assert (project.artifact / "again.txt").read_bytes() == (snapshot / "tokenizer.json").read_bytes()


# --- what goes along --------------------------------------------------------------------------------------------------


def modules(project: Project, *parts: tuple[str, str]) -> None:
    said = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(parts)]
    (project.model / "modules.json").write_text(json.dumps(said))


def test_modules_templates_and_licences_go_along_and_nothing_else(project: Project) -> None:
    library = "sentence_transformers.models."
    modules(project, ("", f"{library}Transformer"), ("1_Pooling", f"{library}Pooling"), ("2_Normalize", f"{library}Normalize"),
            ("3_Dense", f"{library}Dense"))  # fmt: skip
    along = {"1_Pooling/config.json": b"{}", "3_Dense/config.json": b"{}", "3_Dense/model.safetensors": b"x",
             "additional_chat_templates/tools.jinja": b"x", "LICENSE": b"x", "Notice.md": b"x", "USE_POLICY.md": b"x",
             "config_sentence_transformers.json": b"{}", "chat_template.jinja": b"x"}  # fmt: skip
    stays = ["evil.py", "1_Pooling/evil.py", "3_Dense/pytorch_model.bin", "pytorch_model.bin", "checkpoint-5/config.json",
             ".secret.json", "onnx/model.onnx", "LICENSE.py", "README.md"]  # fmt: skip
    for name, data in {**along, **dict.fromkeys(stays, b"mine")}.items():
        (project.model / name).parent.mkdir(exist_ok=True)
        (project.model / name).write_bytes(data)
    (project.model / "2_Normalize").mkdir()
    made = project.run()
    assert made.code == 0, made.err
    held = contents(project.artifact)
    assert {name: held.get(name) for name in along} == along
    assert (project.artifact / "2_Normalize").is_dir()
    assert not any(held.get(name) == b"mine" for name in stays)
    assert project("inspect", project.artifact).code == 0


@pytest.mark.parametrize(("parts", "says"), [
    ([("", "custom_st.Transformer")], "asks for custom code ('custom_st.Transformer')"),
    ([("../..", "sentence_transformers.models.Pooling")], "names '../..', which is no folder within the model's"),
    ([("/etc", "sentence_transformers.models.Pooling")], "names '/etc', which is no folder within the model's"),
])  # fmt: skip
def test_modules_that_cannot_go_along_are_refused(project: Project, parts: Any, says: str) -> None:
    modules(project, *parts)
    assert f"{project.model / 'modules.json'}: {says}" in project.run().line


@pytest.mark.parametrize("data", [b"{", b"{}", b"[1]", b"\xff"])
def test_a_broken_list_of_modules_is_refused(project: Project, data: bytes) -> None:
    (project.model / "modules.json").write_bytes(data)
    assert f"{project.model / 'modules.json'}: is no list of modules" in project.run().line


def test_a_module_that_is_a_pickle_is_refused(project: Project) -> None:
    modules(project, ("2_Dense", "sentence_transformers.models.Dense"))
    (project.model / "2_Dense").mkdir()
    (project.model / "2_Dense" / "pytorch_model.bin").write_bytes(b"x")
    assert "is a pickle, which may hold code and does not go along; save it as safetensors" in project.run().line


def test_without_an_exporter_nobody_asks_what_would_go_along(project: Project) -> None:
    (project.model / "notes.txt").symlink_to(project.text)
    content = yaml.safe_load(project.recipe.read_text()) | {"export": []}
    project.recipe.write_text(yaml.safe_dump(content))
    assert project.run().code == 0
