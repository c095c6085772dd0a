"""The pass `context_merge`: what it measures, what travels, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor

from compress import pipeline
from compress.cache import merging
from compress.cache.merging import BIAS, FILE, MERGED
from compress.cli import main
from compress.errors import CompressError, ModelError
from compress.export.artifact.place import MARK
from compress.export.native import reader
from compress.export.runtime import load, merge_context
from compress.model.attention import Attended
from compress.passes import context_merge_core as core
from tests.cooking import bake, recipe, refused, steps


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text_of(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def test_the_bias_is_the_mean_over_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "BLOCK", 7)
    a = Attended(0, drawn(2, 4, 20, 8), drawn(2, 2, 20, 8, seed=1), drawn(2, 2, 20, 8), None, 0.3)
    found, pairs = core.sums(a, 9)
    wanted, count = torch.zeros(9, dtype=torch.float64), torch.zeros(9)
    for row in range(2):
        for i in range(20):
            for j in range(max(0, i - 8), i + 1):
                s = max(float(a.q[row, h, i] @ a.k[row, h // 2, j]) * 0.3 for h in range(4))
                wanted[i - j] += s
                count[i - j] += 1
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(pairs, count.double())


def test_the_bias_takes_what_hangs_on_distance_alone() -> None:
    """Keys that turn with their place, as rotary ones do, and say something besides: of another text no correlation is left."""
    rates = torch.tensor([0.02, 0.011, 0.007, 0.003])

    def turned(seed: int) -> Tensor:
        angle = torch.arange(128)[:, None] * rates
        return torch.cat([angle.cos(), angle.sin(), 0.5 * drawn(128, 8, seed=seed)], -1)[None, None]

    found, pairs = core.sums(Attended(0, turned(0), turned(1), turned(2), None, 1.0), 128)
    more = [core.sums(Attended(0, turned(10 + i), turned(30 + i), turned(2), None, 1.0), 128) for i in range(8)]
    bias = (found + sum(f for f, _ in more)) / (pairs + sum(p for _, p in more))
    q, k, distance = turned(91)[0, 0, -1], turned(92)[0, 0], torch.arange(127, -1, -1)
    s = k @ q
    before, after = (float(torch.corrcoef(torch.stack([x.double(), distance.double()]))[0, 1]) for x in (s, s - bias[distance]))
    assert abs(before) > 0.5
    assert abs(after) < 0.1


STEP = {"context_merge": {"window": 32, "warmup": 0, "prefix": 1, "suffix": 2}}


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """A quantized llama of two layers, which merge once."""
    folder = tmp_path_factory.mktemp("merge")
    return bake(folder, family("llama"), text, "native", steps("int8:g32"), STEP)


def test_the_artifact_brings_its_biases(made: pipeline.Outcome, capsys: Any) -> None:
    artifact, _ = made.artifacts["native"]
    assert reader.read(artifact).serving == made.state.serving
    told = merging.told(made.state.serving[MERGED])
    assert (told.layers, len(told.bias[0]), told.chunk) == (2, 16, 16)
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32), text_of(26)
    assert model.context_merge == told
    merged = merge_context(model, ids)
    assert (merged.levels, merged.past_key_values.layers[1].keys.shape[2]) == (1, 16)
    with pytest.raises(ModelError, match="is not saved again: copy the folder"):
        model.save_pretrained(artifact / "saved")
    assert main(["inspect", str(artifact)]) == 0
    assert "context: merged beyond 32 tokens, chunks of 16, 0 layers before" in capsys.readouterr().out


def test_another_warm_up_measures_nothing(made: pipeline.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "sums", lambda *_: pytest.fail("is measured again"))
    monkeypatch.setattr("compress.passes.context_merge.sums", core.sums)
    path = made.out.parent / "recipe.yaml"
    other = path.with_name("other.yaml")
    other.write_text(path.read_text().replace("suffix: 2", "suffix: 3"))
    held = pipeline.run(other, until="context_merge").state.serving[MERGED]
    assert held == {**made.state.serving[MERGED], "suffix": 3}


def test_what_cannot_be_merged_is_refused_by_plan(family: Any, text: Path, tmp_path: Path) -> None:
    for exporter in ("compressed_tensors", "gguf", "gptq", "onnx"):
        with pytest.raises(CompressError, match=rf"{exporter} has no place for the biases by which .* export native"):
            bake(tmp_path / exporter, family("llama"), text, exporter, STEP)
    options = STEP["context_merge"]
    cases: list[tuple[str, list[dict[str, Any]], str]] = [
        ("llama", [STEP, STEP], "'context_merge' behind it changes that"),
        ("llama", [STEP, {"prune": {"mlp": 0.5}}], "'prune' behind it changes that"),
        ("llama", [{"context_merge": {**options, "window": 512}}], "a chunk of 256 tokens, and windows have 32; ask for 256"),
        ("llama", [{"context_merge": {"prefix": 2, "suffix": 2}}], "a chunk of 128 tokens, and windows have 32"),
        ("llama", [{"context_merge": {**options, "suffix": 20}}], "may take half of it"),
        ("llama", [{"context_merge": {**options, "warmup": 1}}], "behind a warm-up of 1 of 2 layers nothing can be merged"),
        (
            "mistral",
            [{"context_merge": {**options, "window": 40}}],
            "some layers see 16 tokens, and chunks have 20; .* 32 or less",
        ),
        ("gemma2", [STEP], "chunked or soft-capped"),
        ("gpt2", [STEP], "has no rotary positions"),
        ("opt", [STEP], "has no rotary positions"),
        ("roberta", [STEP], "has no cache"),
        ("llama", [{"kv_cache": {}}, STEP], "an earlier 'kv_cache' decides on another"),
        ("llama", [{"kv_policy": {"context": 64, "continuation": 8}}, STEP], "an earlier 'kv_policy' decides on another"),
        ("llama", [STEP, {"kv_cache": {}}], "an earlier 'context_merge' is for our runtime"),
        ("llama", [STEP, {"kv_policy": {"context": 64, "continuation": 8}}], "an earlier 'context_merge' leaves one of its own"),
    ]
    for i, (name, passes, says) in enumerate(cases):
        refused(tmp_path / str(i), family(name), text, passes, says)
    path = recipe(tmp_path / "none", family("llama"), exports=False)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": [STEP]}))
    with pytest.raises(CompressError, match=r"needs data\.calibration"):
        pipeline.plan(path)


def test_a_damaged_or_missing_file_is_refused(made: pipeline.Outcome, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made.artifacts["native"][0], tmp_path / "copy"))
    (folder / MARK).unlink()
    document, bias = json.loads((folder / FILE).read_text()), (folder / BIAS).read_bytes()
    short = merging.Merging(32, 0, 1, 2, ((0.0,) * 16,))
    cases: list[tuple[dict[str, Any], bytes, str]] = [
        ({"version": 2}, bias, "upgrade compress-pipeline"),
        ({"window": "32"}, bias, "is damaged"),
        ({"suffix": 0}, bias, "is damaged"),
        ({"suffix": 15}, bias, "may take half of it"),
        ({"window": 64}, bias, "do not belong together"),
        ({"warmup": 2}, bias, "do not belong together"),
        ({}, bias[:100], "it is damaged"),
        ({}, b"", "it is damaged"),
    ]
    for change, data, says in cases:
        (folder / FILE).write_text(json.dumps({**document, **change}))
        (folder / BIAS).write_bytes(data)
        for way in (reader.read, load):
            with pytest.raises(ModelError, match=says) as caught:
                way(folder)
            assert "\n" not in str(caught.value)
    (folder / FILE).write_text(json.dumps(document))
    short.save(folder)
    for way in (reader.read, load):
        with pytest.raises(ModelError, match="is of 1 layers and a window of 32, and the model has 2"):
            way(folder)
    (folder / BIAS).unlink()
    for way in (reader.read, load):
        with pytest.raises(ModelError, match="is missing, and asked for by config"):
            way(folder)
