"""A sweep's config: the axes of a study, and the run that they unfold to. Every combination is an arm of that run, so
that what arms share (files, surrogates, votes, dense models) is made once."""

from itertools import product
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from dp4tl_dist.arm_name import AUTO, STEPS, parse_arm
from dp4tl_dist.config import Share, Table, apply_overrides, find_config, load_config, read_toml, validate
from dp4tl_dist.errors import UserError
from dp4tl_dist.run_config import RunConfig


class Axes(Table):
    """What a sweep's config has beside a run's keys, in place of `arms`; targets, seeds and surrogates are axes too."""

    methods: Annotated[tuple[str, ...], Field(min_length=1)] = ("lm", "random")
    """Each method is an arm at each of `keeps`."""
    keeps: Annotated[tuple[Share | Literal["auto"], ...], Field(min_length=1)] = (0.5,)
    """Shares of the classes to keep, or "auto"."""
    budgets: Annotated[tuple[Literal["epochs", "steps"], ...], Field(min_length=1)] = ("epochs",)
    """Train each arm for as many epochs as dense, for as many steps, or both."""
    dense: bool = True
    """Also pretrain on everything."""

    @field_validator("methods", "keeps", "budgets")
    @classmethod
    def _none_twice(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) != len(values):
            raise ValueError("none may be named twice")
        return values


def read_sweep(name: str, overrides: list[str]) -> RunConfig:
    """The run that a sweep's config unfolds to: the axes become its arms."""
    content = apply_overrides(read_toml(find_config(name)), overrides)
    if "arms" in content:
        raise UserError(f"{name}: a sweep makes its arms of methods, keeps and budgets: leave `arms` out, or use `run`")
    axes = validate(Axes, {key: content.pop(key) for key in Axes.model_fields if key in content}, source=name)
    table = content.get("surrogates")
    surrogates = list(table) if isinstance(table, dict) else []
    if "surrogate" in content or not surrogates:
        surrogates.insert(0, "")
    return validate(RunConfig, {**content, "arms": arms_of(axes, surrogates)}, source=name)


def read_run(name: str, overrides: list[str]) -> RunConfig:
    """The run that a config describes: its own, or the one that a sweep's axes unfold to."""
    content = apply_overrides(read_toml(find_config(name)), overrides)
    return read_sweep(name, overrides) if content.keys() & Axes.model_fields.keys() else load_config(
        RunConfig, name, overrides
    )  # fmt: skip


def arms_of(axes: Axes, surrogates: list[str]) -> list[str]:
    """The names of all combinations, methods that vote before the random ones that follow their size."""
    names = ["dense"] if axes.dense else []
    for keep, budget, method in product(axes.keeps, axes.budgets, axes.methods):
        text = keep if keep == AUTO else f"{float(keep):.6f}".rstrip("0").rstrip(".")
        plain = f"{method}@{text}"
        arm = parse_arm(plain)
        which = surrogates if arm is None or arm.asks_surrogate else [""]
        names += [plain + "".join(f"+{part}" for part in (name, STEPS * (budget == "steps")) if part) for name in which]
    return names
