"""The `quantization_config` of a GPTQ checkpoint: one format for all, and `dynamic` for the matrices that differ.

A pattern of ours is one of

    ^head\\.(?:0|1|5)\\.(?:self_attn\\.q_proj|mlp\\.up_proj)(?:\\.|$)      modules of numbered blocks
    ^(?:lm_head)(?:\\.|$)                                               modules by their full names

which engines give to `re.match`: gptqmodel with names of modules, vLLM with those that it joins (``qkv_proj``), onnxruntime-genai
with names of tensors, hence the end. The reader takes these forms apart instead: no pattern of a stranger's is run.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from compress.errors import FormatError, ModelError
from compress.formats import Format, Int, integers
from compress.state.graph import Graph, Site

V1, V2 = "gptq", "gptq_v2"
JOINED = {("q_proj", "k_proj", "v_proj"): "qkv_proj", ("gate_proj", "up_proj"): "gate_up_proj"}  # as vLLM names them
END = r"(?:\.|$)"
_NUMBERED = re.compile(r"\^([\w\\.]+)\\\.\(\?:([\d|]+)\)\\\.\(\?:([\w\\.|]+)\)" + re.escape(END), re.ASCII)
_PLAIN = re.compile(r"\^\(\?:([\w\\.|]+)\)" + re.escape(END), re.ASCII)


# --- written ---------------------------------------------------------------------------------------------------------


def config_of(graph: Graph, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The `quantization_config` for matrices in integer formats, by site; others stay as they are."""
    packed = integers(formats)
    base = Counter(packed.values()).most_common(1)[0][0]
    head = any(graph[name].block is None for name in packed)
    config = options(base) | {
        "quant_method": "gptq", "desc_act": False, "lm_head": head, "pack_dtype": "int32",
        "checkpoint_format": V1 if all(fmt.symmetric for fmt in packed.values()) else V2,
        "meta": {"quantizer": [f"compress:{version('compress-pipeline')}"]},
    }  # fmt: skip
    dynamic = overrides(graph, packed, base)
    return config | ({"dynamic": dynamic} if dynamic else {})


def options(fmt: Int) -> dict[str, Any]:
    """What distinguishes one format from another."""
    return {"bits": fmt.bits, "group_size": -1 if fmt.group is None else fmt.group, "sym": fmt.symmetric}


def overrides(graph: Graph, formats: Mapping[str, Int], base: Int) -> dict[str, dict[str, Any]]:
    """`dynamic`: a `-:` for what stays as it is, a `+:` for every format but the base's."""
    left = [site for site in graph.linear if site.name not in formats]
    modules = [*names(left, graph), *unseen(graph)]
    found: dict[str, dict[str, Any]] = {f"-:{p}": {} for p in patterns(modules)}
    for fmt in dict.fromkeys(formats.values()):
        if fmt != base:
            sites = [graph[name] for name, held in formats.items() if held == fmt]
            found |= {f"+:{p}": options(fmt) for p in patterns(names(sites, graph))}
    return found


def unseen(graph: Graph) -> list[str]:
    """The modules of matrices in numbered layers that are no sites: those that a recipe leaves, and those of another tower."""
    held = [
        name.removesuffix(".weight") for name, shape in graph.parameters.items() if name.endswith(".weight") and len(shape) == 2
    ]
    return list(dict.fromkeys([*graph.left, *(module for module in held if re.search(r"\.\d+\.", module))]))


def names(sites: list[Site], graph: Graph) -> list[str]:
    """The modules of some sites, in the tree and on disk, and the joined modules that consist of nothing else."""
    found = [path for site in sites for path in dict.fromkeys((site.module, site.stem))]
    here = {site.name for site in sites}
    for group in graph.fused():
        heads, tails = zip(*(site.module.rpartition(".")[::2] for site in group), strict=True)
        if tails in JOINED and len(set(heads)) == 1 and all(site.name in here for site in group):
            found.append(f"{heads[0]}.{JOINED[tails]}")
    return found


def patterns(modules: Iterable[str]) -> list[str]:
    """Anchored patterns that match these modules and no others: one for all blocks that agree in which modules they have."""
    blocks: dict[tuple[str, str], list[str]] = {}
    plain = []
    for module in modules:
        split = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", module)
        if split:
            blocks.setdefault((split[1], split[3]), []).append(split[2])
        else:
            plain.append(module)
    tails: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (head, tail), numbers in blocks.items():
        tails.setdefault((head, tuple(numbers)), []).append(tail)
    found = [rf"^{re.escape(head)}\.(?:{'|'.join(numbers)})\.(?:{'|'.join(map(re.escape, rest))}){END}"
             for (head, numbers), rest in tails.items()]  # fmt: skip
    return found + ([rf"^(?:{'|'.join(map(re.escape, plain))}){END}"] if plain else [])


# --- read ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """One entry of `dynamic`: the modules that it is about, and their format, or None where they stay as they are."""

    heads: frozenset[str]
    numbers: frozenset[str]
    tails: frozenset[str]
    format: Int | None

    def covers(self, module: str) -> bool:
        split = re.fullmatch(r"(.+?)\.(\d+)\.(.+)", module) if self.heads else None
        if split is None:
            return not self.heads and module in self.tails
        return split[1] in self.heads and split[2] in self.numbers and split[3] in self.tails


@dataclass(frozen=True)
class Scheme:
    """What a `quantization_config` says of every module. v1: whether zero points are stored less one."""

    base: Int
    rules: tuple[Rule, ...]
    v1: bool

    @classmethod
    def of(cls, config: Mapping[str, Any], place: str) -> Scheme:
        """ModelError, with the file's name, for a config that cannot be read or says what we do not read."""
        layout = config.get("checkpoint_format", config.get("format", V1))
        if layout not in (V1, V2):
            raise ModelError(f"{place}: its checkpoint_format is {layout!r}; only {V1} and {V2} are read")
        if config.get("desc_act"):
            raise ModelError(f"{place}: says desc_act: true; only groups in the order of inputs are read")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise ModelError(f"{place}: its quantization_config is broken: 'dynamic' is to map patterns to options")
        base = format_of(config, {}, place)
        return cls(base, tuple(rule(text, said, config, place) for text, said in dynamic.items()), layout == V1)

    def format(self, module: str) -> Int | None:
        """The format of a module; None where it stays as it is."""
        return next((r.format for r in self.rules if r.covers(module)), self.base)


def rule(text: str, said: Any, config: Mapping[str, Any], place: str) -> Rule:
    """One entry of `dynamic`."""
    sign, body = text[:2], text[2:]
    numbered, plain = _NUMBERED.fullmatch(body), _PLAIN.fullmatch(body)
    if sign not in ("+:", "-:") or not isinstance(said, dict) or not (numbered or plain):
        raise ModelError(f"{place}: the pattern '{text[:60]}' of 'dynamic' is none that compress writes, and is not read")
    fmt = format_of(config, said, place) if sign == "+:" else None
    if numbered:
        return Rule(frozenset({bare(numbered[1])}), members(numbered[2]), members(numbered[3]), fmt)
    assert plain
    return Rule(frozenset(), frozenset(), members(plain[1]), fmt)


def members(text: str) -> frozenset[str]:
    return frozenset(bare(part) for part in text.split("|"))


def bare(text: str) -> str:
    return text.replace("\\", "")


def format_of(config: Mapping[str, Any], said: Mapping[str, Any], place: str) -> Int:
    """The format that the config gives to matrices for which `dynamic` says `said`."""
    bits, group, symmetric = ({**config, **said}.get(key) for key in ("bits", "group_size", "sym"))
    if type(bits) is not int or type(group) is not int or type(symmetric) is not bool:
        raise ModelError(
            f"{place}: its quantization_config is broken: bits, group_size, sym are {bits!r}, {group!r}, {symmetric!r}"
        )
    try:
        return Int(bits, None if group == -1 else group, symmetric)
    except FormatError as e:
        raise ModelError(f"{place}: {e}") from None
