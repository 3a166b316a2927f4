"""What a run folder holds, finished or not: stages, arms, metrics and warnings, as plain values."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dp4tl_dist.arm_name import AUTO, base_of, parse_arm
from dp4tl_dist.config import validate
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.subset import Subset, load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import read_json
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.marks import Marks, marked
from dp4tl_dist.report.artefacts import meta_of, run_folder, stages_of
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph, Trial

MANY_STAGES, MOST = 150, 1e15
PARTS = ("surrogate", "voting", "pretraining", "transfer")
STATES = ("done", "started", "stopped", "failed", "pending")
"""Of a stage. started: it is going on, or was cut off. stopped: it ended before its time, and can go on."""
ROBUST = "-robust"
"""Behind a transfer's mode: its accuracy under attack."""
Value = TypeVar("Value")
Metrics = list[dict[str, Any]]


@dataclass(frozen=True)
class Arm:
    """One arm on one target, over the seeds that are done so far."""

    name: str
    method: str
    options: str
    """What the name has beside method and share: "+SURROGATE", "+steps" or both; mostly empty."""
    keep: float
    target: str
    trials: tuple[Trial, ...]
    accuracy: dict[str, list[float]]
    """Test accuracies in %, by `Run.measures`; a seed that is not measured yet is absent."""
    seconds: dict[str, float | None]
    """Mean wall seconds of each of PARTS; None while no seed has them."""
    samples: float | None
    marks: tuple[str, ...] = ()
    """What a reader must know before believing its numbers."""

    @property
    def shown(self) -> str:
        return marked(self.name, self.marks)

    @property
    def voter(self) -> str:
        """What names the votes file that the arm chooses by."""
        found = parse_arm(self.name)
        surrogate = f"+{found.surrogate}" if found and found.surrogate else ""
        return base_of(self.method) + surrogate

    @property
    def ratio(self) -> float:
        """The pruning ratio in %."""
        return 100 * (1 - self.keep)

    @property
    def total(self) -> float | None:
        """Seconds to the pretrained model, the selection's cost included; None while that is not known."""
        spent = [self.seconds[part] for part in PARTS[:3]]
        return None if any(value is None for value in spent) else sum(value for value in spent if value is not None)


@dataclass
class Run:
    """A run folder, read as far as it goes. What cannot be read is left out and named in `problems`."""

    out: Path
    config: RunConfig
    graph: Graph
    problems: list[str] = field(default_factory=list)

    def attempt(self, read: Callable[..., Value], *args: Any, **more: Any) -> Value | None:
        """What `read` returns for these arguments; None, and a line in `problems`, where a file is damaged or gone."""
        try:
            return read(*args, **more)
        except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            text = str(error) if isinstance(error, UserError | OSError) else f"{type(error).__name__}: {error}"
            if text not in self.problems:
                self.problems.append(text)
            return None

    @property
    def detail(self) -> float:
        """How much of what could be shown the page takes: the part that keeps it small where stages are many."""
        return min(1.0, MANY_STAGES / len(self.graph.stages))

    @cached_property
    def records(self) -> dict[str, dict[str, Any]]:
        """Each stage's record, {} while it is pending."""
        paths = {name: self.out / "stages" / f"{name}.json" for name in self.graph.stages}
        read = {name: self.attempt(read_json, path) for name, path in paths.items() if path.exists()}
        return {name: found if isinstance(found := read.get(name), dict) else {} for name in paths}

    def status(self, stage: str) -> str:
        """One of STATES."""
        record = self.records[stage]
        if record.get("status") == "running":
            return "stopped" if "error" in record else "started"
        return status if (status := record.get("status")) in ("done", "failed") else "pending"

    def seconds(self, stage: str) -> float | None:
        """Wall seconds of a finished stage."""
        value = number(self.records[stage].get("seconds"))
        return float(value) if self.status(stage) == "done" and value is not None and value >= 0 else None

    @cached_property
    def trainings(self) -> dict[str, Metrics]:
        """metrics.jsonl of each training stage that has begun; a transfer's as well."""
        found = {}
        for name, stage in self.graph.stages.items():
            if stage.distributed and stage.argv[0] in ("train", "transfer"):
                path = run_folder(stage, done=self.status(name) == "done") / "metrics.jsonl"
                lines = self.attempt(read_jsonl, path)
                if lines:
                    found[name] = [line for line in lines if isinstance(line, dict)]
        return found

    @cached_property
    def metas(self) -> dict[str, dict[str, Any]]:
        """What each stage's output says of itself (of a training: its newest checkpoint); {} while there is none."""
        read = {
            name: self.attempt(meta_of, stage, done=self.status(name) == "done")
            for name, stage in self.graph.stages.items()
        }
        return {name: found if isinstance(found, dict) else {} for name, found in read.items()}

    @cached_property
    def betons(self) -> dict[str, Beton]:
        """The datasets that are written: "source", "source-val", "TARGET-train" and "TARGET-test"."""
        graph = self.graph
        paths = {"source": graph.source, **({"source-val": graph.source_val} if graph.source_val else {})}
        for target, (train, test) in graph.targets.items():
            paths |= {f"{target}-train": train, f"{target}-test": test}
        read = {name: self.attempt(open_beton, path) for name, path in paths.items() if path.exists()}
        return {name: beton for name, beton in read.items() if beton is not None}

    def subset(self, trial: Trial) -> Subset | None:
        """The trial's subset, checked against the source; None for dense and while it is pending."""
        path = trial.subset
        if path is None or not path.exists():
            return None
        return self.attempt(load_subset, path, beton=self.betons.get("source"))

    @cached_property
    def marks(self) -> Marks:
        return Marks(self.graph)

    @cached_property
    def arms(self) -> list[Arm]:
        """Every arm on every target, in the config's order."""
        return [self._arm(arm, target) for target in self.config.targets for arm in self.config.arms]

    @property
    def measures(self) -> list[str]:
        """What arms are judged by: the transfer's modes, and each with ROBUST behind it where attacks are run."""
        modes = self.config.transfer.modes
        return [*modes] + [mode + ROBUST for mode in modes if self.config.transfer.robust]

    def _accuracies(self, trials: tuple[Trial, ...], measure: str) -> list[float]:
        key = "robust_top1" if measure.endswith(ROBUST) else "top1"
        mode = next(mode for mode in self.config.transfer.modes if mode == measure.removesuffix(ROBUST))
        stages = [trial.transfers[mode] for trial in trials]
        found = [number(self.metas[stage].get(key)) for stage in stages if self.status(stage) == "done"]
        return [100 * value for value in found if value is not None and 0 <= value <= 1]

    def _arm(self, name: str, target: str) -> Arm:
        found = parse_arm(name)
        trials = tuple(trial for trial in self.graph.trials if (trial.arm, trial.target) == (name, target))
        accuracy = {measure: self._accuracies(trials, measure) for measure in self.measures}
        counts = [len(subset.indices) for trial in trials if (subset := self.subset(trial))]
        if not counts:
            said = [self.metas[trial.pretrain].get("num_samples") for trial in trials]
            counts = [value for value in said if isinstance(value, int) and 0 < value < 1 << 62]
        method, keep = (found.kind, self._share_kept(found.keep, trials)) if found else (name, 1.0)
        seconds = {part: self._mean_seconds(trials, part) for part in PARTS}
        options = "".join(name.partition("@")[2].partition("+")[1:])
        marks = {line for trial in trials for line in self.marks.of(trial, trial.transfers.values())}
        samples = statistics.fmean(counts) if counts else None
        return Arm(name, method, options, keep, target, trials, accuracy, seconds, samples, tuple(sorted(marks)))

    def _share_kept(self, keep: str, trials: tuple[Trial, ...]) -> float:
        """The share of the classes that an arm's name gives; at "auto" its subsets tell it, once they are there."""
        if keep != AUTO:
            return float(keep)
        kept = [1 - subset.ratio for trial in trials if (subset := self.subset(trial))]
        return statistics.fmean(kept) if kept else 1.0

    def _mean_seconds(self, trials: tuple[Trial, ...], part: str) -> float | None:
        """The mean over the seeds whose stages of that part are all done."""
        sums = []
        for trial in trials:
            values = [self.seconds(stage) for stage in stages_of(trial, part)]
            if all(value is not None for value in values):
                sums.append(sum(value for value in values if value is not None))
        return statistics.fmean(sums) if sums else None

    def last_sign(self) -> float | None:
        """When the run last wrote anything, in seconds since the epoch."""
        paths = [*self.out.glob("logs/*.log"), *self.out.glob("stages/*.json")]
        return max((path.stat().st_mtime for path in paths), default=None)


def read_run(out: Path) -> Run:
    """Open what `dp4tl run --out` made. Anything else is a UserError."""
    path = out / "config.json"
    if not path.is_file():
        raise UserError(f"{out} holds no run: pass the folder that `dp4tl run --out` made")
    content = read_json(path)
    if not isinstance(content, dict) or "targets" not in content:
        raise UserError(f"{path} is not the config of a run: pass the folder that `dp4tl run --out` made")
    config = validate(RunConfig, content, source=str(path))
    return Run(out, config, Graph(config, out))


def number(value: object) -> int | float | None:
    """A file's value where it is a number that can be averaged and shown: neither endless nor without end."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if abs(value) < MOST else None


def spoken(measure: str) -> str:
    """A measure as people say it."""
    return measure.replace(ROBUST, " under attack")


def mean_std(values: list[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are too few values."""
    mean = statistics.fmean(values) if values else None
    return mean, statistics.stdev(values) if len(values) > 1 else None


def thin(rows: list[Any], limit: int) -> list[Any]:
    """At most `limit` of `rows`, evenly spread, the first and the last among them."""
    if len(rows) <= limit:
        return rows
    return [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, limit).round().astype(int))]
