"""llama.cpp's blocks through the house: recipes, budgets, artifacts, engines, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from compress import pipeline
from compress.export.gguf import reader as gguf_reader
from compress.export.gguf.file import FILE, read_file
from compress.formats.ggml import TYPES
from compress.model.data import Windows, read
from compress.state.plan import UNITS
from tests.conftest import covered, make_model
from tests.cooking import bake, multiplies_as_its_matrices_do, recipe, refused
from tests.test_native import same_state

pytest.importorskip("gguf", reason="the package gguf, which has the points of vector codes, is not installed")
KINDS = [*TYPES]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with whole blocks of 256 inputs, two layers of seven matrices: one for each kind."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 272}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, bos_token_id=256, eos_token_id=257, pad_token_id=258)
    return make_model(tmp_path_factory.mktemp("wide"), config)


def pins(first: int = 0) -> dict[str, str]:
    """Every kind, by turns, on the matrices of two layers."""
    names = [f"layers.{i}.{m}" for i in range(2) for m in
             ("attn.q", "attn.k", "attn.v", "attn.o", "mlp.gate", "mlp.up", "mlp.down")]  # fmt: skip
    return {name: KINDS[(first + i) % len(KINDS)] for i, name in enumerate(names)}


@pytest.mark.parametrize("method", covered(["gptq", "rtn"], "gptq"))
def test_every_kind_is_written_and_read_back_and_multiplied_with(model: Path, text: Path, tmp_path: Path, method: str) -> None:
    """Both artifacts are proven by their engines, transformers and our runtime, which is what a run that ends means."""
    tables = {"embed": "q6_k" if method == "gptq" else "iq3_s", "lm_head": "q4_k" if method == "gptq" else "iq2_xs"}
    done = bake(tmp_path, model, text, "gguf native", {"quantize": {"method": method, "pins": {**pins(), **tables}}})
    folder = done.artifacts["gguf"][0]
    kinds = {tensor.kind.name.lower() for tensor, _ in read_file(folder / FILE).tensors.values()}
    assert kinds >= set(KINDS)
    for name in ("gguf", "native"):
        assert done.artifacts[name][1].engine, f"{name}: {done.artifacts[name][1]}"
    same_state(done.state, gguf_reader.read(folder))
    multiplies_as_its_matrices_do(done.artifacts["native"][0], 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("budget", covered(["0.5 MiB", "28 %"], "0.5 MiB"))
def test_a_budget_of_the_file_is_that_of_the_artifact_asked_for(model: Path, text: Path, tmp_path: Path, budget: str) -> None:
    """A GGUF file has keys and a vocabulary that a checkpoint has not; the budget covers them, and is used."""
    formats = ["iq2_xs", "q4_k", "int8:g32"]
    allocate = {"budget": budget, "formats": formats, "also": ["embed", "lm_head"], "probe": 64}
    done = bake(tmp_path, model, text, "gguf", {"allocate": allocate}, {"quantize": {}})
    size = (done.artifacts["gguf"][0] / FILE).stat().st_size
    most = 0.5 * UNITS["MiB"] if "MiB" in budget else 0.28 * (model / "model.safetensors").stat().st_size
    assert 0.97 * most < size <= most


@pytest.mark.slow
def test_formats_that_grow_in_blocks_cost_the_others_nothing(model: Path, text: Path, tmp_path: Path) -> None:
    """int3:g32 takes 4.5 bits in a GGUF file; a budget that q2_k alone keeps is neither refused nor passed for it."""
    path = recipe(tmp_path, model, text)
    formats = ["q2_k", "int3:g32"]
    allocate = {"budget": "0.42 MiB", "formats": formats, "also": ["embed", "lm_head"], "probe": 64}
    content = {"passes": [{"allocate": allocate}, {"quantize": {}}], "export": [{"gguf": {}}]}
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | content))
    assert pipeline.plan(path).layouts["gguf"].nbytes <= 0.42 * UNITS["MiB"]


@pytest.mark.parametrize(("passes", "says"), [
    ([{"quantize": {"method": "learned", "format": "q4_k"}}], "which is not learned"),
    ([{"quantize": {"method": "learned", "format": "iq2_s"}}], "which is not learned"),
    ([{"quantize": {"format": "q4_k"}}, {"distill": {"train": "scales"}}], "which is not trained"),
    ([{"factorize": {"rank": 8}}, {"quantize": {"format": "q2_k"}}], "give its factors a format with a grid"),
    ([{"lqlora": {"format": "iq2_xs", "rank": 4}}], "low-rank factors go with a quantized matrix"),
])  # fmt: skip
def test_what_does_not_go_with_blocks_is_refused(
    model: Path, text: Path, tmp_path: Path, passes: list[dict[str, Any]], says: str
) -> None:
    refused(tmp_path, model, text, passes, says)


@pytest.mark.parametrize(("exporter", "form"), [("compressed_tensors", "q4_k"), ("gptq", "iq2_xs"), ("onnx", "iq2_xs")])
def test_other_exporters_refuse_them_in_plan(model: Path, text: Path, tmp_path: Path, exporter: str, form: str) -> None:
    path = recipe(tmp_path, model, text, format=form)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"export": [{exporter: {}}]}))
    with pytest.raises(Exception, match=r"blocks of llama\.cpp's, and no engine of this layout reads those"):
        pipeline.plan(path)


def test_narrow_matrices_are_named_with_what_fits(text: Path, tmp_path: Path, family: Any) -> None:
    refused(tmp_path, family("llama"), text, [{"quantize": {"format": "q4_k"}}],
            "blocks of 256 do not divide 64 inputs; those of 32 do: iq4_nl, q4_1, q5_1")  # fmt: skip


@pytest.mark.slow
def test_a_gradient_goes_through_them(model: Path, text: Path, tmp_path: Path) -> None:
    """An adapter on a packed matrix learns: its input's gradient is the product with the matrix."""
    from compress.export.runtime import load

    done = bake(tmp_path, model, text, "native", {"quantize": {"method": "rtn", "pins": pins()}})
    packed = load(done.artifacts["native"][0], dtype=torch.float32).get_submodule("model.layers.0.self_attn.o_proj")
    x = torch.randn(2, 256, requires_grad=True)
    packed(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, packed.weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_importance_is_the_mean_square_of_inputs_and_lies_beside_the_file(model: Path, text: Path, tmp_path: Path) -> None:
    """Against a plain forward pass; in the layout of llama.cpp's own, and refused where no exporter has a place for it."""
    done = bake(tmp_path, model, text, "gguf", {"importance": {}})
    found = read_file(done.artifacts["gguf"][0] / "imatrix.gguf")
    plain = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    plain.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    ids = Windows(text=str(text), sequences=6, length=32)
    with torch.no_grad():
        for window in read(ids, model, tmp_path, 272).ids:
            plain(window[None])
    squares = torch.cat(seen).square().sum(0)
    ours = found.read("blk.1.ffn_down.weight.in_sum2").view(torch.float32).flatten()
    torch.testing.assert_close(ours, squares, rtol=0.05, atol=0.05 * float(squares.mean()))  # blocks may compute in bf16
    assert float(found.read("blk.1.ffn_down.weight.counts").view(torch.float32)) == 6 * 32
    assert found.metadata["general.type"] == "imatrix"
    path = recipe(tmp_path / "other", model, text)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"passes": [{"importance": {}}]}))
    with pytest.raises(Exception, match="has no place for what an engine must know"):
        pipeline.plan(path)


@pytest.mark.parametrize(
    "later", [{"prune": {"mlp": 0.5}}, {"rotate": {}}, {"edit": {"drop_layers": [0]}}, {"depth": {"drop": 1}}]
)
def test_importance_of_a_model_that_is_changed_behind_it_is_refused(
    model: Path, text: Path, tmp_path: Path, later: dict[str, Any]
) -> None:
    (name,) = later
    refused(tmp_path, model, text, [{"importance": {}}, later], f"'{name}' behind it changes that; move it behind '{name}'")
