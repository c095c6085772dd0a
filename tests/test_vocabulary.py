"""A model with some of its tokens: texts are the same tokens, in every artifact, and figures are those of these tokens."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from compress import cli, pipeline
from compress.errors import CompressError
from compress.export.artifact.proof import logits
from compress.export.table import KINDS
from compress.model.model import open_model
from compress.model.tokenizer import open_tokenizer
from compress.model.vocabulary import closed, keep_list, rewritten
from compress.passes.edit import Edit
from tests.conftest import FAMILIES, Project, covered, make_model, rare
from tests.cooking import bake, recipe
from tests.pass_laws import check_pass
from tests.test_tokenizer import made, prose

MAKES = ["bytes", "llama", "unigram", "words", "lines"]


def smaller(source: Path, folder: Path, named: set[int]) -> tuple[Any, tuple[int, ...]]:
    """The tokenizer of a folder with some tokens only, as transformers opens it, and their old ids."""
    kept = closed(source, named, {}, 10**6)
    folder.mkdir(parents=True)
    for name, content in rewritten(source, kept).items():
        if content is not None:
            (folder / name).write_bytes(content)
    return open_tokenizer(folder), kept


@pytest.fixture(scope="module", params=covered(MAKES, "bytes", "words"))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = made(request.param, tmp_path_factory.mktemp("whole"))
    return folder, open_tokenizer(folder)


def encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 10**6), words=st.integers(1, 60))
def test_what_was_made_of_kept_tokens_is_made_of_the_same(
    whole: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory, seed: int, words: int
) -> None:
    source, tokenizer = whole
    named = set(encoded(tokenizer, prose(seed, words)))
    cut, kept = smaller(source, tmp_path_factory.mktemp("cut") / "x", named)
    assert named <= set(kept)
    assert cut.get_vocab() == {text: kept.index(i) for text, i in tokenizer.get_vocab().items() if i in kept}
    draw, tried = random.Random(seed), 0
    pieces = prose(seed, words).split(" ")
    for _ in range(20):  # other texts of the same words: some of them have no other tokens
        text = " ".join(draw.choices(pieces, k=draw.randint(1, 8)))
        ids = encoded(tokenizer, text)
        if set(ids) <= set(kept):
            tried += 1
            assert [kept[i] for i in encoded(cut, text)] == ids
    assert [kept[i] for i in encoded(cut, prose(seed, words))] == encoded(tokenizer, prose(seed, words))


def test_what_is_needed_is_needed_by_itself_too(whole: tuple[Path, Any]) -> None:
    source, tokenizer = whole
    kept = closed(source, encoded(tokenizer, "the cat sat"), {}, 10**6)
    assert closed(source, kept, {}, 10**6) == kept


# --- a model ----------------------------------------------------------------------------------------------------------


def spoken(folder: Path, name: str = "llama", kind: str = "bytes", **changes: Any) -> Path:
    """A small model whose tokenizer has merges, special tokens, and a template that puts one in front of a text."""
    config = FAMILIES[name]()
    config.vocab_size, config.num_hidden_layers = 420, 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    for key, value in {"bos_token_id": 401, "eos_token_id": [402], "pad_token_id": 403, **changes}.items():
        setattr(config, key, value)
    make_model(folder, config, torch.float32)
    for path in folder.glob("*token*"):
        path.unlink()
    made(kind, folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    before = len(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"})
    tokenizer.add_tokens(["<unused>", "<turn>"])
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}<turn>{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    said = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": before, "eos_token_id": [before + 1], "pad_token_id": before + 2}
    (folder / "config.json").write_text(json.dumps(said | ids))
    (folder / "generation_config.json").write_text(
        json.dumps(
            {**ids, "suppress_tokens": [5, before], "temperature": 0.5, "bad_words_ids": [[before, before + 2], [before, 399]]}
        )
    )
    (folder / "vocab.txt").write_text("old")
    file = json.loads((folder / "tokenizer.json").read_text())
    if kind == "bytes":
        file["pre_tokenizer"]["add_prefix_space"] = False
    file["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [before], "tokens": ["<s>"]}}}  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False))
    return folder


def listed(folder: Path, source: Path, text: str) -> Path:
    """A keep-list of the tokens of a text."""
    ids = sorted(set(encoded(open_tokenizer(source), text)))
    path = folder / "keep.txt"
    path.write_text("# the tokens of one text\n\n" + "\n".join(f"{i}  # {n}" for n, i in enumerate(ids)))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A model, a keep-list, and a text."""
    folder = tmp_path_factory.mktemp("spoken")
    source = spoken(folder / "model")
    words = prose(11, 3_000)
    (folder / "text.txt").write_text(words, encoding="utf-8", newline="")
    return source, listed(folder, source, words[:300]), folder / "text.txt"


@pytest.fixture(scope="module")
def cut(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """cut(exporter) -> a run that made its artifact; one run for all that are quick."""
    source, keep, text = model

    @cache
    def run(exporters: str) -> Any:
        steps = {"edit": {"vocab": str(keep)}}, {"quantize": {"format": "int4:g32"}}
        return bake(tmp_path_factory.mktemp("cut"), source, text, exporters, *steps)

    return lambda kind: run("onnx" if kind == "onnx" else "compressed_tensors native gguf gptq")


@pytest.mark.parametrize("kind", ["compressed_tensors", "native", rare("onnx"), "gguf", "gptq"])
def test_a_smaller_vocabulary_goes_through_every_exporter_and_back(cut: Any, model: Any, kind: str) -> None:
    (source, _, text), done = model, cut(kind)
    place, kept = done.artifacts[kind][0], list(done.state.vocabulary or ())
    assert 50 < len(kept) < 390
    assert json.loads((place / "tokenizer.source_ids.json").read_text()) == kept
    said, given = (json.loads((f / "config.json").read_text()) for f in (place, source))
    assert said["vocab_size"] == len(kept)
    assert kept[said["bos_token_id"]] == given["bos_token_id"]
    assert [kept[i] for i in said["eos_token_id"]] == given["eos_token_id"]
    generation = json.loads((place / "generation_config.json").read_text())
    assert generation["temperature"] == 0.5
    assert given["bos_token_id"] in [kept[i] for i in generation["suppress_tokens"]]
    assert [[kept[i] for i in ids] for ids in generation["bad_words_ids"]] == [[given["bos_token_id"], given["pad_token_id"]]]
    assert not (place / "vocab.txt").exists()
    ours, theirs = (transformers.AutoTokenizer.from_pretrained(f) for f in (place, source))
    assert {"<turn>", "<unused>"} <= ours.get_vocab().keys()  # a template may put their names together
    words = text.read_text(encoding="utf-8")[:300]
    assert [kept[i] for i in ours(words)["input_ids"]] == theirs(words)["input_ids"]
    assert ours.decode(ours(words)["input_ids"]) == theirs.decode(theirs(words)["input_ids"])
    again = next(k for k in KINDS if k.name == kind).read(place)
    assert again.graph["embed"].shape[0] == len(kept)
    ids = torch.randint(len(kept), (1, 12), generator=torch.Generator().manual_seed(0))
    (a,), (b,) = (logits(s, [ids], "cpu") for s in (done.state, again))
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gemma3", "llama"),
        rare("roberta", "words"),
        *(rare(*case) for case in (("qwen2", "bytes"), ("gpt2", "bytes"), ("phi3", "unigram"))),
    ],
)
def test_rows_are_the_sources_and_logits_those_of_the_tokens_that_are_left(tmp_path: Path, name: str, kind: str) -> None:
    source = spoken(tmp_path / "model", name, kind, **({"pad_token_id": 1, "bos_token_id": 0} if name == "roberta" else {}))
    keep = listed(tmp_path, source, prose(3, 200))
    if name == "roberta":
        keep.write_text(keep.read_text() + "\n0\n1\n2\n3")
        said = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(said | {"pad_token_id": 1, "bos_token_id": 0}))
    done = bake(tmp_path, source, None, "compressed_tensors", {"edit": {"vocab": str(keep)}})
    start, kept = open_model(str(source)).state, list(done.state.vocabulary or ())
    ids = torch.tensor(kept)[torch.randint(len(kept), (2, 12), generator=torch.Generator().manual_seed(0))]
    (a,), (b,) = logits(start, [ids], "cpu"), logits(done.state, [done.state.ids(ids)], "cpu")
    torch.testing.assert_close(b, a[..., kept], atol=1e-4, rtol=1e-4)
    stock = getattr(transformers, json.loads((source / "config.json").read_text())["architectures"][0])
    loaded = stock.from_pretrained(done.artifacts["compressed_tensors"][0], dtype=torch.float32).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=done.state.ids(ids)).logits, b, atol=1e-4, rtol=1e-4)


def holes(file: dict[str, Any]) -> None:
    """Added tokens whose ids in the file are not those that the library gives them."""
    for token in file["added_tokens"]:
        token["id"] += 3 * (token["content"] in ("<unused>", "<turn>"))


def twice(file: dict[str, Any]) -> None:
    """An added token that the vocabulary has under another id."""
    text = list(file["model"]["vocab"])[300]
    file["added_tokens"].append({"id": 409, "content": text, "special": True, **dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False)})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("change", covered([holes, twice], holes))
def test_ids_are_those_that_transformers_gives_and_not_those_of_the_file(tmp_path: Path, change: Any) -> None:
    source = spoken(tmp_path / "model")
    file = json.loads((source / "tokenizer.json").read_text())
    change(file)
    (source / "tokenizer.json").write_text(json.dumps(file, ensure_ascii=False))
    keep = listed(tmp_path, source, prose(3, 200))
    done = bake(tmp_path, source, None, "compressed_tensors", {"edit": {"vocab": str(keep)}})
    kept, place = list(done.state.vocabulary or ()), done.artifacts["compressed_tensors"][0]
    before, after = (open_tokenizer(folder).get_vocab() for folder in (source, place))
    assert {text: kept[i] for text, i in after.items()} == {text: i for text, i in before.items() if text in after}
    rows, table = (open_model(str(f)).state.dense.read("model.embed_tokens.weight") for f in (place, source))
    assert torch.equal(rows, table[kept])


def test_positions_that_count_from_the_padding_token_are_not_moved(tmp_path: Path) -> None:
    config = transformers.CamembertConfig(vocab_size=420, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                          num_attention_heads=4, max_position_embeddings=520, pad_token_id=300,
                                          bos_token_id=400, eos_token_id=401)  # fmt: skip
    source = make_model(tmp_path / "model", config)
    for path in source.glob("*token*"):
        path.unlink()
    keep = listed(tmp_path, made("words", source), "the cat sat")
    with pytest.raises(CompressError, match="positions count from the number of the padding token"):
        Edit(vocab=str(keep)).foresee(open_model(str(source)).state)


def test_a_list_that_changes_while_it_is_used_changes_nothing(tmp_path: Path, model: Any) -> None:
    source, keep, _ = model
    mine = tmp_path / "mine.txt"
    mine.write_text(keep.read_text())
    edit, state = Edit(vocab=str(mine)), open_model(str(source)).state
    first = edit.foresee(state).vocabulary
    mine.write_text("5")
    assert edit.foresee(state).vocabulary == first


@pytest.mark.slow
@pytest.mark.parametrize("quantize", [rare([]), [{"quantize": {"format": "int3:g32"}}]])
def test_figures_are_of_the_tokens_that_are_left(
    tmp_path: Path, model: Any, capsys: pytest.CaptureFixture[str], quantize: list[dict[str, Any]]
) -> None:
    """A vocabulary that is only cut costs nothing, and `eval` finds in the artifact what the run found."""
    source, keep, text = model
    path = recipe(tmp_path, source, text)
    content = yaml.safe_load(path.read_text())
    content["data"]["evaluation"] = {"text": str(text), "sequences": 4, "length": 32}
    path.write_text(
        yaml.safe_dump({**content, "passes": [{"edit": {"vocab": str(keep)}}, *quantize], "export": [{"native": {}}]})
    )
    done = pipeline.run(path)
    before, scores = done.scores["original"], done.scores["compressed"]
    if quantize:
        assert scores["kl"] > 1e-3
    else:
        assert (scores["kl"], scores["agreement"]) == (pytest.approx(0, abs=1e-6), 1)
        assert scores["perplexity"] == pytest.approx(before["perplexity"])
    assert cli.main(["eval", str(done.out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["kl"], said["perplexity"]) == (
        pytest.approx(scores["kl"], abs=1e-5), pytest.approx(scores["perplexity"], rel=1e-4)
    )  # fmt: skip


@pytest.mark.slow
def test_the_laws_of_passes(family: Any, tmp_path: Path) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("\n".join(map(str, range(256))))
    check_pass(Edit(vocab=str(keep)), family("llama", blocks=1), tmp_path / "laws")


def test_the_mark_of_utf8_in_front_of_a_list_is_none_of_its_numbers(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_bytes(b"\xef\xbb\xbf1\n2\n")
    assert keep_list(tmp_path / "keep.txt") == [1, 2]


@pytest.mark.parametrize(("given", "says"), [
    ("", "names no token; give their ids, one on a line"),
    ("1\nthe\n", "2: 'the' is no token id; give one whole number on a line"),
    ("-1", "1: '-1' is no token id"),
    ("5000", "model: the tokenizer has no token 5000; leave it out of the list"),
    (None, "No such file or directory"),
])  # fmt: skip
def test_a_list_that_cannot_be_is_one_line(project: Project, given: str | None, says: str) -> None:
    if given is not None:
        (project.folder / "keep.txt").write_text(given)
    project.edit("passes:\n", "passes:\n  - edit: {vocab: keep.txt}\n")
    line = project.plan().line
    assert says in line
    assert line.startswith(f"{project.recipe}:8:")


@pytest.mark.parametrize(("change", "says"), [
    (lambda f: f.unlink(), "no tokenizer that transformers can read"),
    (lambda f: f.write_text("{}"), "no tokenizer that transformers can read"),
    (lambda f: f.write_text(json.dumps(json.loads(f.read_text()) | {"model": {
        "type": "BPE", "vocab": {"a": 0, "b_": 1}, "merges": [], "end_of_word_suffix": "_"}})), "marks where words go on or end"),
])  # fmt: skip
def test_a_tokenizer_that_cannot_be_cut_is_one_line(project: Project, change: Any, says: str) -> None:
    (project.folder / "keep.txt").write_text("0")
    project.edit("passes:\n", "passes:\n  - edit: {vocab: keep.txt}\n")
    change(project.model / "tokenizer.json")
    assert says in project.plan().line


@pytest.mark.slow
def test_another_list_is_another_run(tmp_path: Path, model: Any) -> None:
    """Also for a step in front of the cut, whose text it makes others tokens of."""
    source, keep, text = model
    mine = tmp_path / "mine.txt"
    mine.write_text(keep.read_text())
    steps = {"smooth": {"strength": 0.5}}, {"edit": {"vocab": str(mine)}}, {"quantize": {"method": "rtn", "format": "int4:g32"}}
    bake(tmp_path, source, text, "native", *steps)
    bake(tmp_path, source, text, "native", *steps)
    assert len(list((tmp_path / "out" / "steps").iterdir())) == 3
    mine.write_text(keep.read_text() + "\n399")
    bake(tmp_path, source, text, "native", *steps)
    assert len(list((tmp_path / "out" / "steps").iterdir())) == 6


def test_twice_is_refused(model: Any) -> None:
    source, keep, _ = model
    once = Edit(vocab=str(keep)).foresee(open_model(str(source)).state)
    with pytest.raises(CompressError, match="an earlier step has cut the vocabulary"):
        Edit(vocab=str(keep)).foresee(once)
