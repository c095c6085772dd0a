"""What a recipe says under `memory:`: three seams of the loop, each with a table of ways, and what may be held at most.

    optimizer     what is remembered of what learns, and how a gradient moves it     optimizers.py, galore.py, selection.py
    gradients     how long a gradient lives, or what stands in its place             gradients.py, zeroth.py
    activations   what a block keeps for its way back                                saved.py, sketches.py
    weights       whether matrices that do not learn stay in memory                  student.py

A way is a name, or a name with options of its own, `optimizer: {galore: {rank: 64}}`; an option of one way cannot be given to
another. What cannot go together is refused here, with the reason (`Memory._composed`); what hangs on the model, in settings.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from compress.errors import did_you_mean
from compress.training.limits import parsed


class Way(BaseModel):
    """One way, with its options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class AdamW(Way):
    """Two means of every number (arXiv 1711.05101, without decay)."""


class AdamW8bit(Way):
    """The same, each in a byte (arXiv 2110.02861)."""


class Adafactor(Way):
    """A mean of the gradient, and of its square by rows and columns alone (arXiv 1804.04235)."""

    momentum: float = Field(0.9, gt=0, lt=1, description="decay of the mean of the update")


class AdaLomo(Way):
    """Means of the square by rows and columns, and nothing else (arXiv 2310.10195)."""


class Lomo(Way):
    """Gradient descent that remembers nothing, its norm limited (arXiv 2306.09782)."""

    clip: float = Field(1.0, gt=0, description="gradients of a larger norm, all together, are scaled down to it")


class Galore(Way):
    """AdamW in a subspace of each matrix's gradient (arXiv 2403.03507)."""

    rank: int | None = Field(None, ge=1, description="of the subspace; default: a quarter of a matrix's shorter side")
    gap: int = Field(50, ge=1, description="steps after which the subspace is found anew")


class Galore8bit(Galore):
    """The same, its means each in a byte."""


class Block(Way):
    """AdamW on a few blocks at a time (arXiv 2403.17919, 2404.02827, 2406.17296)."""

    select: Literal["gradnorm", "cyclic", "random", "damage"] = Field(
        "gradnorm", description="which blocks learn: by their gradients, in turn, drawn, or by what allocate found they lost"
    )
    active: int = Field(1, ge=1, description="how many blocks learn at a time")
    interval: int = Field(20, ge=1, description="for how many steps")


class Kept(Way):
    """Held until the step."""


class Fused(Way):
    """Used up as soon as it is there."""


class ZerothOrder(Way):
    """None: what the loss does along a direction (arXiv 2305.17333, 2410.07698)."""

    kind: Literal["lozo", "mezo"] = Field("lozo", description="directions of low rank, or of none")
    epsilon: float = Field(1e-2, gt=0, le=1, description="how far to either side is looked, as a share of a tensor's size")
    rank: int | None = Field(None, ge=1, description="lozo: of a direction; default 2")
    lazy: int | None = Field(None, ge=1, description="lozo: steps in which directions share their columns; default 50")

    @model_validator(mode="after")
    def _nothing_idle(self) -> ZerothOrder:
        if self.kind == "mezo" and (idle := [n for n in ("rank", "lazy") if getattr(self, n) is not None]):
            raise ValueError(f"'{idle[0]}' is about kind: lozo; leave it out")
        return self


class Checkpoint(Way):
    """A block's input, from which it is run again."""


class Offload(Way):
    """On the next memory down: of a GPU the machine's, of a CPU a file."""


class Int8(Way):
    """In a byte each (arXiv 2111.11124)."""


class Velora(Way):
    """Of the inputs of linear layers one number for each group of them (arXiv 2405.17991)."""

    groups: int = Field(8, ge=1, description="numbers kept of a token's input")
    scale: float = Field(1.0, gt=0, description="what the gradients that are made of them are multiplied by")


class WtaCrs(Way):
    """Of the inputs of linear layers some tokens' (arXiv 2305.15265)."""

    ratio: float = Field(0.3, gt=0, lt=1, description="share of the tokens whose inputs are kept")


Ways = Mapping[str, type[Way]]
OPTIMIZERS: Ways = {
    "adamw": AdamW, "adamw8bit": AdamW8bit, "adafactor": Adafactor, "lomo": Lomo, "adalomo": AdaLomo, "galore": Galore,
    "galore8bit": Galore8bit, "block": Block,
}  # fmt: skip
GRADIENTS: Ways = {"kept": Kept, "fused": Fused, "zeroth_order": ZerothOrder}
ACTIVATIONS: Ways = {
    "kept": Kept, "checkpoint": Checkpoint, "offload": Offload, "int8": Int8, "velora": Velora, "wta_crs": WtaCrs,
}  # fmt: skip
INPUTS = ("offload", "int8")  # what blocks' inputs can be kept as, where blocks are run again
Named = str | dict[str, dict[str, Any]]


class Memory(BaseModel):
    """What is held while a model learns."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    optimizer: Named | None = Field(None, description=f"what moves the parameters: {', '.join(OPTIMIZERS)}; default adamw")
    gradients: Named | None = Field(
        None, description="kept for the step, the default; fused, used as soon as they are there; or zeroth_order"
    )
    activations: Named | tuple[str, ...] | None = Field(
        None, description="what blocks keep for the way back: kept, checkpoint (their inputs; the default), offload, int8, "
        "velora, wta_crs",
    )  # fmt: skip
    weights: Literal["kept", "streamed"] = Field(
        "kept", description="matrices that do not learn: in memory, or read whenever their layer is called"
    )
    limit: str | None = Field(
        None, description="the most memory that training may take, such as 8 GiB; what else is not said is then chosen to fit"
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _optimizer(cls, given: object) -> Named | None:
        return plain(given, OPTIMIZERS)

    @field_validator("gradients", mode="before")
    @classmethod
    def _gradients(cls, given: object) -> Named | None:
        return plain(given, GRADIENTS)

    @field_validator("activations", mode="before")
    @classmethod
    def _activations(cls, given: object) -> Named | tuple[str, ...] | None:
        if not isinstance(given, list | tuple):
            return plain(given, ACTIVATIONS)
        if len(given) != 2 or given[0] != "checkpoint" or given[1] not in INPUTS:
            raise ValueError("two ways are [checkpoint, int8] or [checkpoint, offload], the second for blocks' inputs; in a "
                             "block that is run again others save nothing")  # fmt: skip
        return tuple(given)

    @field_validator("limit")
    @classmethod
    def _bytes(cls, limit: str | None) -> str | None:
        if limit is not None:
            parsed(limit)
        return limit

    @model_validator(mode="after")
    def _composed(self) -> Memory:
        if named(self.gradients) == "zeroth_order":
            if self.optimizer not in (None, "lomo") and named(self.optimizer) != "lomo":
                raise ValueError(f"'zeroth_order' moves along the direction that it measured, and {named(self.optimizer)} would "
                                 "bend it; use optimizer: lomo, which remembers nothing, or leave it out")  # fmt: skip
            if self.activations not in (None, "kept"):
                raise ValueError("'zeroth_order' has no way back, and nothing is kept for it; leave activations out")
        return self

    # --- the ways that were named, with their options ---

    @property
    def by(self) -> Way:
        """The optimizer."""
        return way(self.optimizer or ("lomo" if isinstance(self.slopes, ZerothOrder) else "adamw"), OPTIMIZERS)

    @property
    def slopes(self) -> Way:
        """The gradients."""
        return way(self.gradients or "kept", GRADIENTS)

    @property
    def keeps(self) -> tuple[Way, ...]:
        """What is kept of activations: one way, or checkpoint and what is done to blocks' inputs."""
        if isinstance(self.activations, tuple):
            return tuple(ACTIVATIONS[name]() for name in self.activations)
        return (way(self.activations or ("kept" if isinstance(self.slopes, ZerothOrder) else "checkpoint"), ACTIVATIONS),)


def plain(given: object, ways: Ways) -> Named | None:
    """A way as it is kept in a recipe: its name, or where it has options its name with all of them. ValueError for what is
    none."""
    if given is None:
        return None
    options: object = {}
    if isinstance(given, Mapping) and len(given) == 1:
        (given, options), = given.items()  # fmt: skip
    if not isinstance(given, str) or given not in ways:
        raise ValueError(f"'{str(given)[:40]}' is none of {', '.join(ways)}")
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"the options of '{given}' are a mapping, not '{str(options)[:40]}'")
    try:
        found = ways[given].model_validate(options or {}).model_dump(mode="json")
    except ValidationError as e:
        raise ValueError(disliked(e, given, ways[given])) from None
    return {given: found} if found else given


def disliked(e: ValidationError, name: str, way_: type[Way]) -> str:
    """What is wrong with the options of a way."""
    first, known = e.errors()[0], list(way_.model_fields)
    if not first["loc"]:
        return f"{name}: {first['msg'].removeprefix('Value error, ')}"
    option = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        has = f"options: {', '.join(known)}" if known else f"it has none; write {name} alone"
        return f"'{name}' has no option '{option[:40]}'{did_you_mean(option, known)}   {has}"
    return f"'{option}' of '{name}' {first['msg'].replace('Input should be', 'must be')}, not '{str(first['input'])[:40]}'"


def named(given: object) -> str:
    """The name of a way, from what a recipe says."""
    return str(next(iter(given), "")) if isinstance(given, Mapping) else str(given)


def way(given: Named, ways: Ways) -> Way:
    return ways[named(given)].model_validate(given[named(given)] if isinstance(given, dict) else {})
