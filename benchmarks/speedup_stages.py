"""The stages that `speedup.py` times: what the verbs do, one after another in one process that is warm."""

import contextlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import harness
import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.cli import main as dp4tl
from dp4tl_dist.config import EngineConfig, Share, Table, TrainConfig
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.prune.make import prune
from dp4tl_dist.prune.select import combine, count_for_share, rank_groups
from dp4tl_dist.prune.vote import vote
from dp4tl_dist.prune.votes_file import load_votes
from dp4tl_dist.run_config import SYNTHETIC, StageTrain
from dp4tl_dist.train.supervised import train
from dp4tl_dist.world import World


class SurrogateTable(StageTrain):
    """A surrogate's recipe, and the share of the source's samples that it sees."""

    share: Share = 1.0


class SpeedupConfig(Table):
    """What speedup.py runs."""

    source: str
    """A beton, a folder of <class>/<image>, or "synthetic:source/train"."""
    target: str
    pretrain: StageTrain
    surrogate: SurrogateTable
    reference: SurrogateTable
    engine: EngineConfig = EngineConfig()


class Stages:
    """Files in a folder, and the seconds of what makes them."""

    def __init__(self, config: SpeedupConfig, world: World, folder: Path) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.source, self.target = self.beton("source", config.source), self.beton("target", config.target)
        self.beton_of_source = open_beton(self.source)

    def beton(self, name: str, origin: str) -> Path:
        """The beton of a dataset, made here unless it is one."""
        if origin.endswith(".beton"):
            return Path(origin)
        out = self.folder / f"{name}.beton"
        drawn = origin.startswith(SYNTHETIC)
        what = ["--synthetic", origin.removeprefix(SYNTHETIC)] if drawn else ["--images", origin]
        argv = ["write", *what, "--out", str(out), *(["--max-side", "0"] if drawn else [])]
        if timed(lambda: dp4tl(argv))[1]:
            harness.refuse(f"the {name} could not be written: its error stands above")
        return out

    def warm_up(self, table: StageTrain) -> None:
        """An epoch of two steps: what is compiled, allocated and imported once does not count."""
        few, total = self.folder / "few.npz", self.beton_of_source.num_samples
        keep = min(1.0, 2 * table.train.batch_size / total)
        prune(source=self.source, out=few, random="samples", keep=keep, force=True)
        short = table.train.model_copy(update={"epochs": 1, "peak_epoch": 0.0})
        self.train("warmup", table.model_copy(update={"train": short}), few)

    def train(self, name: str, table: StageTrain, subset: Path | None) -> dict[str, Any]:
        """Train as `table` says; its seconds, and those of each epoch."""
        data = {key: getattr(table, key) for key in ("min_scale", "flip", "page_aware", "num_workers")}
        content = {
            "data": {"train": str(self.source), "subset": str(subset or ""), **data},
            "model": table.model.model_dump(), "task": table.task.model_dump(), "train": table.train.model_dump(),
            "engine": self.config.engine.model_dump(), "log": {"tensorboard": False, "every": 1_000_000},
            "checkpoint": {"every_minutes": 0, "epoch_end_s": 1e9},
        }  # fmt: skip
        out = self.folder / name
        config = TrainConfig.model_validate(content)
        seconds, meta = timed(lambda: train(config, out=out, world=self.world, force=True))
        ends = [line["seconds"] for line in read_jsonl(out / "metrics.jsonl") if line["kind"] == "epoch"]
        return {"seconds": seconds, "samples": meta["num_samples"], "seen": meta["samples_seen"],
                "epochs": np.diff([0.0, *ends]).tolist()}  # fmt: skip

    def surrogate(self, name: str, table: SurrogateTable) -> dict[str, Any]:
        """Train a surrogate, on a random share of the samples where it asks for one, and let it vote (LM)."""
        part, drawn = None, 0.0
        if table.share < 1:
            part = self.folder / f"{name}.part.npz"
            options = {"random": "samples", "keep": table.share, "force": True}
            drawn, _ = timed(lambda: prune(source=self.source, out=part, **options))  # type: ignore[arg-type]
        found = self.train(name, table, part)
        voted, _ = timed(
            lambda: vote(
                self.world, method="lm", surrogate=self.folder / name, targets=[self.target], source=self.source,
                out=self.votes(name), force=True,
            )
        )  # fmt: skip
        return found | {"seconds": found["seconds"] + drawn, "voting": voted}

    def votes(self, surrogate: str) -> Path:
        return self.folder / f"{surrogate}.votes.npz"

    def prune(self, surrogate: str, keep: float) -> tuple[float, Path]:
        """Seconds to choose by a surrogate's votes, and the subset."""
        out = self.folder / f"{surrogate}-{keep:g}.npz"
        seconds, _ = timed(
            lambda: prune(source=self.source, out=out, votes=self.votes(surrogate), keep=keep, force=True)
        )
        return seconds, out

    def ranking(self, surrogate: str) -> NDArray[np.int64]:
        cast = load_votes(self.votes(surrogate))
        return rank_groups(*combine(cast.votes, cast.affinity))

    def agreement(self, one: str, other: str, keep: float) -> float:
        """The share of the classes kept by one surrogate's votes that the other's keep, too."""
        first, second = self.ranking(one), self.ranking(other)
        count = count_for_share(len(first), keep)
        return len(np.intersect1d(first[:count], second[:count])) / count

    def num_samples(self, subset: Path) -> int:
        return len(load_subset(subset, beton=self.beton_of_source).indices)


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """Wall seconds of `run`, whose lines for people are swallowed, and what it returns."""
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.perf_counter()
        result = run()
        return time.perf_counter() - start, result


def spread(values: list[float]) -> dict[str, float]:
    return {"n": len(values), "median": median(values), "min": min(values), "max": max(values)}
