"""The graph of a model by torch.onnx, made without any of its weights.

torch.export traces the skeleton. In place of the product with each matrix it finds a **hole**, a node `compress::Site` with the
name of the site, so neither tracing nor torch.onnx's optimizer ever sees a matrix, and their time does not depend on the formats.
Other parameters (norms, biases, learned positions) are traced as zeros and made inputs of the graph before it is optimized, lest
equal ones be joined or sums of them be folded. Afterwards nodes.py fills the holes, and the parameters become names in the data
file. Peak memory is thus one matrix, in whichever step writes it.

Handing torch.onnx the quantized modules themselves was the other way: it needs all packed tensors in memory, and its optimizer
goes through every one of them, which for 16 blocks took three times as long.

The cache goes in and out as plain tensors, a key and a value for each block. Sliding windows are in the mask alone: all past
positions are kept, since a cache that drops some has shapes that tracing cannot follow.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
import transformers
from onnx import ModelProto
from torch import Tensor, nn

from compress.errors import ExportError, ModelError, first_line
from compress.export.onnx.datafile import layout
from compress.export.onnx.nodes import Nodes, initializers, operators
from compress.model.binding import Binding, kept_in_fp32
from compress.model.names import places
from compress.model.skeleton import skeleton
from compress.state import State
from compress.state.graph import Graph

DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
HOLES = "compress"  # the domain of the nodes that stand for matrices while torch has the graph
OPSET = 23  # has RMSNormalization, RotaryEmbedding and Attention
BATCH, SEQUENCE, PAST = 2, 3, 5  # sizes to trace with: none is 0 or 1, which tracing takes for constants


def build(state: State, kv_cache: bool, dtype: str, accuracy_level: int) -> ModelProto:
    """The whole graph of a state, its tensors in the data file that `layout` describes."""
    traced, names = trace(state, kv_cache, DTYPES[dtype])
    model = ir.to_proto(traced)
    file = layout(state).file
    nodes = Nodes(file.slots, dtype, accuracy_level)
    fill(model, state, nodes, names)
    model.graph.initializer.extend([*initializers(file.slots), *nodes.constants.values()])
    del model.opset_import[:], model.metadata_props[:]
    model.opset_import.extend(operators())
    model.producer_name, model.producer_version, model.doc_string = "compress", "", ""
    name_axes(model, kv_cache)
    return model


# --- tracing ---------------------------------------------------------------------------------------------------------


class Traced(nn.Module):
    """A model as the graph shows it: tensors in, tensors out."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], past: list[tuple[Tensor, Tensor]]) -> Any:
        """Logits and, where there is a `past`, keys and values of all blocks, this call's included."""
        if not past:
            return self.model(**inputs).logits
        out = self.model(**inputs, past_key_values=filled(past), use_cache=True)
        return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]


def filled(past: list[tuple[Tensor, Tensor]]) -> transformers.DynamicCache:
    """A cache that keeps all positions, whatever the config says of windows."""
    cache = transformers.DynamicCache()
    for i, (key, value) in enumerate(past):
        cache.update(key, value, i)
    return cache


def trace(state: State, kv_cache: bool, dtype: torch.dtype) -> tuple[ir.Model, dict[str, str]]:
    """The optimized graph with holes, and for each of its parameters, by its name there, the name in the checkpoint."""
    model = skeleton(state.config)
    Binding(state, model, state.dtype).load_buffers(state, model)
    dig(model, state.graph, dtype)
    names = {f"model.{path}": name for path, name in parameters(model, state, dtype).items()}
    try:
        with holes(), quiet(), torch.no_grad():
            traced = Traced(model)
            past = cache(model, dtype) if kv_cache else []
            given = inputs(model, state.graph, len(past))
            exported = torch.export.export(traced, (given, past), dynamic_shapes=(axes_of(given), axes_of(past)), strict=False)
            ins, outs = [*given, *cache_names("past_key_values", past)], ["logits", *cache_names("present", past)]
            program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, input_names=ins, output_names=outs,
                                        optimize=False, verbose=False)  # fmt: skip
            assert program is not None
            promote(program.model, names)
            program.optimize()
    except Exception as e:  # torch raises whatever an architecture's code meets
        raise ExportError(f"onnx: torch.onnx cannot trace '{state.graph.family}' ({innermost(e)}); export compressed_tensors or "
                          "native instead") from e  # fmt: skip
    return program.model, names


def innermost(e: BaseException) -> str:
    """What the first of a chain of exceptions says: torch.onnx wraps each in general advice."""
    while e.__cause__ is not None:
        e = e.__cause__
    return first_line(e)


def inputs(model: nn.Module, graph: Graph, cached: int) -> dict[str, Tensor]:
    """What to trace with. Positions are given where the model takes them; an encoder counts its own."""
    past = PAST if cached else 0
    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    given = {"input_ids": ids, "attention_mask": torch.ones(BATCH, past + SEQUENCE, dtype=torch.int64)}
    if graph.causal and "position_ids" in inspect.signature(model.forward).parameters:
        given["position_ids"] = torch.arange(past, past + SEQUENCE).repeat(BATCH, 1)
    return given


def cache(model: nn.Module, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [batch, heads, past, width] of every block, in the shapes that the model itself makes them."""
    held: Any = transformers.DynamicCache()
    model(input_ids=torch.zeros(1, 2, dtype=torch.int64), past_key_values=held, use_cache=True)

    def like(x: Tensor) -> Tensor:
        return torch.zeros(BATCH, x.shape[1], PAST, x.shape[3], dtype=dtype)

    return [(like(layer.keys), like(layer.values)) for layer in held.layers]


def axes_of(tensors: Any) -> Any:
    """Which axes may change: all of token inputs, batch and positions of a cache."""
    if isinstance(tensors, Tensor):
        return dict.fromkeys((0, 1) if tensors.ndim == 2 else (0, 2), torch.export.Dim.DYNAMIC)
    if isinstance(tensors, dict):
        return {name: axes_of(t) for name, t in tensors.items()}
    return type(tensors)(axes_of(t) for t in tensors)


def cache_names(kind: str, past: list[Any]) -> list[str]:
    return [f"{kind}.{i}.{side}" for i in range(len(past)) for side in ("key", "value")]


# --- holes -----------------------------------------------------------------------------------------------------------


def dig(model: nn.Module, graph: Graph, dtype: torch.dtype) -> None:
    """Take the matrices out of their modules, which keep only their site."""
    for site in graph:
        for path in (site.module, *site.aliases):
            module: Any = model.get_submodule(path)
            module.hole = site
            del module._parameters["weight"]
            module.weight = torch.zeros((), dtype=dtype)  # some ask for its dtype
            if not isinstance(module, nn.Embedding):
                module.forward = partial(product, module)


def product(module: Any, x: Tensor) -> Tensor:
    """What a Linear or Conv1D without its matrix does: a node, and the bias."""
    y = hole(module, x, (*x.shape[:-1], module.hole.shape[0]))
    return y if getattr(module, "bias", None) is None else y + module.bias


def hole(module: Any, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    name, site = f"{HOLES}::Site", {"site": module.hole.name}
    y: Tensor = torch.onnx.ops.symbolic(name, (x,), site, dtype=module.weight.dtype, shape=shape, version=1)
    return y


@contextmanager
def holes() -> Iterator[None]:
    """Inside, an embedding without its table makes a node instead. The class is patched, as derived ones scale what it gives."""
    before = nn.Embedding.forward

    def forward(self: Any, x: Tensor) -> Tensor:
        return hole(self, x, (*x.shape, self.hole.shape[1])) if hasattr(self, "hole") else before(self, x)

    nn.Embedding.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Embedding.forward = before  # type: ignore[method-assign]


def parameters(model: nn.Module, state: State, dtype: torch.dtype) -> dict[str, str]:
    """Give every parameter zeros to trace with; returns path -> name in the checkpoint."""
    precise, names, there = kept_in_fp32(model, dtype), {}, places(model, state.dense.specs)
    paths: dict[int, list[str]] = {}  # a parameter in several places may lie under the name of any of them
    for path, parameter in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(parameter), []).append(path)
    for same in paths.values():
        held = next((there[path] for path in same if there.get(path, "") in state.dense), None)
        if held is None:
            raise ModelError(f"{state.dense.folder}: no tensor for '{same[0]}'; config and weights do not belong together")
        shape = state.dense.specs[held].shape
        for path in same:
            parent, _, name = path.rpartition(".")
            kind = torch.float32 if any(part in path for part in precise) else dtype
            model.get_submodule(parent)._parameters[name] = nn.Parameter(torch.zeros(shape, dtype=kind), requires_grad=False)
            names[path] = held
    return names


def promote(model: ir.Model, names: dict[str, str]) -> None:
    """Make the parameters inputs of the graph, about which an optimizer knows nothing."""
    for name in names:
        if name in model.graph.initializers:
            value = model.graph.initializers.pop(name)
            value.const_value = None
            model.graph.inputs.append(value)


@contextmanager
def quiet() -> Iterator[None]:
    """torch.onnx logs which optional packages are missing, and uses what torch itself calls deprecated."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# --- filling them ----------------------------------------------------------------------------------------------------


def fill(model: ModelProto, state: State, nodes: Nodes, names: dict[str, str]) -> None:
    """Put nodes in place of holes, and tensors of the data file in place of the parameters among the inputs."""
    graph, formats = model.graph, state.formats
    held = {i.name: nodes.number(names[i.name], i.type.tensor_type.elem_type) for i in graph.input if i.name in names}
    done = nodes.take()
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
        for i, name in enumerate(node.input):
            node.input[i] = held.get(name, name)
        if node.domain != HOLES:
            done.append(node)
            continue
        site = state.graph[node.attribute[0].s.decode()]
        held_by = state.graph.owner(site)
        nodes.matrix(held_by, formats.get(held_by.name), node.input[0], node.output[0], rows=site.role == "embed")
        done += nodes.take()
    kept = [i for i in graph.input if i.name not in names]
    del graph.node[:], graph.input[:], graph.value_info[:], graph.metadata_props[:]
    graph.node.extend(done)
    graph.input.extend(kept)
    graph.doc_string, graph.name = "", state.graph.family


def name_axes(model: ModelProto, kv_cache: bool) -> None:
    """Say what the free axes of inputs and outputs are."""
    total = "total" if kv_cache else "sequence"
    for value in (*model.graph.input, *model.graph.output):
        kind = value.name.partition(".")[0]
        named = {"attention_mask": {0: "batch", 1: total}, "past_key_values": {0: "batch", 2: "past"},
                 "present": {0: "batch", 2: total}}.get(kind, {0: "batch", 1: "sequence"})  # fmt: skip
        for axis, name in named.items():
            value.type.tensor_type.shape.dim[axis].dim_param = name
        value.doc_string = ""
        del value.metadata_props[:]
