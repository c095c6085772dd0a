"""How the config of a compressed-tensors folder spells formats, a group of `config_groups` each: written and read by one table.

A group says what weights are, what inputs are rounded to, and, in its own `format`, how the weights lie in files. That is always
written: what the library infers for integers with activations is a byte for each code, whatever their width, and engines choose
their kernels by it. Groups of several layouts stand beside each other under the name `mixed-precision`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compress.errors import FormatError, ModelError, one_line
from compress.export.artifact.config import PATTERN, check_patterns
from compress.export.artifact.patterns import matches
from compress.formats import Float, Int, Served
from compress.formats.activations import RULES, Activation, Rule

Scheme = Int | Float | Served
Args = dict[str, Any]
_SCALES = {"own": None, "e4m3": "torch.float8_e4m3fn", "e8m0": "torch.uint8"}
FLOATS: dict[str, tuple[str, Rule]] = {
    "fp8:channel": ("float-quantized", Rule("e4m3")),
    "nvfp4": ("nvfp4-pack-quantized", RULES["nvfp4"]),
    "mxfp4": ("mxfp4-pack-quantized", RULES["mxfp4"]),
    "mxfp8": ("mxfp8-quantized", RULES["mxfp8"]),
}  # text -> layout, and its numbers, of which inputs in groups have the same


def group_of(fmt: Scheme) -> Args:
    """A group of `config_groups` without its targets."""
    weight, inputs = (fmt.weight, fmt.input) if isinstance(fmt, Served) else (fmt, None)
    return {"weights": weights_of(weight), "input_activations": inputs and inputs_of(inputs), "output_activations": None,
            "format": layout_of(fmt)}  # fmt: skip


def layout_of(fmt: Scheme) -> str:
    """How the weights of a format lie in files."""
    weight = fmt.weight if isinstance(fmt, Served) else fmt
    if isinstance(weight, Float):
        return FLOATS[weight.text][0]
    return "int-quantized" if isinstance(fmt, Served) and fmt.bytes_of_codes else "pack-quantized"


def weights_of(fmt: Int | Float) -> Args:
    """Weights as QuantizationArgs spell them."""
    if isinstance(fmt, Int):
        strategy = "channel" if fmt.group is None else "group"
        return args("int", fmt.bits, strategy, fmt.group, dynamic=False) | {"symmetric": fmt.symmetric}
    return floats(FLOATS[fmt.text][1], "channel", dynamic=False)


def inputs_of(activation: Activation) -> Args:
    """Inputs as QuantizationArgs spell them: found as they come, NVFP4's under a number that is stored."""
    rule = activation.rule
    if rule.element.startswith("int"):
        return args("int", int(rule.element[3:]), "token", None, dynamic=True)
    return floats(rule, "token", dynamic="local" if activation.measured else True)


def floats(rule: Rule, whole: str, dynamic: bool | str) -> Args:
    """Floating-point numbers by a rule; `whole` is the strategy where there are no groups."""
    strategy = "tensor_group" if rule.scale == "e4m3" else "group" if rule.group else whole
    kind = _SCALES[rule.scale]
    found = args("float", 4 if rule.element == "e2m1" else 8, strategy, rule.group, dynamic)
    return found | ({"scale_dtype": kind, "zp_dtype": kind} if kind else {})


def args(kind: str, bits: int, strategy: str, group: int | None, dynamic: bool | str) -> Args:
    return {"num_bits": bits, "type": kind, "symmetric": True, "dynamic": dynamic, "strategy": strategy, "group_size": group}


# --- reading ---------------------------------------------------------------------------------------------------------


def schemes(config: Mapping[str, Any], path: Path = Path("config.json")) -> list[tuple[list[str], Scheme]]:
    """Targets and format of every group of a compressed-tensors config; ModelError for what is not read, or a target that is a
    pattern which is not. `path` is for messages."""
    check_patterns(config, path)
    try:
        if config.get("transform_config"):
            raise ModelError(f"{path}: has a transform, which is not read here")
        return [(list(group["targets"]), scheme(group, config, path)) for group in config["config_groups"].values()]
    except (LookupError, TypeError, AttributeError, FormatError) as e:
        why = f"{type(e).__name__}: {one_line(str(e))}"
        raise ModelError(f"{path}: its quantization_config is broken ({why})") from None


def scheme(group: Mapping[str, Any], config: Mapping[str, Any], path: Path) -> Scheme:
    """The format of one group; ModelError for weights or inputs in a form that none has, or that lie in another way."""
    weights, inputs = group["weights"], group.get("input_activations")
    layout = group.get("format") or config.get("format")
    kind = one_line(str(weights.get("type")))
    weight = integer_of(weights, path) if kind == "int" and layout in ("pack-quantized", "int-quantized") else float_of(weights)
    if weight is None or group.get("output_activations"):
        raise ModelError(f"{path}: has weights of type '{kind}' as '{one_line(str(layout))}', "
                         f"{one_line(str(weights.get('num_bits')))} bits, in a form that is not read here")  # fmt: skip
    found: Scheme = weight
    if inputs is not None:
        known = next((text for text in RULES if same(inputs, inputs_of(Activation(text)))), None)
        if known is None:
            said = ", ".join(f"{key} {one_line(str(inputs.get(key)))}" for key in ("type", "num_bits", "strategy", "dynamic"))
            raise ModelError(f"{path}: has inputs ({said}) in a form that is not read here")
        found = Served(weight, Activation(known))
    if layout != layout_of(found):
        raise ModelError(f"{path}: has {found} as '{one_line(str(layout))}', and only '{layout_of(found)}' is read here")
    return found


CACHES = {"fp8": "tensor", "fp8:head": "attn_head"}  # the strategy of each kind of cache


def cache_args(kind: str) -> Args:
    """A cache as QuantizationArgs spell it."""
    return args("float", 8, CACHES[kind], None, dynamic=False)


def cache_in(config: Mapping[str, Any], path: Path = Path("config.json")) -> str | None:
    """The kind of cache that a config asks for; None where it asks for none, ModelError where for one that is none of ours."""
    said = config.get("kv_cache_scheme")
    if said is None:
        return None
    found = next((kind for kind in CACHES if isinstance(said, dict) and same(said, cache_args(kind))), None)
    if found is None:
        raise ModelError(f"{path}: has a quantized cache in a form that is not read here; {', '.join(CACHES)} are")
    return found


def float_of(weights: Mapping[str, Any]) -> Float | None:
    """The format of floating-point weights; None where it is none of ours."""
    found = next((text for text in FLOATS if same(weights, weights_of(Float(text)))), None)
    return Float(found) if found else None


def same(said: Mapping[str, Any], wanted: Args) -> bool:
    """Whether arguments say what others do; what they leave out is taken as the library does."""
    size = said.get("group_size")
    usual = {"symmetric": True, "dynamic": False, "strategy": "group" if size else "tensor", "group_size": None}
    held = {key: usual.get(key) if said.get(key) is None else said[key] for key in wanted if key != "zp_dtype"}
    return all(type(held[key]) is type(wanted[key]) and held[key] == wanted[key] for key in held)


def integer_of(weights: Mapping[str, Any], path: Path) -> Int:
    """The format of integer weights; ModelError where their scales are shared in another way."""
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group" if size else "tensor")
    order = weights.get("actorder")
    if strategy not in ("channel", "group") or order not in (None, False, "static", "weight"):
        what = one_line(f"strategy '{strategy}', actorder '{order}'")
        raise ModelError(f"{path}: has {what}; only a scale for each group in the order of inputs, or for each output, is read")
    whole = type(weights["num_bits"]) is int and (strategy == "channel" or type(size) is int)
    if type(weights["symmetric"]) is not bool or not whole:
        raise TypeError("num_bits and group_size are to be integers, symmetric true or false")
    return Int(weights["num_bits"], None if strategy == "channel" else size, weights["symmetric"])


def scheme_of(names: tuple[str, str], known: list[tuple[list[str], Scheme]], folder: Path) -> Scheme:
    """The format of a module, by its path and its name on disk: a target that is a name goes before a pattern ("re:..."), and
    that before the class "Linear"."""
    tests: tuple[Callable[[str], bool], ...] = (
        lambda target: target in names,
        lambda target: target.startswith(PATTERN) and any(matches(target.removeprefix(PATTERN), n) for n in names),
        lambda target: target == "Linear",
    )
    for test in tests:
        for targets, fmt in known:
            if any(test(target) for target in targets):
                return fmt
    raise ModelError(f"{folder}: '{one_line(names[1])}' is packed, but no target of config.json names it")
