"""A policy of the KV cache: which entries stay, that what goes is freed, and that what is computed is what a mask would give."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compress import pipeline
from compress.cache import rules
from compress.cache.policy import FILE, SERVED, Layer, Policy, Unit, read
from compress.cli import main
from compress.errors import CompressError, ModelError
from compress.export.artifact.place import MARK
from compress.export.native import reader
from compress.export.runtime import cache as runtime
from compress.export.runtime import load
from compress.model import attention
from compress.model.marks import Marks, marked, punctuation
from compress.model.model import open_model
from compress.passes import kv_policy_core as core
from tests.conftest import covered
from tests.cooking import bake, recipe, refused, steps
from tests.masked import NEW, PROMPT, both_caches, by_hand, causal, looking, model_of, text_of

MARKED = (256, 257, 258, *map(ord, ".,;:!?\n"))
RULES = [("stream", 250), ("snap", 300), ("h2o", 400), ("heavy", 300), ("punct", 350), ("frequent", 500), ("full", 1000)]


def policy_for(folder: Path, dtype: str = "fp32") -> Policy:
    """Every rule on some head, at shares of their own."""
    found, layers, number = attention.heads(open_model(str(folder)).state), [], 0
    for each in found:
        units = [Unit(*RULES[(number + u) % len(RULES)], dtype) for u in range(each.units)]
        layers.append(Layer(each.layer, each.width, each.sliding, tuple(units)))
        number += each.units
    return Policy(tuple(layers), MARKED, 2048, 1)


# --- rules ------------------------------------------------------------------------------------------------------------


@given(st.sampled_from(rules.RULES), st.integers(1, 1000), st.integers(1, 200), st.integers(0, 3))
@settings(max_examples=20, deadline=None)
def test_a_rule_keeps_so_many_entries_the_first_and_the_latest_among_them(rule: str, share: int, tokens: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    many, place = rules.count(share, tokens), torch.arange(tokens)
    kept = rules.kept(rule, many, place, tokens, 0, torch.rand(tokens, generator=draw), torch.rand(tokens, generator=draw) > 0.8)
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert len(kept) == many >= min(tokens, rules.LEAST)
    assert many >= share * tokens / 1000
    assert {0, tokens - 1} <= set(kept.tolist()), "a sink, and the latest"


def test_rules_keep_what_they_are_named_for() -> None:
    place = torch.arange(100)
    score, mark = torch.zeros(100), torch.zeros(100, dtype=torch.bool)
    score[[30, 50]], mark[[40, 41]] = 5.0, True
    keep = lambda rule: set(rules.kept(rule, 20, place, 100, 0, score, mark).tolist())  # noqa: E731
    assert keep("stream") == {0, 1, 2, 3, *range(84, 100)}
    assert {30, 50} <= keep("h2o")
    assert {30, 50} <= keep("heavy") - keep("stream")
    assert {28, 29, 30, 31, 32} <= keep("snap"), "neighbours of what is looked at"
    assert {40, 41} <= keep("punct") - keep("h2o")
    assert {30, 40, 41, 50} <= keep("frequent")


@pytest.mark.parametrize("last", [None, 7])
def test_mass_is_the_sum_of_attention(last: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "BLOCK", 16)
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 8), torch.randn(50, 8)
    logits = (q @ k.T * 0.3).masked_fill(torch.ones(50, 50).triu(1).bool(), -torch.inf)
    wanted = logits.softmax(-1)[:, 0 if last is None else -last :].sum((0, 1))
    assert torch.allclose(rules.mass(q, k, 0.3, None, last), wanted, atol=1e-6)


def test_codes_are_as_near_as_eight_bits_allow() -> None:
    x = torch.randn(40, 32) * torch.logspace(-3, 2, 40)[:, None]
    off = (rules.stored(x, "int8") - x).abs().amax(-1) / x.abs().amax(-1)
    assert float(off.max()) < 0.005
    assert rules.entry_bytes("int8", "stream", 32) == 2 * 32 + 4 + 4


def test_punctuation_is_told_as_vocabularies_write_it(family: Any) -> None:
    assert all(map(punctuation, ["Ġ.", "▁,", "!?", "Ċ", "\n", "<0x0A>"]))
    assert not any(map(punctuation, ["Ġ", "a.", "▁the", "<s>", ""]))
    found = marked(family("llama"))
    assert {256, 257, 258} <= set(found.special) < set(found.every)
    assert marked(family("llama"), (3, 13, 257, 258)) == Marks((2, 3), (1, 2, 3)), "13 is a full stop"


# --- the cache, against masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered(["llama", "gemma3", "gpt2", "phi3", "opt", "mistral", "qwen3", "mixtral"], "gemma3"))
def test_the_cache_computes_what_masks_would(family: Any, name: str) -> None:
    """Logits through the cache, token by token and in longer passes, are those of the whole text with a mask for each head; and
    `generate` writes this text."""
    policy = policy_for(family(name))
    model, ids = model_of(family(name), policy), text_of(1, PROMPT)
    with torch.no_grad():
        made, logits, seen, _ = by_hand(model, ids, [1] * NEW)
        assert torch.equal(model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None), made)
        longer = by_hand(model, ids, [1, 20, 7, 10, 2])
        plain = model_of(family(name))
        plain.set_attn_implementation("compress_oracle")
        for text, found, looked in ((made, logits, seen), (longer[0], longer[1], longer[2])):
            with looking(looked):
                wanted = plain(text, use_cache=False).logits[:, PROMPT - 1 : -1]
            assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.abs().max())
            assert any(not torch.equal(mask, causal(len(mask), None)) for mask in looked.values())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", covered(["fp32", "int8"], "int8"))
def test_the_cache_takes_the_bytes_that_were_foretold(family: Any, dtype: str) -> None:
    policy = policy_for(family("llama"), dtype)
    model, ids = model_of(family("llama"), policy), text_of(2, PROMPT)
    cache = model(ids).past_key_values
    assert cache.nbytes == 2 * policy.nbytes(PROMPT)
    for token in range(1, 2 * rules.STEP + 2):
        model(ids[:, :1], past_key_values=cache)
        ranked = PROMPT + token - token % rules.STEP
        assert cache.nbytes == 2 * policy.nbytes(ranked), "after every step what is foretold, and in between no more"
        assert all((layer.tail["k"].shape[2] if layer.tail else 0) == token % rules.STEP for layer in cache.layers)
    assert cache.get_seq_length() == PROMPT + 2 * rules.STEP + 1


@pytest.mark.slow
@pytest.mark.parametrize("name", covered(["llama", "gemma3"], "llama"))
def test_a_row_that_is_padded_reads_as_it_does_alone(family: Any, name: str) -> None:
    model, ids = model_of(family(name), policy_for(family(name))), text_of(2, PROMPT)
    mask = torch.ones_like(ids)
    ids[0, :17], mask[0, :17] = 258, 0
    both = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258)
    for row in range(2):
        mine = ids[row : row + 1, mask[row].bool()]
        alone = model.generate(mine, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=258)
        assert torch.equal(alone[0, mine.shape[1] :], both[row, PROMPT:])


def test_what_would_need_dropped_entries_is_refused(family: Any) -> None:
    model, ids = model_of(family("llama"), policy_for(family("llama"))), text_of(1, 20)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"num_beams": 2}, "use num_beams=1"),
        ({"assistant_model": model_of(family("llama"))}, "no assistant"),
        ({"prompt_lookup_num_tokens": 3}, "no assistant"),
        ({"cache_implementation": "static"}, "leave cache_implementation out"),
        ({"past_key_values": transformers.DynamicCache()}, "not a DynamicCache; leave past_key_values out"),
    ]
    for options, says in cases:
        with pytest.raises(ModelError, match=says) as caught:
            model.generate(ids, max_new_tokens=4, do_sample=False, **options)
        assert "\n" not in str(caught.value)
    punct = model_of(family("llama"), replace(model.kv_policy, layers=tuple(
        replace(layer, units=(Unit("punct", 300, "fp32"),) * len(layer.units)) for layer in model.kv_policy.layers)))  # fmt: skip
    with pytest.raises(ModelError, match="give input_ids"):
        punct(inputs_embeds=punct.get_input_embeddings()(ids))
    punct.set_attn_implementation("sdpa")
    with pytest.raises(ModelError, match="'sdpa' was put in the place of its attention after loading"):
        punct.generate(ids, max_new_tokens=1)
    cache = model(ids).past_key_values
    for call in (lambda: cache.crop(-1), lambda: cache.reorder_cache(torch.tensor([0])), cache.activate_past_recording,
                 lambda: cache.batch_repeat_interleave(2), lambda: cache.batch_select_indices(torch.tensor([0]))):  # fmt: skip
        with pytest.raises(ModelError, match=r"kv_policy\.json"):
            call()
    with pytest.raises(ModelError, match="was given 2"):
        model(ids.repeat(2, 1), past_key_values=cache)
    with pytest.raises(ModelError, match="load it without that option"):
        runtime.follow(
            transformers.AutoModelForCausalLM.from_pretrained(family("llama"), attn_implementation="eager"), model.kv_policy
        )


def test_without_a_policy_again_it_is_the_model_that_it_was(family: Any) -> None:
    model, ids = model_of(family("llama"), policy_for(family("llama"))), text_of(1, PROMPT)
    wanted = model_of(family("llama")).generate(ids, max_new_tokens=20, do_sample=False)
    model.kv_policy = None
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), wanted)
    assert isinstance(model(ids).past_key_values, transformers.DynamicCache)


def test_a_model_without_a_head_follows_a_policy_too(family: Any) -> None:
    policy, base = policy_for(family("llama")), transformers.AutoModel.from_pretrained(family("llama"))
    runtime.follow(base, policy)
    assert base(text_of(1, PROMPT)).past_key_values.nbytes == policy.nbytes(PROMPT)


# --- what is measured, and chosen -----------------------------------------------------------------------------------------


def test_damage_is_the_error_of_the_outputs_of_a_layer() -> None:
    """Against attention by a mask, head by head, and the output matrix."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    W, columns = torch.randn(24, 32), torch.arange(32).view(2, 16)
    a = attention.Attended(0, q, k, v, None, 0.4)
    layer = attention.Heads(0, 2, 8, None, None, columns)  # type: ignore[arg-type]
    options = core.options_of(["snap", "stream", "full"], ["fp32", "int8"])
    found, whole = core.damages(a, layer, W, 30, options, torch.zeros(1, 40, dtype=torch.bool))

    def outputs(unit: int | None, option: Unit | None) -> Tensor:
        heads = []
        for h in range(4):
            keys, values, allowed = k[0, h // 2], v[0, h // 2], torch.ones(40, 40).tril().bool()
            if unit == h // 2 and option:
                mine = q[0, 2 * unit : 2 * unit + 2, :30]
                scores = rules.scores({option.rule}, mine, keys[:30], 0.4, None)
                kept = rules.after_prompt(option.rule, rules.count(option.share, 30), torch.arange(30), 30, scores, None)
                gone = torch.ones(40, dtype=torch.bool)
                gone[[*kept.tolist(), *range(30, 40)]] = False
                allowed[30:, gone] = False
                keys, values = (torch.cat([rules.stored(x[:30], option.dtype), x[30:]]) for x in (keys, values))
            heads.append((q[0, h] @ keys.T * 0.4).masked_fill(~allowed, -torch.inf).softmax(-1) @ values)
        return torch.cat(heads, -1)[30:] @ W.T

    exact = outputs(None, None)
    assert whole == pytest.approx(float(exact.square().sum()), rel=1e-4)
    for unit in range(2):
        wanted = [float((outputs(unit, o) - exact).square().sum()) for o in options]
        assert np.allclose(found[unit].numpy(), wanted, rtol=1e-3, atol=1e-4 * whole)
    assert float(found[:, options.index(Unit("full", 1000, "fp32"))].abs().max()) < 1e-8 * whole


def test_the_choice_is_the_best_of_all() -> None:
    draw = np.random.default_rng(0)
    damage, nbytes = draw.random((3, 4)), draw.integers(1, 20, (3, 4))
    every = np.stack(np.meshgrid(*[range(4)] * 3), -1).reshape(-1, 3)
    cost = lambda choice, table: sum(table[i, c] for i, c in enumerate(choice))  # noqa: E731
    best = min(cost(c, damage) for c in every if cost(c, nbytes) <= 25)
    assert cost(core.choose(list("abc"), damage, nbytes, 25).choice, damage) == pytest.approx(best)


STEP = {"kv_policy": {"budget": "60 %", "context": 64, "continuation": 8}}


@pytest.fixture(scope="module")
def made(family: Any, text: Path, tmp_path_factory: pytest.TempPathFactory) -> pipeline.Outcome:
    """A quantized llama with a policy, evaluated."""
    folder = tmp_path_factory.mktemp("cache")
    path = recipe(folder, family("llama"), text)
    content = yaml.safe_load(path.read_text()) | {"passes": [steps("int8:g32"), STEP], "export": [{"native": {}}]}
    content["data"]["evaluation"] = {"text": str(text), "sequences": 4, "length": 64}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return pipeline.run(path)


def test_the_artifact_brings_its_policy(made: pipeline.Outcome) -> None:
    """from_pretrained and generate as ever."""
    artifact, proof = made.artifacts["native"]
    assert proof.remark == "compared in fp32"
    policy = read(json.loads((artifact / FILE).read_text()), "file")
    assert reader.read(artifact).serving == {SERVED: policy.json()} == made.state.serving
    assert policy.nbytes(64) <= 0.6 * policy.full
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(artifact, dtype=torch.float32), text_of(1, 40)
    out = model.generate(ids, max_new_tokens=6, do_sample=False, return_dict_in_generate=True)
    assert isinstance(out.past_key_values, runtime.PolicyCache)
    assert out.past_key_values.nbytes == policy.nbytes(40)
    told = made.scores["cache"]
    assert told["kl"] > 0
    assert told["bytes"] == policy.nbytes(told["prompt"]) < told["full"]
    assert "KL of the cache (nats)" in made.report.summary()


@pytest.mark.slow
def test_eval_tells_of_the_cache(made: pipeline.Outcome, text: Path, capsys: Any) -> None:
    main(["eval", str(made.artifacts["native"][0]), "--text", str(text), "--sequences", "4", "--length", "64", "--json"])
    assert json.loads(capsys.readouterr().out)["cache"]["tokens"] == made.scores["cache"]["tokens"]


@pytest.mark.slow
def test_a_model_with_a_policy_is_not_saved_without_it(family: Any, text: Path, tmp_path: Path) -> None:
    model = load(bake(tmp_path, family("llama"), text, "native", STEP).artifacts["native"][0])
    with pytest.raises(ModelError, match="is not saved again: copy the folder"):
        model.save_pretrained(tmp_path / "saved")


def test_inspect_tells_of_the_cache(made: pipeline.Outcome, capsys: Any) -> None:
    assert main(["inspect", str(made.artifacts["native"][0])]) == 0
    assert "cache: a policy of 2 layers; at 64 tokens " in capsys.readouterr().out


def test_our_engine_and_our_stream_agree_on_the_cache(made: pipeline.Outcome) -> None:
    ours, theirs = both_caches(made)
    assert ours.kl == pytest.approx(theirs.kl, rel=1e-3)
    assert (ours.tokens, ours.prompt, ours.bytes) == (theirs.tokens, theirs.prompt, theirs.bytes)


@pytest.mark.slow
def test_another_budget_measures_nothing(made: pipeline.Outcome, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "damages", lambda *_: pytest.fail("is measured again"))
    path = made.out.parent / "recipe.yaml"
    other = path.with_name("other.yaml")
    other.write_text(path.read_text().replace("60 %", "40 %"))
    assert pipeline.run(other, until="kv_policy").state.serving[SERVED]["bytes"] <= 0.4 * made.state.serving[SERVED]["full"]


@pytest.mark.slow
def test_policies_are_for_native_alone_and_for_models_with_heads(family: Any, text: Path, tmp_path: Path) -> None:
    for exporter in ("compressed_tensors", "gguf", "gptq", "onnx"):
        with pytest.raises(CompressError, match=rf"{exporter} has no place for a policy of the KV cache.* export native"):
            bake(tmp_path / exporter, family("llama"), text, exporter, STEP)
    cases: list[tuple[str, list[dict[str, Any]], str]] = [
        ("llama", [STEP, STEP], "'kv_policy' behind it changes that"),
        ("llama", [STEP, {"prune": {"mlp": 0.5}}], "'prune' behind it changes that"),
        ("llama", [STEP, steps("int8:g32")], "'quantize' behind it changes that; move it behind 'quantize'"),
        ("llama", [STEP, {"factorize": {"rank": 4}}], "'factorize' behind it changes that"),
        ("llama", [STEP, {"sparsify": {}}], "'sparsify' behind it changes that"),
        ("llama", [{"kv_cache": {}}, steps("int8:g32")], "'kv_cache' measures .* and 'quantize' behind it changes that"),
        ("llama", [{"sparsify": {}}, steps("int8:g32")], "Move 'quantize' before 'sparsify'"),
        ("llama", [{"kv_policy": {**STEP["kv_policy"], "budget": "2 %"}}], "no choice of these rules fits"),
        ("llama", [{"kv_policy": {**STEP["kv_policy"], "budget": 0.5}}], "0.5 is no budget; write '50 %' or '40 MiB'"),
        ("gemma2", [STEP], "chunked or soft-capped"),
        ("roberta", [STEP], "has no cache"),
        ("llama", [{"kv_cache": {}}, STEP], "an earlier 'kv_cache' rounds them"),
        ("llama", [STEP, {"kv_cache": {}}], "an earlier 'kv_policy' decides what entries are stored in"),
        ("llama", [{"kv_policy": {"continuation": 40}}], "windows have 32; ask for 80 or more, or lower 'continuation'"),
        (
            "llama",
            [{"kv_policy": {"method": "uniform", "rules": ["snap"], "budget": "1 %", "context": 64}}],
            "no share of 'snap' fits .* smallest",
        ),
    ]
    for i, (name, passes, says) in enumerate(cases):
        refused(tmp_path / str(i), family(name), text, passes, says)


@pytest.mark.slow
def test_windows_with_nothing_to_foretell_behind_a_prompt_are_refused_by_plan(family: Any, text: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, family("llama"), text)
    content = yaml.safe_load(path.read_text()) | {"passes": [STEP], "export": []}
    for length, refuses in ((3, True), (4, False)):
        content["data"]["evaluation"] = {"text": str(text), "sequences": 2, "length": length}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        with pytest.raises(CompressError, match=r"recipe.yaml:\d+:\d+  windows of 3 tokens") if refuses else nullcontext():
            pipeline.run(path)


def test_a_damaged_or_missing_policy_is_refused(made: pipeline.Outcome, tmp_path: Path) -> None:
    held = json.loads((made.artifacts["native"][0] / FILE).read_text())
    changes = [
        ({"version": 3}, "upgrade compress-pipeline"),
        ({"version": 2}, "is damaged"),
        ({"layers": []}, "names a layer twice, or none"),
        ({"layers": [{"layer": 0}]}, "is damaged"),
        ({"marked": ["a"]}, "is damaged"),
        ({"context": -1}, "is damaged"),
        ({"layers": [{**held["layers"][0], "units": [["snap", 2.0, "bf16"]]}]}, "is damaged"),
    ]
    for change, says in changes:
        with pytest.raises(ModelError, match=says):
            read({**held, **change}, "here")
    folder = Path(shutil.copytree(made.artifacts["native"][0], tmp_path / "copy"))
    (folder / MARK).unlink()
    for change, says in (
        ({"layers": held["layers"][:1]}, "says of layer 1 nothing"),
        (
            {"layers": [*held["layers"], {**held["layers"][0], "layer": 10**9}]},
            "says of layer 1000000000 .* the model has nothing",
        ),
        (
            {"layers": [{**held["layers"][0], "sliding": 8}, held["layers"][1]]},
            "says of layer 0 .*a window of 8, and .* no window",
        ),
        ({"marked": [10**30]}, "is damaged"),
    ):
        (folder / FILE).write_text(json.dumps({**held, **change}))
        for way in (reader.read, load):
            with pytest.raises(ModelError, match=says):
                way(folder)
    (folder / FILE).write_text(json.dumps({**held, "layers": [{**each, "units": each["units"][:1]} for each in held["layers"]]}))
    with pytest.raises(ModelError, match="says of layer 0 1 heads of 16 and no window, and the model has 2 heads of 16"):
        reader.read(folder)
    (folder / FILE).unlink()
    for way in (reader.read, load):
        with pytest.raises(ModelError, match="is missing, and asked for by config"):
            way(folder)
