"""No number that is taken is too large for what is done with it: each has a bound, in configs and on command lines."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import annotated_types
import pytest
import torch
from pydantic import BaseModel

from dp4tl_dist.cli import build_parser, main
from dp4tl_dist.config import TrainConfig, validate
from dp4tl_dist.data.write import WriteOptions
from dp4tl_dist.errors import UserError
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.limits import MAX_DECAY, MAX_RANKS, MAX_RATE, MAX_SIDE, MAX_WAIT_S, MAX_WORKERS, MOST
from dp4tl_dist.recipes import TransferConfig
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.train.optimizer import make_optimizer

FREE = {"lp", "ff", "extras"}
"""Tables of free keys: those of transfer are held against TransferConfig, those of sbatch are sbatch's."""


def numbers(kind: Any, metadata: tuple[Any, ...] = (), name: str = "") -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(dotted name, constraints) of each number in a config, or in an annotation."""
    if kind in (int, float):
        yield name, metadata
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for key, field in kind.model_fields.items():
            if key not in FREE:
                yield from numbers(field.annotation, tuple(field.metadata), f"{name}.{key}".strip("."))
    elif hasattr(kind, "__metadata__"):
        inner = [item for part in kind.__metadata__ for item in getattr(part, "metadata", [part])]
        yield from numbers(kind.__origin__, (*metadata, *inner), name)
    elif get_origin(kind) is not None or get_args(kind):
        for part in get_args(kind):
            yield from numbers(part, metadata, name)


@pytest.mark.parametrize("config", [RunConfig, TrainConfig, TransferConfig, InfluenceConfig])
def test_each_number_of_a_config_has_an_upper_bound(config: type[BaseModel]) -> None:
    found = list(numbers(config))
    assert len(found) > 20
    bounds = (annotated_types.Le, annotated_types.Lt)
    assert [name for name, metadata in found if not any(isinstance(item, bounds) for item in metadata)] == []


def test_each_whole_number_of_a_command_line_has_bounds() -> None:
    (verbs,) = (item for item in build_parser()._actions if isinstance(item, argparse._SubParsersAction))
    loose = [f"{verb} {action.option_strings}" for verb, parser in verbs.choices.items() for action in parser._actions
             if action.type is int]  # fmt: skip
    assert loose == []


@pytest.mark.parametrize(
    ("table", "key", "most"),
    [
        ("engine", "timeout_s", MAX_WAIT_S), ("train", "weight_decay", MAX_DECAY), ("train", "steps", MOST),
        ("train", "epochs", MOST),
        ("train", "resolution", MAX_SIDE), ("train", "val_resolution", MAX_SIDE), ("data", "num_workers", MAX_WORKERS),
        ("checkpoint", "every_minutes", MOST), ("log", "every", MOST),
    ],
)  # fmt: skip
def test_the_bounds_of_a_training(table: str, key: str, most: int) -> None:
    validate(TrainConfig, {table: {key: most}}, source="test")
    for value in (most + 1, 10**18, 10**400):
        with pytest.raises(UserError, match=f"^test: {table}.{key}: .*") as caught:
            validate(TrainConfig, {table: {key: value}}, source="test")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_the_largest_rates_diverge_and_nothing_overflows(optimizer: str) -> None:
    rates = {"optimizer": optimizer, "lr": MAX_RATE, "weight_decay": MAX_DECAY}
    optim = validate(TrainConfig, {"train": rates}, source="test").train
    layer = torch.nn.Linear(2, 2)
    moves = make_optimizer(layer, optim, fused=False)
    for _ in range(3):
        layer(torch.ones(1, 2)).sum().backward()
        moves.step()
    assert not layer.weight.isfinite().all() or layer.weight.abs().max() > 1e6
    with pytest.raises(UserError, match="train.lr"):
        validate(TrainConfig, {"train": {"lr": 1e300}}, source="test")


def test_a_run_has_as_many_ranks_as_can_be_started() -> None:
    content = {"source": {"train": "a"}, "targets": {"t": {"train": "b", "test": "c"}}}
    assert validate(RunConfig, {**content, "nproc": MAX_RANKS}, source="test").nproc == MAX_RANKS
    with pytest.raises(UserError, match="nproc"):
        validate(RunConfig, {**content, "nproc": MAX_RANKS + 1}, source="test")


@pytest.mark.parametrize("wrong", [{"num_workers": MAX_WORKERS + 1}, {"max_side": MOST + 1}, {"seed": 2**63}])
def test_the_bounds_of_writing(wrong: dict[str, int]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(wrong.values()))}"):
        WriteOptions(**wrong)


HUGE = [
    ("write", "--images", "PLACE", "--out", "PLACE/x.beton", "--workers"),
    ("write", "--images", "PLACE", "--out", "PLACE/x.beton", "--max-side"),
    ("vote", "--method", "lm", "--surrogate", "PLACE", "--target", "PLACE", "--out", "PLACE/x.npz", "--resolution"),
    ("vote", "--method", "lm", "--surrogate", "PLACE", "--target", "PLACE", "--out", "PLACE/x.npz", "--workers"),
    ("score", "--method", "el2n", "--surrogate", "PLACE", "--source", "PLACE", "--out", "PLACE/x.npz", "--batch-size"),
    ("cluster", "--surrogate", "PLACE", "--source", "PLACE", "--out", "PLACE/x.npz", "--clusters"),
    ("prune", "--source", "PLACE", "--random", "classes", "--out", "PLACE/x.npz", "--keep-classes"),
    ("prune", "--source", "PLACE", "--random", "classes", "--keep", "0.5", "--out", "PLACE/x.npz", "--seed"),
    ("run", "--config", "demo", "--out", "PLACE/x", "--dry-run", "--nproc"),
]  # fmt: skip


@pytest.mark.parametrize("argv", HUGE, ids=lambda argv: f"{argv[0]} {argv[-1]}")
@pytest.mark.parametrize("value", ["99999999999999999999", "9" * 5000])
def test_a_huge_number_is_told_in_one_line(
    tmp_path: Path, argv: tuple[str, ...], value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*(part.replace("PLACE", str(tmp_path)) for part in argv), value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert argv[-1] in line and f"dp4tl {argv[0]} --help" in line
    assert not list(tmp_path.iterdir())
