"""What feeds the inputs of the matrices: a norm, or the rows of another matrix.

Which norm is read by which matrices, and whether anything else reads it, is not listed by family: the skeleton runs once on the
meta device, and every operation that takes what a norm put out is noted with the module that it happens in. Views carry the
mark on. A norm that the residual stream reads as well (a model of post-norms) shows by an addition outside of any matrix.

How the rows of v and up become inputs of o and down is arithmetic on heads; layouts of joined matrices are in a table. Whoever
folds something into a feed is to compare what the block computes, since a gate or a norm in between shows in neither.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.errors import ModelError, first_line
from compress.model.known import hash_of
from compress.model.names import places
from compress.model.skeleton import glance, is_experts, is_matrix, model_class, skeleton
from compress.shapes import of_layer
from compress.state import State
from compress.state.graph import Feed, Norm, Site

VIEWS = ("view", "_unsafe_view", "reshape", "t", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select",
         "alias", "detach", "clone", "_to_copy", "_reshape_alias")  # fmt: skip
STACKED = ("phi3", "gpt2")  # families whose joined matrix holds all of q, then k, then v
BY_HEAD = ("gpt_neox", "bloom")  # and those that hold q, k and v of one head, then of the next
Key = tuple[int | None, str]  # block and input_key
_RESIDUALS: dict[bytes, dict[str, str]] = {}  # by the hash of a config


def norms(state: State) -> dict[str, Norm]:
    """Every norm of the model, by its path in the module tree, in the order of its modules."""
    model = glance(state.config)
    return _norms(state, model, places(model, (spec.name for spec in state.specs)))


def _norms(state: State, model: nn.Module, held: Mapping[str, str]) -> dict[str, Norm]:
    found: dict[str, Norm] = {}
    for path, module in model.named_modules():
        weight = held.get(f"{path}.weight") if _is_norm(module) and not is_matrix(module) else None
        if weight is not None:
            block = state.graph.block_of(path)
            found[path] = Norm(block, weight, held.get(f"{path}.bias"), _offset(module), _centred(module))
    return found


def feeds(state: State) -> dict[Key, Feed]:
    """(block, input_key) -> the norm that feeds it, for every input that one feeds directly."""
    model = skeleton(state.config)
    there = places(model, (spec.name for spec in state.specs))
    held = _norms(state, model, there)
    sites: dict[str, list[Site]] = {}
    for site in state.graph:
        sites.setdefault(site.module, []).extend([site] if site.expert is None or site.role != "down" else [])
    found: dict[Key, Feed] = {}
    for path, readers in _trace(model.to("meta")).items():
        mine = [s for reader in readers for s in sites.get(reader, [])]
        if mine and path in held:
            others = {r: there.get(f"{r}.weight") for r in readers if r not in sites and _is_router(model, r)}
            stray = next((r for r in readers if r not in sites and not others.get(r)), None)
            feed = _feed(state, held[path], path, mine, [name for name in others.values() if name], stray)
            found |= dict.fromkeys(((s.block, s.input_key) for s in mine), feed)
    return found


def _feed(state: State, norm: Norm, path: str, mine: list[Site], others: list[str], stray: str | None) -> Feed:
    """What is known of a norm that the sites `mine` read, the matrices `others`, and, where there is one, a `stray` module."""
    obstacle = ""
    if norm.offset is None:
        obstacle = f"'{path}' does not multiply by its weight"
    elif any(s.tied or any(o.tied == s.name for o in state.graph) for s in mine):
        obstacle = f"'{mine[0].name}' shares its matrix with another, which does not read '{path}'"
    elif stray is not None:
        obstacle = f"'{stray or 'the model'}' reads what '{path}' puts out as well"
    return Feed(norm.weight, norm.bias, norm.offset, tuple(s.name for s in mine), tuple(others), obstacle)


def _is_router(model: nn.Module, path: str) -> bool:
    """Whether a module is one matrix that is no site: what chooses experts."""
    held = dict(model.get_submodule(path).named_parameters()) if path else {}
    return "weight" in held and held["weight"].ndim == 2 and all(p.ndim == 1 for n, p in held.items() if n != "weight")


def _is_norm(module: nn.Module) -> bool:
    held = dict(module.named_parameters(recurse=False))
    alone = not any(True for _ in module.children())
    return alone and "weight" in held and held.keys() <= {"weight", "bias"} and all(p.ndim == 1 for p in held.values())


def _offset(norm: nn.Module) -> float | None:
    """The number c for which the norm gives x̂ (c + weight) + bias; None where it is no such norm. It is tried out."""
    tried: Any = deepcopy(norm).to_empty(device="cpu").float()
    x = torch.randn(4, tried.weight.shape[0], generator=torch.Generator().manual_seed(0))
    seen = []
    for value in (0.0, 1.0, 2.0):
        for name, p in tried.named_parameters():
            p.data.fill_(value if name == "weight" else 0.0)
        try:
            seen.append(tried(x).float())
        except Exception:  # a norm that wants more than its input
            return None
    step = seen[1] - seen[0]
    if not torch.allclose(seen[2] - seen[1], step, atol=1e-4) or not bool(step.abs().amax() > 1e-3):
        return None
    return round(float((seen[0] * step).sum() / step.square().sum()), 4)


def _centred(norm: nn.Module) -> bool:
    """Whether a norm subtracts the mean of what it is given. It is tried out."""
    tried: Any = deepcopy(norm).to_empty(device="cpu").float()
    x = torch.randn(4, tried.weight.shape[0], generator=torch.Generator().manual_seed(0))
    for name, p in tried.named_parameters():
        p.data.fill_(1.0 if name == "weight" else 0.0)
    try:
        return torch.allclose(tried(x), tried(x + 3), atol=1e-3)
    except Exception:  # a norm that wants more than its input
        return False


# --- the trace -------------------------------------------------------------------------------------------------------


def _trace(model: nn.Module) -> dict[str, list[str]]:
    """Path of every norm -> paths of the modules in which what it puts out is read."""
    with ExitStack() as stack:
        watch = _Watch()
        for path, module in model.named_modules():
            if not path:
                continue
            handles = [module.register_forward_pre_hook(watch.entering(path), prepend=True, with_kwargs=True),
                       module.register_forward_hook(watch.leaving(path, _is_norm(module) and not is_matrix(module)))]  # fmt: skip
            for handle in handles:
                stack.callback(handle.remove)
        _followed(model, watch, watch.clear)
        return watch.readers


def holds_stacks(module: nn.Module) -> bool:
    """Whether a module is experts, in a layout that is read or in another: of their products some have no kernels there."""
    return is_experts(module) or any(p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))


def _followed(model: nn.Module, watch: AbstractContextManager[object], clear: Callable[[], None]) -> None:
    """Run a model on the meta device with its hooks, experts left out; ModelError where its code cannot do that."""
    for module in filter(holds_stacks, model.modules()):
        module.forward = lambda hidden, *_, **__: torch.zeros_like(hidden)
    ids = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    for mask in ({"attention_mask": torch.zeros(1, 1, 8, 8, device="meta")}, {}):  # of four sides it is taken as it is
        try:
            with watch, torch.no_grad():
                model(input_ids=ids, use_cache=False, **mask)
            return
        except Exception as e:  # whatever an architecture's code makes of tensors without content
            reason = first_line(e)
            clear()
    raise ModelError(
        f"{type(model).__name__}: cannot be followed on the meta device ({reason}), so what feeds its matrices is unknown"
    )


def norms_behind(state: State) -> dict[str, Norm]:
    """Site -> the norm that is given just what the site puts out, where there is one, as in Gemma behind o and down."""
    model = skeleton(state.config).to("meta")
    held = _norms(state, model, places(model, (spec.name for spec in state.specs)))
    made, found = _Marks(), dict[str, Norm]()
    sites = {site.module: site.name for site in state.graph if site.expert is None}

    def note(path: str) -> Callable[..., None]:
        return lambda _, args, out: made.put(out, sites[path])

    def match(path: str) -> Callable[..., None]:
        return lambda _, args: found.update({site: held[path] for site in made.of(args[:1])})

    for path, module in model.named_modules():
        if path in sites:
            module.register_forward_hook(note(path))
        if path in held:
            module.register_forward_pre_hook(match(path))

    def clear() -> None:
        made.clear()
        found.clear()

    _followed(model, nullcontext(), clear)
    return found


def residuals(state: State) -> dict[str, str]:
    """Site -> the module whose first input is just what the site's output is added to, where there is one: of o and down, in a
    model of norms in front, what has come so far. Sublayers side by side, and norms or factors in between, have none."""
    key = hash_of(model_class(state.config), state.config)
    if key not in _RESIDUALS:
        model = skeleton(state.config).to("meta")
        sums = _Sums()
        sites = {site.module: site.name for site in state.graph if site.expert is None and site.block is not None}
        for path, module in model.named_modules():
            if path in sites:
                module.register_forward_hook(sums.made(sites[path]))
            if state.graph.block_of(f"{path}.") is not None:
                module.register_forward_pre_hook(sums.given(path))
        try:
            _followed(model, sums, sums.clear)
        except ModelError:  # an architecture that nobody can follow: its matrices are solved for their own outputs alone
            sums.clear()
        _RESIDUALS[key] = sums.found
    return _RESIDUALS[key]


@dataclass(eq=False)
class _Marks:
    """Names of tensors, by which tensor it is. Tensors are kept, lest others get their numbers."""

    held: dict[int, tuple[Tensor, str]] = field(default_factory=dict)

    def put(self, tensor: Any, name: str) -> None:
        self.held[id(tensor)] = tensor, name

    def drop(self, tensor: Any) -> None:
        self.held.pop(id(tensor), None)

    def of(self, tensors: Iterable[Any]) -> list[str]:
        """The names of those that have one, in order."""
        return [self.held[id(t)][1] for t in tensors if id(t) in self.held]

    def clear(self) -> None:
        self.held.clear()


@dataclass(eq=False)
class _Sums(TorchDispatchMode):
    """Notes where what a site puts out is added to what a module was given."""

    found: dict[str, str] = field(default_factory=dict)
    outputs: _Marks = field(default_factory=_Marks)
    inputs: _Marks = field(default_factory=_Marks)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self.found.clear()
        self.outputs.clear()
        self.inputs.clear()

    def made(self, site: str) -> Callable[..., None]:
        return lambda _, args, out: self.outputs.put(out, site)

    def given(self, path: str) -> Callable[..., None]:
        def note(_: nn.Module, args: tuple[Any, ...]) -> None:
            known = self.outputs.of(args[:1]) or self.inputs.of(args[:1])
            if args and not known:  # what a matrix put out may pass a module on its way to the sum
                self.inputs.put(args[0], path)

        return note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out, name = func(*args, **(kwargs or {})), func.__name__.partition(".")[0]
        sites = self.outputs.of(args)
        if sites and name in VIEWS and isinstance(out, Tensor):
            self.outputs.put(out, sites[0])
        if name.endswith("_"):
            self.outputs.drop(out)  # it is something else now
        if len(sites) == 1 and name in ("add", "add_") and not kwargs:
            self.found.update((sites[0], path) for path in self.inputs.of(args))
        return out


@dataclass(eq=False)
class _Watch(TorchDispatchMode):
    """Notes which modules read what norms put out."""

    readers: dict[str, list[str]] = field(default_factory=dict)
    inside: list[str] = field(default_factory=list)
    marked: _Marks = field(default_factory=_Marks)

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def clear(self) -> None:
        self.readers.clear()
        self.inside.clear()
        self.marked.clear()

    def entering(self, path: str) -> Callable[..., None]:
        return lambda *_: self.inside.append(path)

    def leaving(self, path: str, norm: bool) -> Callable[..., None]:
        def leave(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self.inside.pop()
            if norm and isinstance(out, Tensor):
                self.readers.setdefault(path, [])
                self.marked.put(out, path)

        return leave

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        sources = set(self.marked.of(_tensors((args, kwargs))))
        place = self.inside[-1] if self.inside else ""
        if sources and func.__name__.partition(".")[0] in VIEWS and isinstance(out, Tensor):
            self.marked.put(out, next(iter(sources)))
        else:
            for source in sources:
                if place not in self.readers[source]:
                    self.readers[source].append(place)
        return out


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


# --- rows of other matrices ------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a site that become the inputs of another: input k is row `rows[k]`, times what does not depend on the site.

    obstacle: why no factor can go from the rows into the inputs; empty where one can.
    """

    site: str
    rows: Tensor
    obstacle: str


def rows(state: State) -> dict[Key, Rows]:
    """(block, input_key) -> the rows that become its inputs: of v for o, of up for down."""
    config = state.config.get_text_config()
    found: dict[Key, Rows] = {}
    for block in state.graph.blocks:
        sites = state.graph.of_block(block.index)
        for reader in sites:
            mates = {s.role: s for s in sites if s.expert == reader.expert and _together(s, reader)}
            if reader.role == "o":
                found[block.index, reader.input_key] = _attention(reader, mates, of_layer(config, block.index))
            elif reader.role == "down":
                found[block.index, reader.input_key] = _mlp(reader, mates, config)
    return found


def _together(one: Site, other: Site) -> bool:
    """Whether two matrices are parts of one attention or one MLP."""
    return one.expert is not None or one.name.rpartition(".")[0] == other.name.rpartition(".")[0]


def _attention(o: Site, mates: Mapping[str, Site], config: Any) -> Rows:
    heads = config.num_attention_heads
    width = o.shape[1] // heads
    source = mates.get("v") or mates.get("qkv")
    if source is None or o.shape[1] % heads:
        return Rows("", torch.empty(0, dtype=torch.int64), "its values come from no matrix of the block")
    groups = getattr(config, "num_key_value_heads", None) or heads
    inputs = torch.arange(o.shape[1])
    head, within = inputs // width, inputs % width
    own = head // (heads // groups) * width + within
    if source.role == "v":
        return Rows(source.name, own, "")
    if config.model_type in STACKED:
        return Rows(source.name, source.shape[0] - groups * width + own, "")
    if config.model_type in BY_HEAD:
        return Rows(source.name, head * 3 * width + 2 * width + within, "")
    return Rows(source.name, own, f"how '{config.model_type}' joins q, k and v is not known")


def _mlp(down: Site, mates: Mapping[str, Site], config: Any) -> Rows:
    inputs = torch.arange(down.shape[1])
    act = next(
        (str(a) for n in ("hidden_act", "activation_function", "hidden_activation") if (a := getattr(config, n, None))), ""
    )
    if "gate_up" in mates:
        return Rows(mates["gate_up"].name, down.shape[1] + inputs, "")
    if "up" not in mates:
        return Rows("", inputs, "its inputs come from no matrix of the block")
    linear = "gate" in mates or act == "relu"
    return Rows(
        mates["up"].name, inputs, "" if linear else f"'{act}' stands between up and down, and does not let a factor through"
    )
