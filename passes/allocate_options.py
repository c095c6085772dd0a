"""What a recipe may say of `allocate`, and what of it is no sense together."""

from __future__ import annotations

from abc import ABC
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator

from compress.documents import local_path
from compress.errors import RecipeError
from compress.formats import Dense, Factored, Format, LowRank, parse
from compress.formats.codebooks import paper_grid
from compress.formats.engines import EngineName, refusal
from compress.manager import Pass
from compress.passes import joint
from compress.passes.choices import Bounds
from compress.passes.latency import LATENCY, LatencyTable, read_table
from compress.passes.plan_file import read_plan
from compress.passes.quantize import FormatText
from compress.passes.rates import expanded
from compress.passes.structure import Structure


class Options(Pass, ABC):
    """The options of `allocate`."""

    budget: str | tuple[str, ...] = Field("4.0 bits", description="3.0 bits (a weight), 1.2 GiB or 45 % (the file); or several")
    formats: tuple[FormatText, ...] = Field(
        ("int2:g64", "int3:g64", "int4:g64", "int8:g64"),  # type: ignore[arg-type]  # validated into Formats
        description="candidates for every matrix in the blocks; lq-lora: the 432 of that paper",
    )
    ranks: tuple[int, ...] = Field((0,), description="ranks of a low-rank correction that may be bought; 0 is none")
    factors: FormatText = Field("bf16", description="format of the correction's factors")  # type: ignore[assignment]
    pins: dict[str, str | Bounds] = Field({}, description="pattern -> a format, or {min: FORMAT, max: FORMAT}; later ones win")
    also: tuple[str, ...] = Field((), description="patterns of matrices outside the blocks to choose formats for: embed, lm_head")
    beside: int = Field(
        0, ge=0, description="bytes that artifacts take beyond a checkpoint of ours, for a budget of the file; found by itself"
    )
    grown: dict[str, float] = Field(
        {}, description="format -> bits a weight that an artifact's blocks take beyond it, for such a budget; found by itself"
    )
    limits: dict[str, str] = Field({}, description="pattern -> a budget of its own for these matrices")
    structure: Structure | None = Field(None, description="what may become smaller, {mlp: [shares], kv_groups: [shares] or all}")
    shapes: Literal["uniform", "free"] = Field(
        "uniform", description="with structure: every layer the same shape, as engines want it; or each its own"
    )
    constraints: dict[str, str] = Field(
        {}, description="limits of latency, and with structure of the shape: {parameters: '<= 80 %', kv_cache: '<= 50 %'}"
    )
    latency: LatencyTable | None = Field(
        None, description="a file of 'compress bench RECIPE --table FILE': what each choice takes in time on that machine"
    )
    engine: EngineName | None = Field(
        None, description="what is to serve the model, such as vllm:sm90: formats that it does not run as measured are refused"
    )
    together: Literal["engine", "none"] | tuple[tuple[str, ...], ...] = Field(
        "engine", description="what gets one format: what engines join; nothing; or lists of patterns, block by block"
    )
    metric: Literal["kl", "output", "weight"] = Field("kl", description="what damage is: KL by gradients; or squared errors")
    probe: int = Field(4096, ge=1, description="tokens for gradients and trials, from the end of the calibration text")
    trials: int = Field(
        0, ge=0, description="allocations tried for real, a quantization each: the optimum and others; 0 trusts the prediction"
    )
    time_limit: float = Field(60.0, gt=0, description="seconds for the integer program; what gap is left is told")
    plan: dict[str, str] | None = Field(None, description="a plan.yaml to take as it is: its path, or site -> format")

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, budget: Any) -> Any:
        texts = [budget] if isinstance(budget, str) else budget
        if not isinstance(texts, list | tuple) or not texts or not all(isinstance(t, str) for t in texts):
            raise ValueError(f"{budget} is no budget; write '3.0 bits', '1.2 GiB' or '45 %', or a list of such texts")
        return budget

    @field_validator("formats", mode="before")
    @classmethod
    def _paper(cls, formats: Any) -> Any:
        if formats == "lq-lora":
            return tuple(paper_grid())
        return tuple(expanded(formats)) if isinstance(formats, list | tuple) else formats

    @field_validator("formats")
    @classmethod
    def _plain(cls, formats: tuple[Format, ...]) -> tuple[Format, ...]:
        if not formats:
            raise ValueError("name at least one format")
        product = next((f for f in formats if isinstance(f, Factored)), None)
        if product:
            raise ValueError(f"{product} is made by 'factorize', and is no format to choose; leave it out")
        ranked = [str(f) for f in formats if isinstance(f, LowRank)]
        if ranked:
            raise ValueError(f"{ranked[0]} has a rank; give ranks by 'ranks', and their format by 'factors'")
        return tuple(dict.fromkeys(formats))

    @field_validator("ranks")
    @classmethod
    def _ranks(cls, ranks: tuple[int, ...]) -> tuple[int, ...]:
        if not ranks or min(ranks) < 0:
            raise ValueError("ranks are whole numbers from 0 on, at least one of them")
        return tuple(sorted(set(ranks)))

    @field_validator("pins", mode="before")
    @classmethod
    def _pins(cls, pins: Any) -> Any:
        for pattern, pin in pins.items() if isinstance(pins, dict) else ():
            bounds = isinstance(pin, dict) and pin and pin.keys() <= {"min", "max"}
            if not bounds and not isinstance(pin, str | Bounds):
                raise ValueError(f"'{pattern}' is pinned by a format, or by {{min: FORMAT, max: FORMAT}}, not by {pin}")
        return pins

    @field_validator("together", mode="before")
    @classmethod
    def _together(cls, together: Any) -> Any:
        if isinstance(together, str) and together not in ("engine", "none"):
            raise ValueError(f'\'{together}\' is neither engine nor none; else give lists of patterns, as in [["*.q", "*.k"]]')
        return together

    @field_validator("plan", mode="before")
    @classmethod
    def _read(cls, plan: Any, info: ValidationInfo) -> Any:
        return read_plan((info.context or {}).get("base", Path()) / local_path(plan)) if isinstance(plan, str) else plan

    @field_validator("latency", mode="before")
    @classmethod
    def _timed(cls, table: Any, info: ValidationInfo) -> Any:
        return read_table((info.context or {}).get("base", Path()) / local_path(table)) if isinstance(table, str) else table

    @field_validator("constraints", mode="before")
    @classmethod
    def _numbers(cls, constraints: Any) -> Any:
        if not isinstance(constraints, dict):
            return constraints
        plain = {name: x for name, x in constraints.items() if isinstance(x, int | float) and not isinstance(x, bool)}
        return {**constraints, **{name: str(x) for name, x in plain.items()}}

    @field_validator("constraints")
    @classmethod
    def _limits(cls, constraints: dict[str, str]) -> dict[str, str]:
        for name, text in constraints.items():
            if name not in (*joint.CONSTRAINED, LATENCY):
                raise ValueError(f"'{name}' is none of {', '.join(joint.CONSTRAINED)}, {LATENCY}")
            joint.parsed(text, "ms" if name == LATENCY else "")
        return constraints

    def refuse_unserved(self) -> None:
        """RecipeError for a format that the engine which is to serve the model does not run as it is measured."""
        if self.engine is None:
            return
        pinned = [(("pins", pattern), parse(pin)) for pattern, pin in self.pins.items() if isinstance(pin, str)]
        for at, fmt in [*((("formats",), fmt) for fmt in self.formats), *pinned]:
            if why := refusal(self.engine, fmt):
                raise RecipeError(f"{fmt}: {why}", at)

    @property
    def of_shape(self) -> dict[str, str]:
        """The constraints on the shape alone."""
        return {name: text for name, text in self.constraints.items() if name != LATENCY}

    @model_validator(mode="after")
    def _shaped(self) -> Options:
        chosen = {"constraints": bool(self.of_shape), "shapes": "shapes" in self.chosen()}
        idle = next((n for n, given in chosen.items() if given), None) if self.structure is None else None
        if idle:
            raise ValueError(f"'{idle}' is about shapes, and 'structure' names no other; name some there, or leave it out")
        if self.structure is not None and self.trials:
            raise ValueError("'trials' try formats of one shape; leave them out, or 'structure'")
        if self.structure is not None and self.metric != "kl":
            raise ValueError(f"what a shape costs is measured as KL, and '{self.metric}' cannot be added to it; use metric: kl")
        return self

    @model_validator(mode="after")
    def _nothing_idle(self) -> Options:
        if self.plan is not None:
            idle = [n for n in self.chosen() if n != "plan"]
            if idle:
                raise ValueError(f"a plan is taken as it is; leave out {', '.join(idle)}")
        elif self.factors != Dense(torch.bfloat16) and max(self.ranks) == 0:
            raise ValueError("'factors' is the format of what 'ranks' may buy; name ranks, or leave it out")
        return self
