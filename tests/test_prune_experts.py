"""`prune: {experts: ...}`: a smaller mixture, of experts that are the source's bit for bit, which every engine loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from compress.errors import CompressError, RecipeError
from compress.export.artifact.proof import logits
from compress.model.experts import Routing
from compress.model.model import Model, open_model
from compress.passes.prune import Prune
from compress.passes.prune_experts import alike
from compress.state import State
from tests.conftest import FAMILIES, GROUPED, IDS, SMALL, Project, covered, make_model, rare
from tests.cooking import bake
from tests.pass_laws import TOKENS, attempt, check_pass
from tests.stock import load as load_stock

MORE: dict[str, Any] = {
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_hidden_layers": 3}, **IDS, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=6,
        num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, kv_lora_rank=16,
        q_lora_rank=24, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **SMALL, **GROUPED, **IDS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64,
        shared_expert_intermediate_size=64),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **SMALL, **GROUPED, **IDS, head_dim=16, moe_num_experts=4, moe_k=2, moe_intermediate_size=64, moe_num_shared_experts=1),
    "olmoe": lambda: transformers.OlmoeConfig(**SMALL, **GROUPED, **IDS, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SMALL, **GROUPED, **IDS, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip
MIXTURES = ("mixtral", "qwen3_moe", *(name for name in MORE if name not in ("gpt_oss", "olmoe")))


def made(folder: Path, name: str, **save: Any) -> Model:
    """A mixture in fp32, with learnt corrections of its router's scores where it has such."""
    make_model(folder, (FAMILIES | MORE)[name](), torch.float32, **save)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(2)
    for key in (key for key in tensors if key.endswith("e_score_correction_bias")):
        tensors[key] = 0.1 * torch.randn(tensors[key].shape, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_model(str(folder))


def joined(folder: Path, model: Model) -> Model:
    """The same checkpoint with all experts of a block in one tensor."""
    tensors, graph = load_file(model.folder / "model.safetensors"), model.state.graph
    for site in [s for s in graph if s.expert == 0 and s.role != "up"]:
        roles, experts = ("gate", "up") if site.role == "gate" else ("down",), range(len({s.expert for s in graph} - {None}))
        names = [[graph[f"layers.{site.block}.experts.{e}.{role}"].weight for role in roles] for e in experts]
        tensors[site.joined] = torch.stack([torch.cat([tensors.pop(name) for name in mine]) for mine in names])
    folder.mkdir()
    for file in model.folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return open_model(str(folder))


def pruned(folder: Path, model: Model, **options: Any) -> tuple[State, dict[int, dict[str, Any]]]:
    """The state after the pass, and what it noted of every block's experts."""
    state = attempt(Prune.model_validate(options), model, folder / "steps")
    noted = [r for r in json.loads(next(folder.glob("steps/*/record.json")).read_text())["sites"] if r["kind"] == "experts"]
    return state, {int(r["site"].split(".")[1]): r for r in noted}


class Masked(TorchFunctionMode):
    """Inside, some rows of some matrices give minus infinity."""

    def __init__(self, rows: Sequence[tuple[Tensor, list[int]]]):
        super().__init__()
        self.rows = {weight.data_ptr(): rows for weight, rows in rows}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.nn.functional.linear and args[1].data_ptr() in self.rows:
            return out.index_fill(-1, torch.tensor(self.rows[args[1].data_ptr()]), -torch.inf)
        return out


def router(stock: Any, block: int) -> Any:
    """What chooses the experts of a block: the module with a row for each, beside them."""
    mlp = (
        stock.model.layers[block].mlp if hasattr(stock.model.layers[block], "mlp") else stock.model.layers[block].block_sparse_moe
    )
    return mlp.gate


@torch.no_grad()
def cannot_win(stock: Any, block: int, gone: list[int]) -> None:
    """Of a router that adds a learnt correction: minus infinity there as well."""
    for name, tensor in stock.model.layers[block].state_dict().items():
        if name.endswith("e_score_correction_bias"):
            tensor.index_fill_(-1, torch.tensor(gone), -torch.inf)


@pytest.mark.parametrize("layout", covered(["apart", "joined"], "joined"))
@pytest.mark.parametrize("name", covered(MIXTURES, "mixtral"))
def test_what_stays_is_the_sources_bit_for_bit(tmp_path: Path, name: str, layout: str) -> None:
    model = made(tmp_path / "model", name)
    if layout == "joined":
        model = joined(tmp_path / "joined", model)
    state, noted = pruned(tmp_path, model, experts=0.5)
    count = len(next(iter(noted.values()))["experts"])
    assert count == len(next(iter(noted.values()))["scores"]) // 2
    for site in state.graph.linear:
        old = site if site.expert is None else model.state.graph[
            f"layers.{site.block}.experts.{noted[site.block or 0]['experts'][site.expert]}.{site.role}"]  # fmt: skip
        assert torch.equal(state.reference(site), model.state.reference(old)), site.name
    for spec in (s for s in state.specs if ".experts." not in s.name):
        ours, theirs = state.dense.read(spec.name), model.state.dense.read(spec.name)
        if ours.shape != theirs.shape:
            kept = noted[int(spec.name.split(".")[2])]["experts"]
            theirs = theirs.index_select(
                [a != b for a, b in zip(ours.shape, theirs.shape, strict=True)].index(True), torch.tensor(kept)
            )
            assert "gate" in spec.name or "bias" in spec.name
        assert torch.equal(ours, theirs), spec.name
    assert state.dense.specs.keys() == {s.name for s in state.specs}, "nothing is left of those that went"
    assert not any(f".experts.{count}." in name for name in state.dense.specs)


@pytest.mark.parametrize("name", covered(MIXTURES, "mixtral"))
def test_it_is_the_larger_model_whose_router_cannot_choose_the_others(tmp_path: Path, text: Path, name: str) -> None:
    """As transformers loads both; the smaller one from an artifact, with a cache too."""
    model = made(tmp_path / "model", name)
    done = bake(tmp_path, model.folder, text, "compressed_tensors", {"prune": {"experts": 0.5}})
    place = done.artifacts["compressed_tensors"][0]
    found = {n: tuple(t.shape) for n, t in load_file(place / "model.safetensors").items()}
    assert found == {s.name: s.shape for s in done.state.specs}
    assert "quantization_config" not in json.loads((place / "config.json").read_text())
    smaller, larger = (load_stock(folder, dtype=torch.float32) for folder in (place, model.folder))
    records = json.loads(next(place.parent.glob("steps/*/record.json")).read_text())["sites"]
    masks = []
    for r in records:
        gone = sorted(set(range(r["units"])) - set(r["experts"]))
        block = int(r["site"].split(".")[1])
        masks.append((router(larger, block).weight, gone))
        cannot_win(larger, block, gone)
    with torch.no_grad():
        ours = smaller(input_ids=TOKENS.ids[:2]).logits
        with Masked(masks):
            theirs = larger(input_ids=TOKENS.ids[:2]).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours, logits(done.state, [TOKENS.ids[:2]], "cpu")[0], atol=1e-4, rtol=1e-4)
        cached, plain = (
            smaller.generate(TOKENS.ids[:1, :8], max_new_tokens=5, do_sample=False, use_cache=c) for c in (True, False)
        )
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("name", covered(["mixtral", "qwen3_moe", "deepseek_v3"], "mixtral"))
def test_an_expert_that_nothing_is_sent_to_goes_first_and_changes_nothing(tmp_path: Path, name: str) -> None:
    """Channel 0 of the residual stream is 1 everywhere, and one row of each router reads just that, with -1000."""
    model = made(tmp_path / "model", name)
    tensors = load_file(model.folder / "model.safetensors")
    for key, tensor in tensors.items():
        if "embed" in key:
            tensor[:, 0] = 1.0
        elif key.endswith(("o_proj.weight", "down_proj.weight", "w2.weight")):
            tensor[0] = 0.0
        elif key.endswith("gate.weight"):
            tensor[:, 0] = 0.0
            tensor[1] = 0.0
            tensor[1, 0] = -1000.0
        elif key.endswith("e_score_correction_bias"):
            tensor[1] = -1000.0
    save_file(tensors, model.folder / "model.safetensors", {"format": "pt"})
    model = open_model(str(model.folder))
    units = model.state.config.num_local_experts
    state, noted = pruned(tmp_path, model, experts=(units - 1) / units)
    for r in noted.values():
        assert r["scores"][1] == 0
        assert r["experts"] == [e for e in range(units) if e != 1]
        assert "1 of them saw no token" in r["notes"][1]
    ours, theirs = (logits(s, [TOKENS.ids], "cpu")[0] for s in (state, model.state))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)  # products of fewer rows are summed otherwise on some machines


@pytest.mark.parametrize("name", covered(["mixtral", "qwen3_moe", "deepseek_v3"], "mixtral"))
def test_scores_are_those_of_the_paper(tmp_path: Path, name: str) -> None:
    """Mean gate times norm over the tokens of each expert, as hooks on stock modules see them behind blocks that are pruned."""
    model = made(tmp_path / "model", name)
    _, noted = pruned(tmp_path / "run", model, experts=0.5)
    stock = load_stock(model.folder, dtype=torch.float32, experts_implementation="eager")
    for block, r in sorted(noted.items()):
        seen: list[tuple[Any, ...]] = []
        experts = next(m for m in stock.model.layers[block].modules() if hasattr(m, "gate_up_proj") and hasattr(m, "num_experts"))
        hook = experts.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args))
        gone = sorted(set(range(r["units"])) - set(r["experts"]))
        earlier = [
            (router(stock, b).weight, sorted(set(range(o["units"])) - set(o["experts"]))) for b, o in noted.items() if b < block
        ]
        with torch.no_grad(), Masked(earlier):
            stock(input_ids=TOKENS.ids)
        hook.remove()
        (x, index, weights) = seen[0]
        for e, score in enumerate(r["scores"]):
            token, slot = torch.where(index == e)
            gate, up = torch.nn.functional.linear(x[token], experts.gate_up_proj[e].detach()).chunk(2, -1)
            y = torch.nn.functional.linear(experts.act_fn(gate) * up, experts.down_proj[e].detach())
            wanted = float((weights[token, slot] * y.norm(dim=-1)).mean()) if len(token) else 0.0
            assert score == pytest.approx(wanted, rel=1e-3), (block, e)
        assert max(r["scores"][e] for e in gone) <= min(r["scores"][e] for e in r["experts"])
        cannot_win(stock, block, gone)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"experts": 0.5},
        *(rare(o) for o in ({"experts": 0.5, "kv_groups": 0.5}, {"experts": 0.75, "method": "magnitude"})),
    ],
)
def test_the_laws_of_passes_hold(family: Any, tmp_path: Path, options: dict[str, Any]) -> None:
    check_pass(Prune.model_validate(options), family("mixtral"), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", covered(["compressed_tensors", "native"], "native"))
def test_heads_and_experts_go_in_one_pass_and_formats_follow(tmp_path: Path, text: Path, kind: str) -> None:
    model = made(tmp_path / "model", "qwen3_moe")
    done = bake(tmp_path, model.folder, text, kind, {"prune": {"experts": 0.5, "kv_groups": 0.5}},
                {"quantize": {"format": "int4:g32"}})  # fmt: skip
    config = done.state.config
    assert (config.num_local_experts, config.num_experts_per_tok, config.num_key_value_heads, config.head_dim) == (2, 2, 1, 16)
    assert done.artifacts[kind][1].difference >= 0


def test_weights_alone_can_say_without_data(tmp_path: Path) -> None:
    """The experts of the least norm go, and nothing is asked of compensation, for which there is none."""
    model = made(tmp_path / "model", "mixtral")
    tensors = load_file(model.folder / "model.safetensors")
    for key in (key for key in tensors if ".experts.0." in key or ".experts.2." in key):
        tensors[key] *= 0.5
    save_file(tensors, model.folder / "model.safetensors", {"format": "pt"})
    done = bake(tmp_path, model.folder, None, "native", {"prune": {"experts": 0.5, "method": "magnitude"}})
    for site in done.state.graph.linear:
        if site.expert is not None:
            name = site.name.replace(f"experts.{site.expert}", f"experts.{2 * site.expert + 1}")
            assert torch.equal(done.state.reference(site), open_model(str(model.folder)).state.reference(model.state.graph[name]))


@pytest.mark.slow
def test_layers_that_predict_further_tokens_go_whole(tmp_path: Path) -> None:
    model = made(tmp_path / "model", "deepseek_v3")
    tensors = load_file(model.folder / "model.safetensors")
    tensors |= {k.replace("layers.2.", "layers.3."): t.clone() for k, t in tensors.items() if ".layers.2." in k}
    tensors["model.layers.3.enorm.weight"] = torch.ones(64)
    save_file(tensors, model.folder / "model.safetensors", {"format": "pt"})
    config = json.loads((model.folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (model.folder / "config.json").write_text(json.dumps(config))
    model = open_model(str(model.folder))
    p = Prune(experts=0.5)
    assert list(p.remarks(model.state, p.foresee(model.state)))[:2] == [
        "prune keeps 3 of 6 experts in every layer",
        "prune takes away what predicts further tokens: it has experts of its own, which no text reaches here",
    ]
    state = attempt(p, model, tmp_path / "steps")
    assert not any(".layers.3." in spec.name for spec in state.specs)
    assert state.config.num_nextn_predict_layers == 0


def test_plan_says_what_stays(project: Project, tmp_path: Path) -> None:
    make_model(project.model, FAMILIES["mixtral"]())
    project.edit("passes:\n", "passes:\n  - prune: {experts: 0.5}\n")
    assert "note: prune keeps 2 of 4 experts in every layer" in project.plan().out


@pytest.mark.parametrize(("name", "changes", "options", "says"), [
    ("llama", {}, {"experts": 0.5}, "'llama' has no experts that 'prune' knows; leave 'experts' out"),
    ("gpt_oss", {}, {"experts": 0.5}, "experts of 'gpt_oss' cannot go: how it lays out their matrices is not read"),
    ("mixtral", {}, {"experts": 0.25}, "0.25 of 4 experts are 1, and every token wants 2; keep at least 2 of 4"),
    ("mixtral", {}, {"experts": 0.9}, "0.9 of 4 experts, rounded up, are all of them"),
    ("mixtral", {}, {"experts": 0.5, "mlp": 0.5}, "'mixtral' has no neurons of an MLP that 'prune' knows; leave 'mlp' out"),
    ("olmoe", {}, {"kv_groups": 0.5}, "groups of heads of 'olmoe' cannot go: '.*q_norm.weight' is over all heads together"),
    ("deepseek_v3", {"num_experts_per_tok": 1}, {"experts": 0.1}, "0.1 of 6 experts are 1, and every token wants 2"),
    ("deepseek_v3", {"n_group": 2}, {"experts": 0.5}, "its router chooses among 2 groups of them first"),
])  # fmt: skip
def test_what_cannot_go_is_one_line(
    tmp_path: Path, name: str, changes: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    config = (FAMILIES | MORE)[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    state = open_model(str(make_model(tmp_path, config, torch.float32))).state
    with pytest.raises(CompressError, match=says) as caught:
        Prune.model_validate(options).foresee(state)
    assert "\n" not in str(caught.value)
    assert caught.value.at in (("experts",), ("mlp",), ("kv_groups",))


def test_other_ranks_of_units_do_not_rank_experts() -> None:
    with pytest.raises(RecipeError, match="'wanda' does not rank experts; use obs or magnitude"):
        Prune(experts=0.5, method="wanda").check(calibrated=True)
    with pytest.raises(RecipeError, match=r"needs data\.calibration"):
        Prune(experts=0.5).check(calibrated=False)
    Prune(experts=0.5, method="magnitude").check(calibrated=False)


def test_a_router_that_sends_tokens_elsewhere_is_seen() -> None:
    """Row 1 of the smaller router is that of another expert than was kept."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(64, 6, generator=generator).softmax(1)

    def routing(of: list[int]) -> Routing:
        weights, index = scores[:, of].topk(2, 1)
        return Routing(len(of), torch.zeros(64, 1), index, weights / weights.sum(1, keepdim=True), torch.ones(64, 2))

    alike("layer", "family", routing([0, 1, 2, 3, 4, 5]), routing([0, 2, 3, 5]), [0, 2, 3, 5])
    for wrong in ([0, 3, 2, 5], [0, 1, 2, 3]):
        with pytest.raises(CompressError, match="sends tokens elsewhere"):
            alike("layer", "family", routing([0, 1, 2, 3, 4, 5]), routing(wrong), [0, 2, 3, 5])
