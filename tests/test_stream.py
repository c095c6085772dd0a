"""A streamed model is the stock model: the same logits to the bit, the same inputs at every matrix, one block in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from compress.model.feeds import residuals
from compress.model.lockstep import Clean, Inputs
from compress.model.model import Model, open_model
from compress.model.stream import Batch, Stream, Twin
from compress.state import State
from tests import stock
from tests.conftest import FAMILIES, GROUPED, IDS, KINDS_OF_FAMILIES, SMALL, covered, make_model, rare
from tests.sharing import SharingConfig

MOE = ("mixtral", "qwen3_moe")
PLAIN = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
OTHERS: dict[str, Any] = {  # beside FAMILIES: parallel attention, ALiBi, partial rotary tables, shared experts, learnt buffers
    "falcon": lambda: transformers.FalconConfig(**PLAIN, **IDS),
    "bloom": lambda: transformers.BloomConfig(hidden_size=64, n_layer=2, n_head=4, vocab_size=272, **IDS),
    "gptj": lambda: transformers.GPTJConfig(n_embd=64, n_layer=2, n_head=4, vocab_size=272, rotary_dim=16, **IDS),
    "phi": lambda: transformers.PhiConfig(**SMALL, **IDS),
    "cohere": lambda: transformers.CohereConfig(**SMALL, **GROUPED, **IDS),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(**SMALL, **GROUPED, **IDS, num_experts=4, num_experts_per_tok=2,
                                                     moe_intermediate_size=64, shared_expert_intermediate_size=128),
    "glm4_moe": lambda: transformers.Glm4MoeConfig(**SMALL, **GROUPED, **IDS, head_dim=16, n_routed_experts=4, n_group=1,
                                                   topk_group=1, num_experts_per_tok=2, moe_intermediate_size=64,
                                                   first_k_dense_replace=1),
    "sharing": lambda: SharingConfig(**SMALL, **GROUPED, **IDS, tie_word_embeddings=True),
}  # fmt: skip


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """other(name) -> folder of a tiny model of OTHERS."""

    def make(name: str) -> Path:
        folder = make_model(tmp_path_factory.mktemp(name), OTHERS[name]())
        if name == "glm4_moe":  # its router corrects scores by a buffer, which training moves away from zero
            tensors = load_file(folder / "model.safetensors")
            (learnt,) = (n for n in tensors if n.endswith("e_score_correction_bias"))
            tensors[learnt] = torch.tensor([0.3, -0.7, 0.2, 0.1])
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


def tokens() -> list[Tensor]:
    """Batches of different size and length, longer than a sliding window."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, shape, generator=generator) for shape in ((2, 24), (3, 24), (1, 40))]


def start(folder: Path) -> tuple[Model, State, Stream, list[Batch]]:
    model = open_model(str(folder))
    state = model.state
    stream = Stream(state)
    return model, state, stream, stream.start(state, tokens())


def streamed(folder: Path) -> list[Tensor]:
    _, state, stream, batches = start(folder)
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    return list(stream.logits(state, batches))


def same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# --- logits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", covered((f for f in FAMILIES if f not in MOE), *(f for f in KINDS_OF_FAMILIES if f not in MOE)))
def test_logits_are_those_of_the_stock_model(family: Any, name: str) -> None:
    assert same(streamed(family(name)), stock.logits(stock.load(family(name)), tokens()))


@pytest.mark.parametrize("name", covered(OTHERS, *list(OTHERS)[:2]))
def test_logits_of_further_architectures(other: Any, name: str) -> None:
    folder = other(name)
    assert same(streamed(folder), stock.logits(stock.load(folder, **stock.EAGER), tokens()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_logits_in_other_precisions(family: Any, dtype: torch.dtype) -> None:
    ours = streamed(family("llama", dtype))
    assert ours[0].dtype == dtype
    assert same(ours, stock.logits(stock.load(family("llama", dtype)), tokens()))


@pytest.mark.parametrize(("name", "dtype"), [
    ("mixtral", torch.bfloat16), ("qwen3_moe", torch.bfloat16), rare("mixtral", torch.float16), rare("qwen3_moe", torch.float32),
    rare("mixtral", torch.float32),
    rare("qwen3_moe", torch.float16),
])  # fmt: skip
def test_experts_are_those_of_the_stock_loop_and_near_the_stock_default(family: Any, name: str, dtype: torch.dtype) -> None:
    """The default implementation multiplies all experts in one grouped product, which rounds elsewhere."""
    folder = family(name, dtype)
    ours = streamed(folder)
    assert same(ours, stock.logits(stock.load(folder, **stock.EAGER), tokens()))
    for a, b in zip(ours, stock.logits(stock.load(folder), tokens()), strict=True):
        assert (a - b).abs().max() <= 12 * torch.finfo(dtype).eps * a.abs().max()


# --- calibration ------------------------------------------------------------------------------------------------------


class Spy:
    """A solver that notes what it is shown, and replaces every matrix by `change(matrix)`."""

    def __init__(self, state: State, index: int, change: Any):
        self.state, self.change = state, change
        self.sites = state.graph.of_block(index)
        self.seen: list[tuple[str, Inputs]] = []
        self.clean: list[Inputs | None] = []
        self.ahead: list[Tensor | None] = []
        self.solved: list[str] = []
        self.matrices: dict[str, Tensor] = {}

    def observe(self, stage: str, inputs: Inputs, clean: Clean | None = None) -> None:
        self.seen.append((stage, {e: x.clone() for e, x in inputs.items()}))
        self.clean.append(clean and {e: x.clone() for e, x in clean.inputs.items()})
        self.ahead.append(None if clean is None else clean.ahead)

    def solve(self, stage: str) -> dict[str, Tensor]:
        self.solved.append(stage)
        new = {s.name: self.change(self.state.weight(s)) for s in self.sites if s.stage == stage and self.change}
        self.matrices |= new
        return new

    def of(self, stage: str) -> list[Inputs]:
        return [inputs for name, inputs in self.seen if name == stage]

    def pairs(self, stage: str) -> list[tuple[Inputs, Inputs | None]]:
        return [(inputs, clean) for (name, inputs), clean in zip(self.seen, self.clean, strict=True) if name == stage]


@pytest.mark.parametrize("name", covered(FAMILIES, "llama", "gpt2", "mixtral"))
def test_a_solver_that_changes_nothing_changes_nothing(family: Any, name: str) -> None:
    _, state, stream, batches = start(family(name))
    twins = stream.start(state, tokens())
    for block in state.graph.blocks:
        spy = Spy(state, block.index, None)
        stream.calibrate(state, block.index, batches, spy.sites, spy.observe, spy.solve)
        stream.advance(state, block.index, twins)
        assert same([b.hidden for b in batches], [b.hidden for b in twins])
        assert spy.solved == list(dict.fromkeys(s.stage for s in spy.sites)), "each stage once, in the order of the sites"


def coarse(matrix: Tensor) -> Tensor:
    """A matrix that nobody would mistake for the original."""
    return (matrix.float() * 8).round().div(8).to(matrix.dtype)


@pytest.mark.parametrize("name", covered([*FAMILIES, *OTHERS], "llama", "gpt2", "mixtral", "roberta"))
def test_each_stage_sees_what_the_stock_model_with_all_earlier_replacements_sees(family: Any, other: Any, name: str) -> None:
    """The sequential property: the inputs of o carry the replaced q, k, v, those of the MLP also o, and so on, to the bit."""
    folder = family(name) if name in FAMILIES else other(name)
    _, state, stream, batches = start(folder)
    model = stock.load(folder, **stock.EAGER)
    for block in state.graph.blocks:
        spy = Spy(state, block.index, coarse)
        stream.calibrate(state, block.index, batches, spy.sites, spy.observe, spy.solve)
        stock.substitute(model, state.graph, spy.matrices)
        wanted = [stock.inputs(model, state.graph, block.index, ids) for ids in tokens()]
        assert set(spy.solved) == set(wanted[0])
        for stage in spy.solved:
            for ours, theirs in zip(spy.of(stage), (w[stage] for w in wanted), strict=True):
                assert ours.keys() == theirs.keys()
                assert all(torch.equal(ours[e], theirs[e]) for e in ours), (block.index, stage)
    assert same(list(stream.logits(state, batches)), stock.logits(model, tokens()))


@pytest.mark.parametrize("name", covered(["llama", "gpt2", "mixtral"], "gpt2"))
def test_a_twin_shows_at_each_stage_what_the_untouched_model_sees(family: Any, name: str) -> None:
    _, state, stream, batches = start(family(name))
    beside = Stream(state)
    twin = Twin(beside, state, beside.start(state, tokens()))
    untouched = stock.load(family(name), **stock.EAGER)
    for block in state.graph.blocks:
        spy = Spy(state, block.index, coarse)
        stream.calibrate(state, block.index, batches, spy.sites, spy.observe, spy.solve, twin)
        wanted = [stock.inputs(untouched, state.graph, block.index, ids) for ids in tokens()]
        for stage in spy.solved:
            for (seen, clean), theirs in zip(spy.pairs(stage), (w[stage] for w in wanted), strict=True):
                assert clean is not None
                assert all(torch.equal(clean[e], theirs[e]) for e in theirs)
                assert (block.index, stage) == (0, spy.solved[0]) or any(not torch.equal(seen[e], clean[e]) for e in clean)
    assert same(list(beside.logits(state, twin.batches)), stock.logits(untouched, tokens()))


NOT_ADDED = ("gemma2", "gemma3", "gpt_neox", "falcon", "gptj", "phi")  # norms behind, or sublayers side by side
ENDS = ("attn.out", "mlp.mid")
O_ALONE = ("mixtral", "qwen3_moe", "qwen2_moe", "cohere")  # what experts put out is summed first, or something else is added


@pytest.mark.parametrize("name", covered([*FAMILIES, *OTHERS], "llama", "gemma3", "gpt_neox"))
def test_the_residual_of_a_matrix_is_what_its_output_is_added_to(family: Any, other: Any, name: str) -> None:
    """The sum of both is what some module of the stock model is given next, or what the block puts out, to the bit."""
    folder = family(name) if name in FAMILIES else other(name)
    state = open_model(str(folder)).state
    found, model, met = residuals(state), stock.load(folder, **stock.EAGER), dict[str, list[Tensor]]()
    roles = {state.graph[site].role for site in found}
    assert roles == (set() if name in NOT_ADDED else {"o"} if name in O_ALONE else {"o", "down"})
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda _, args, path=path: met.setdefault(path, []).extend(args[:1]))
        module.register_forward_hook(lambda _, args, out, path=path: met.setdefault(path, []).append(out))
    stock.logits(model, tokens()[:1])
    there = [x[0] if isinstance(x, tuple) else x for seen in met.values() for x in seen]
    there = [x for x in there if isinstance(x, Tensor)]
    for site, path in found.items():
        residual, output = met[path][0], met[state.graph[site].module][-1]
        total = (residual.reshape(output.shape) + output).flatten()
        assert any(x.numel() == total.numel() and torch.equal(x.flatten(), total) for x in there), (site, path)


@pytest.mark.slow
def test_a_twin_shows_how_far_its_residual_stream_is_ahead(family: Any) -> None:
    """In front of o and down of every block, where all before them was replaced; nowhere else."""
    _, state, stream, batches = start(family("llama"))
    beside = Stream(state)
    twin = Twin(beside, state, beside.start(state, tokens()))
    untouched, replaced = (stock.load(family("llama"), **stock.EAGER) for _ in range(2))
    for block in state.graph.blocks:
        spy = Spy(state, block.index, coarse)
        stream.calibrate(state, block.index, batches, spy.sites, spy.observe, spy.solve, twin)
        stock.substitute(replaced, state.graph, spy.matrices)
        for stage, ahead in zip([stage for stage, _ in spy.seen], spy.ahead, strict=True):
            assert (ahead is not None) == (stage in ENDS), stage
        for stage, path in zip(ENDS, ("", ".post_attention_layernorm"), strict=True):
            theirs, ours = (given(m, block.module + path, tokens()) for m in (untouched, replaced))
            seen = [ahead for (name, _), ahead in zip(spy.seen, spy.ahead, strict=True) if name == stage]
            for ahead, a, b in zip(seen, theirs, ours, strict=True):
                assert torch.equal(ahead, (a - b).flatten(0, 1))


def given(model: nn.Module, path: str, batches: list[Tensor]) -> list[Tensor]:
    """What a module of the stock model is given, batch by batch."""
    found: list[Tensor] = []
    hook = model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    stock.logits(model, batches)
    hook.remove()
    return found


def test_only_the_stages_of_the_asked_sites_are_shown(family: Any) -> None:
    _, state, stream, batches = start(family("llama"))
    spy = Spy(state, 0, None)
    spy.sites = [state.graph[f"layers.0.{n}"] for n in ("attn.v", "mlp.down")]
    stream.calibrate(state, 0, batches, spy.sites, spy.observe, spy.solve)
    assert [name for name, _ in spy.seen] == ["attn.in"] * 3 + ["mlp.mid"] * 3


def test_the_head_is_shown_its_own_inputs(family: Any) -> None:
    _, state, stream, batches = start(family("llama"))
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    seen: list[tuple[str, Tensor]] = []
    stream.watch_head(state, batches, state.graph["lm_head"], lambda stage, x, clean: seen.append((stage, x[None])))
    model = stock.load(family("llama"))
    theirs: dict[str, Any] = {}
    model.lm_head.register_forward_pre_hook(stock.hook_of(theirs, "lm_head"))
    for (stage, x), ids in zip(seen, tokens(), strict=True):
        stock.logits(model, [ids])
        assert stage == "lm_head"
        assert torch.equal(x, theirs["lm_head"][None])


# --- memory and mistakes ----------------------------------------------------------------------------------------------


def loaded(stream: Stream) -> set[str]:
    """Module paths whose parameters are in memory."""
    tree: list[tuple[str, nn.Module]] = [("", stream.model)]
    tree += [(b.module, m) for b, m in zip(stream.graph.blocks, stream.blocks, strict=True)]
    return {f"{path}.{n}".strip(".") for path, m in tree for n, p in m.named_parameters() if not p.is_meta}


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_one_block_is_in_memory_at_a_time(family: Any, name: str) -> None:
    _, state, stream, batches = start(family(name))
    assert not loaded(stream)
    for block in state.graph.blocks:
        with stream.block(state, block.index):
            assert loaded(stream)
            assert all(path.startswith(f"{block.module}.") for path in loaded(stream))
        stream.advance(state, block.index, batches)
        assert not loaded(stream)
    for _ in stream.logits(state, batches):
        assert not any(path.startswith(b.module + ".") for b in state.graph.blocks for path in loaded(stream))
    assert not loaded(stream)


class BoomError(Exception):
    pass


@pytest.mark.parametrize("where", ["solve", "observe", "forward"])
def test_an_error_on_the_way_surfaces_and_leaves_the_stream_fit_for_use(family: Any, where: str) -> None:
    """In the solver, in the observer, and inside a paused forward pass."""
    _, state, stream, batches = start(family("llama"))
    before = [b.hidden for b in batches]

    def boom(*_: Any) -> Any:
        raise BoomError(where)

    spy = Spy(state, 0, coarse)
    if where == "forward":
        hook = stream.blocks[0].get_submodule("mlp.act_fn").register_forward_pre_hook(boom)
    else:
        setattr(spy, where, lambda stage, *rest: boom() if stage == "attn.out" else getattr(Spy, where)(spy, stage, *rest))
    with pytest.raises(BoomError, match=where):
        stream.calibrate(state, 0, batches, spy.sites, spy.observe, spy.solve)
    if where == "forward":
        hook.remove()
    assert not loaded(stream)
    assert same([b.hidden for b in batches], before)
    for block in state.graph.blocks:
        stream.advance(state, block.index, batches)
    assert same(list(stream.logits(state, batches)), stock.logits(stock.load(family("llama")), tokens()))


def test_nothing_of_a_forward_pass_keeps_gradients(family: Any) -> None:
    _, state, stream, batches = start(family("llama"))
    stream.advance(state, 0, batches)
    assert not any(b.hidden.requires_grad for b in batches)
    assert torch.is_grad_enabled()
