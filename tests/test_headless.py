"""Models that predict no tokens: embedders and classifiers. An artifact is the user's model as their library loads it, by the
class that the config names and by AutoModel; what cannot be so is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from torch import Tensor, nn

from compress import pipeline
from compress.errors import CompressError
from compress.export import runtime
from compress.export.table import KINDS
from compress.model.model import open_model
from compress.state import State
from tests.conftest import FAMILIES, GROUPED, IDS, SMALL, covered, saved
from tests.cooking import bake, steps

LABELS = {"num_labels": 3}
MODELS: dict[str, tuple[Any, Any]] = {
    "qwen3 tied": (transformers.Qwen3Model, lambda: transformers.Qwen3Config(**SMALL, **GROUPED, **IDS, head_dim=16,
                                                                             tie_word_embeddings=True)),
    "mistral": (transformers.MistralModel, FAMILIES["mistral"]),
    "gemma2": (transformers.Gemma2Model, FAMILIES["gemma2"]),
    "bert": (transformers.BertModel, lambda: transformers.BertConfig(**SMALL)),
    "roberta": (transformers.RobertaModel, FAMILIES["roberta"]),
    "gpt2": (transformers.GPT2Model, FAMILIES["gpt2"]),
    "llama classifier": (transformers.LlamaForSequenceClassification, lambda: transformers.LlamaConfig(**SMALL, **GROUPED, **IDS,
                                                                                                       **LABELS)),
    "xlm-roberta reranker": (transformers.XLMRobertaForSequenceClassification,
                             lambda: transformers.XLMRobertaConfig(**SMALL, pad_token_id=1, num_labels=1)),
    "bert tagger": (transformers.BertForTokenClassification, lambda: transformers.BertConfig(**SMALL, **LABELS)),
}  # fmt: skip


def model_of(folder: Path, name: str) -> Path:
    """A random model without a head for tokens, as a folder."""
    torch.manual_seed(0)
    kind, config = MODELS[name]
    return saved(folder, kind(config()))


def outputs(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        model(input_ids=ids)  # stock transformers unpacks in the first pass
        return model(input_ids=ids)[0].float()


def filled(source: Path, kind: Any, state: State) -> nn.Module:
    """The original with the artifact's matrices in it."""
    model = kind.from_pretrained(source, dtype=torch.float32).eval()
    prefix = "" if kind is not transformers.AutoModel else f"{model.base_model_prefix}."
    for name, stored in state.codes.items():
        site = state.graph[name]
        module: Any = model.get_submodule(site.module.removeprefix(prefix) if prefix else site.module)
        matrix = stored.load().dequantize(torch.float32)
        module.weight.data.copy_(matrix.T if site.transposed else matrix)
    return model


@pytest.mark.parametrize("name", covered(MODELS, "bert"))
def test_an_artifact_is_the_model_as_its_users_load_it(name: str, text: Path, tmp_path: Path) -> None:
    source, ids = model_of(tmp_path / "model", name), torch.randint(3, 250, (1, 20), generator=torch.Generator().manual_seed(1))
    kind = MODELS[name][0]
    made = bake(tmp_path / "run", source, text, "compressed_tensors native", {"quantize": {"format": "int4:g32"}})
    for exporter, (folder, proof) in made.artifacts.items():
        reader = next(k for k in KINDS if k.name == exporter)
        state = reader.read(folder)
        assert len(state.codes) == len(state.graph.linear)
        wanted = outputs(filled(source, kind, state), ids)
        through = [runtime.load(folder, dtype=torch.float32)]
        if exporter == "compressed_tensors" and name != "gpt2":  # whose matrices stock transformers passes over, as it is told
            assert proof.engine == "transformers"
            through.append(kind.from_pretrained(folder, dtype=torch.float32).eval())
            bare, said = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not [key for key in said["missing_keys"] if "pooler" not in key]
            hidden = outputs(filled(source, transformers.AutoModel, state), ids)
            torch.testing.assert_close(outputs(bare.eval(), ids), hidden, atol=1e-4, rtol=1e-4)
        for model in through:
            assert type(model) is kind
            torch.testing.assert_close(outputs(model, ids), wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["mistral", "xlm-roberta reranker"])
@pytest.mark.parametrize("exporter", ["gptq", "gguf", "onnx"])
def test_kinds_that_hold_no_such_model_say_so_beforehand(name: str, exporter: str, text: Path, tmp_path: Path) -> None:
    source = model_of(tmp_path / "model", name)
    with pytest.raises(CompressError, match=r"predicts no tokens|are not written, only") as caught:
        bake(tmp_path / "run", source, text, exporter, {"quantize": {"format": "int4:g32", "method": "rtn"}})
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run" / "out").exists()


@pytest.mark.slow
def test_what_the_user_is_told(text: Path, tmp_path: Path) -> None:
    source = model_of(tmp_path / "model", "mistral")
    made = bake(tmp_path / "run", source, text, "compressed_tensors", {"quantize": {"format": "int4:g32", "method": "rtn"}})
    card = (made.artifacts["compressed_tensors"][0] / "README.md").read_text()
    assert 'AutoModel.from_pretrained("THIS_FOLDER")' in card
    assert "vllm" not in card.lower()
    assert any("predicts no tokens" in remark for remark in pipeline.plan(tmp_path / "run" / "recipe.yaml").remarks)
    assert not open_model(str(source)).graph.causal


@pytest.mark.slow
def test_a_causal_artifact_loads_without_its_head(baked: Any) -> None:
    """AutoModel, by which embedders are made of language models, finds every matrix."""
    for name in ("llama", "mixtral", "roberta"):
        made = baked(name, "compressed_tensors", steps("int4:g32"))
        _, said = transformers.AutoModel.from_pretrained(made.artifacts["compressed_tensors"][0], output_loading_info=True)
        assert not [key for key in said["missing_keys"] if "pooler" not in key]


@pytest.mark.slow
def test_an_artifact_whose_targets_miss_the_model_without_a_head_is_not_kept(
    family: Any, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.export.compressed_tensors.exporter.base_prefix", lambda config: "")
    path = tmp_path / "run" / "recipe.yaml"
    with pytest.raises(CompressError, match=r"AutoModel, which embedders are loaded by, does not find 'layers\.0\..*not kept"):
        bake(tmp_path / "run", family("llama"), text, "compressed_tensors", {"quantize": {"format": "int4:g32"}})
    content = yaml.safe_load(path.read_text()) | {"data": {"evaluation": {"text": str(text), "sequences": 2, "length": 32}}}
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(CompressError, match="not kept"):
        pipeline.run(path, ["quantize.method=rtn"])
    assert not (tmp_path / "run" / "out" / "compressed_tensors").exists()


@pytest.mark.slow
def test_the_names_of_a_checkpoint_are_kept(text: Path, tmp_path: Path) -> None:
    source = model_of(tmp_path / "model", "qwen3 tied")
    made = bake(tmp_path / "run", source, text, "compressed_tensors", {"quantize": {"format": "int4:g32", "method": "rtn"}})
    config = json.loads((made.artifacts["compressed_tensors"][0] / "config.json").read_text())
    assert config["architectures"] == ["Qwen3Model"]
    assert all(site.weight.startswith("layers.") for site in made.state.graph.linear)
