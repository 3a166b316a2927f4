"""`dp4tl advise`: how much of a source to keep, and what that costs. From the votes and the file's tables: no image is
read and no torch is loaded, unless the speed of this machine is to be measured."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.config import DataConfig, OptimConfig, TrainConfig, apply_overrides, find_config, read_toml, validate
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import read_json, unfinished_in
from dp4tl_dist.prune import select
from dp4tl_dist.prune.amount import ENOUGH, coverage_curve, knee, suggest
from dp4tl_dist.prune.choice import join_votes
from dp4tl_dist.prune.influence import Influence, agreement, rank_influence
from dp4tl_dist.prune.votes_file import Votes, load_votes
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.sides import trained_at
from dp4tl_dist.train.cost import FORWARD, Speed, train_seconds

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
CHOOSE_S = 1.0
"""Seconds that `prune` takes, its start included."""


@dataclass(frozen=True)
class Surrogate:
    """What a trained surrogate's checkpoint tells of its own cost."""

    seconds: float
    """Of its training, start-up not counted."""
    images_per_s: float
    """Over that training, validation and all."""
    resolution: int
    val_resolution: int


@dataclass(frozen=True)
class Size:
    """One number of classes to keep, with all that follows from it."""

    keep: float
    classes: int
    samples: int
    bytes: int
    coverage: float
    hours: float | None
    """Of pretraining, and of the surrogate, the vote and the choice, where they are needed."""
    speed_up: float | None
    """Over keeping everything."""
    notes: tuple[str, ...]


class Advice:
    """The ranking of the classes with what each number of them means, for one source and one way of counting."""

    def __init__(self, beton: Beton, cast: Sequence[Votes], votes: NDArray[np.number], ranking: select.Groups) -> None:
        self.beton, self.cast, self.ranking = beton, cast, ranking
        self.votes, total = votes[ranking], len(ranking)
        self.names, members = cast[0].classes, cast[0].members
        groups = beton.labels_for("advice by classes") if members is None else members.assignment
        self.group_of_sample: NDArray[np.integer] = groups
        counts = np.bincount(self.group_of_sample, minlength=total)[ranking]
        bytes_each = beton.sizes.astype(np.float64)
        sizes = np.bincount(self.group_of_sample, weights=bytes_each, minlength=total)[ranking]
        self.samples, self.bytes = np.cumsum(counts), np.cumsum(sizes).astype(np.int64)
        self.coverage = coverage_curve(self.votes)
        self.without_votes = np.sort(ranking[self.votes == 0])
        self.suggestion = suggest(self.votes)

    @property
    def num_voters(self) -> int:
        return sum(len(item.predictions) for item in self.cast)

    def interesting(self) -> dict[int, list[str]]:
        """Numbers of classes to show, ascending, and what is special about each."""
        total = len(self.ranking)
        notes: dict[int, list[str]] = {select.count_for_share(total, share): [] for share in SHARES}
        for count, note in (
            (knee(self.votes), "knee"),
            (select.count_for_coverage(self.votes, ENOUGH), f"{100 * ENOUGH:g} % of the votes"),
            (total - len(self.without_votes), "all classes with votes"),
            (self.suggestion.count, "suggested"),
        ):
            notes.setdefault(count, []).append(note)
        return dict(sorted(notes.items()))


@dataclass(frozen=True)
class Costs:
    """What the sizes cost under one recipe on one machine."""

    optim: OptimConfig
    speed: Speed
    num_val: int
    surrogate: Surrogate | None
    to_vote: int
    """Images that the surrogate looks at."""

    def pretraining(self, num_samples: int, total: int) -> float:
        """Seconds of pretraining on that many of `total` samples; of the validation set as large a part is left."""
        num_val = round(self.num_val * num_samples / total)
        return train_seconds(self.optim, num_samples, self.speed, num_val=num_val)

    @property
    def surrogate_s(self) -> float:
        return self.speed.startup_s + self.surrogate.seconds if self.surrogate else 0.0

    @property
    def vote_s(self) -> float:
        """By the surrogate's own speed in training, of which a forward pass is a part."""
        if self.surrogate is None:
            return 0.0
        pixels = (self.surrogate.val_resolution / self.surrogate.resolution) ** 2
        return self.speed.startup_s + self.to_vote * pixels * FORWARD / self.surrogate.images_per_s

    @property
    def selection_s(self) -> float:
        return self.surrogate_s + self.vote_s + CHOOSE_S


def read_votes(paths: Sequence[Path], source: Path, *, combine: str, weights: list[float] | None) -> Advice:
    """Open the source and the votes for it, and rank its classes as `prune` does."""
    beton = open_beton(source)
    cast = [load_votes(path, beton=beton) for path in paths]
    votes, affinity = join_votes(cast, tuple(paths))
    combined, closeness = select.combine(votes, affinity, how=combine, weights=weights)
    return Advice(beton, cast, combined, select.rank_groups(combined, closeness))


def read_recipe(name: str, overrides: list[str]) -> TrainConfig:
    """The recipe that `--config` names: a training config, or the pretraining of a whole run's."""
    content = apply_overrides(read_toml(find_config(name)), overrides)
    if "targets" not in content:
        return validate(TrainConfig, content, source=name)
    run = validate(RunConfig, content, source=name)
    table = run.pretrain
    data = {key: getattr(table, key) for key in ("min_scale", "flip", "page_aware", "num_workers")}
    return TrainConfig(
        data=DataConfig(**data), model=table.model, task=table.task, train=table.train, engine=run.engine, log=run.log,
        checkpoint=run.checkpoint,
    )  # fmt: skip


def read_surrogate(path: Path, *, allow_incomplete: bool = False) -> Surrogate:
    """What the newest checkpoint of a run folder, or a checkpoint folder, says of its training. Reads JSON alone."""
    found = sorted((path / "checkpoints").glob("step_*/meta.json"))[-1:] or [path / "meta.json"]
    try:
        meta = read_json(found[0])
        network = trained_at(meta, found[0].parent)
        seconds, seen = float(meta["seconds"]), float(meta["samples_seen"])
    except (KeyError, TypeError, ValueError) as error:
        reason = str(error) if isinstance(error, UserError) else f"no usable {error} in {found[0]}"
        raise UserError(f"--surrogate {path}: {reason}: name the checkpoint or run folder that voted") from error
    if not (0 < seconds < math.inf and 0 < seen < math.inf):
        raise UserError(f"--surrogate {path} was trained for {seconds} s on {seen} images: name the one that voted")
    if not (allow_incomplete or meta.get("complete") is True):
        raise UserError(f"--surrogate {path} is not trained to its end: finish it, or add --allow-incomplete")
    return Surrogate(seconds, seen / seconds, network.resolution, network.val_resolution)


def surrogates_of(cast: Sequence[Votes]) -> list[Path]:
    """The distinct surrogates that voted, by the paths in the votes' meta, where they still are."""
    configs = [item.meta.get("config") for item in cast]
    names = [config.get("surrogate") for config in configs if isinstance(config, dict)]
    return [path for path in dict.fromkeys(Path(name) for name in names if isinstance(name, str)) if path.is_dir()]


def size_of(advice: Advice, count: int, notes: Sequence[str], costs: Costs | None) -> Size:
    samples, total = int(advice.samples[count - 1]), advice.beton.num_samples
    hours = speed_up = None
    if costs is not None and samples >= costs.optim.batch_size:
        selection = 0.0 if count == len(advice.ranking) else costs.selection_s
        seconds = costs.pretraining(samples, total) + selection
        hours, speed_up = seconds / 3600, costs.pretraining(total, total) / seconds
    keep = count / len(advice.ranking)
    coverage = float(advice.coverage[count - 1])
    return Size(keep, count, samples, int(advice.bytes[count - 1]), coverage, hours, speed_up, tuple(notes))


def advise(advice: Advice, costs: Costs | None, influence: Influence | None = None) -> dict[str, Any]:
    """All that is to be said, as plain JSON types: `--json` prints it, `as_text` shows it.

    With `influence`, also how far the ranking by votes agrees with that by brute force.
    """
    sizes = [size_of(advice, count, notes, costs) for count, notes in advice.interesting().items()]
    chosen = next(size for size in sizes if size.classes == advice.suggestion.count)
    dense = sizes[-1]
    reason = advice.suggestion.reason
    if costs is not None and chosen.speed_up is not None and chosen.classes < dense.classes and chosen.speed_up <= 1:
        reason += (
            f"; it does not pay for one target under this recipe: choosing takes {clock(costs.selection_s)}, and "
            f"pretraining on everything {clock(costs.pretraining(dense.samples, dense.samples))}"
        )
    zero = advice.without_votes
    return {
        "kind": "advice",
        "source": {"path": str(advice.beton.path), "fingerprint": advice.beton.fingerprint},
        "num_targets": sum(len(item.target_sizes) for item in advice.cast),
        "num_voters": advice.num_voters,
        "unfinished": [line for item in advice.cast for line in unfinished_in(item.meta)],
        "num_classes": len(advice.ranking),
        "groups_are": advice.cast[0].what,
        "agreement": None if influence is None else agreement(advice.ranking, rank_influence(influence.influence)),
        "suggestion": {**asdict(chosen), "rule": advice.suggestion.rule, "reason": reason},
        "knee": knee(advice.votes),
        "zero_votes": {
            "classes": zero.tolist(),
            "names": [advice.names[i] for i in zero],
            "samples": int(np.isin(advice.group_of_sample, zero).sum()),
        },
        "sizes": [asdict(size) for size in sizes],
        "curve": {
            "ranking": advice.ranking.tolist(),
            "coverage": [round(share, 6) for share in advice.coverage.tolist()],
            "samples": advice.samples.tolist(),
            "bytes": advice.bytes.tolist(),
        },
        "costs": costs and {
            "speed": asdict(costs.speed), "surrogate_s": costs.surrogate_s, "vote_s": costs.vote_s,
            "prune_s": CHOOSE_S, "pretrain_dense_s": costs.pretraining(dense.samples, dense.samples),
            "pretrain_s": costs.pretraining(chosen.samples, dense.samples),
        },
    }  # fmt: skip


def clock(seconds: float) -> str:
    """ "12.3 s", "45 min" or "5.4 h"."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def with_paths(recipe: TrainConfig, source: Path, val: Path | None) -> TrainConfig:
    """`recipe` on `source`, ready to be measured."""
    data = recipe.data.model_copy(update={"train": str(source), "val": str(val or ""), "subset": "", "val_subset": ""})
    return recipe.model_copy(update={"data": data})


def costs_of(advice: Advice, optim: OptimConfig, speed: Speed, read: Sequence[Surrogate], val: Path | None) -> Costs:
    """The costs of one recipe at one speed; those of all surrogates that voted count together."""
    whole = replace(read[0], seconds=sum(item.seconds for item in read)) if read else None
    by_features = sum(advice.beton.num_samples for item in advice.cast if item.method == "fm")
    num_val = open_beton(val).num_samples if val else 0
    return Costs(optim, speed, num_val, whole, advice.num_voters + by_features)
