"""The `[slurm]` table of a run's config: what each stage asks a cluster for."""

import fnmatch
import re

from pydantic import field_validator, model_validator

from dp4tl_dist.config_file import Count, CountOrNone, Ranks, Table
from dp4tl_dist.stage import Stage

Extra = bool | int | str
OPTION = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
# A stage is one job that is told what to run and where to log: these would make it another.
KEPT = ("array", "dependency", "error", "job-name", "open-mode", "output", "signal", "test-only", "wrap")
# "10:00" is ten minutes to sbatch and ten hours to many readers: it is not taken.
TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)|(?P<only>\d+)")


class StageResources(Table):
    """What one job asks for. A key that is left out keeps the value of the table above."""

    nodes: Ranks | None = None
    tasks: Ranks | None = None
    """Ranks on each node. Left out: one for each GPU, or the run's `nproc` without GPUs."""
    gpus: CountOrNone | None = None
    """GPUs on each node."""
    cpus: Count | None = None
    """Cores for each rank."""
    memory: str | None = None
    """Of each node, with a unit: "64G"."""
    time: str | None = None
    """The limit: "HH:MM:SS", "D-HH:MM:SS", or minutes."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    max_restarts: CountOrNone | None = None
    """How often a job goes back to the queue by itself: at its limit, when preempted, or after losing a rank."""
    stop_before_s: Count | None = None
    """Seconds before its limit at which a job saves and stops."""
    extras: dict[str, Extra] = {}
    """Any other option of sbatch by its long name: {exclusive = true, "mail-type" = "FAIL"}."""

    @field_validator("time")
    @classmethod
    def _a_time(cls, time: str | None) -> str | None:
        if time is not None and not minutes(time):
            raise ValueError('not a time limit: write "HH:MM:SS", "D-HH:MM:SS" or minutes')
        return time

    @model_validator(mode="after")
    def _within_a_line(self) -> "StageResources":
        """What stands here goes into a batch script, one option a line: it must stay in its line, and its option."""
        for key in self.extras:
            if not OPTION.fullmatch(key):
                raise ValueError(f"extras: {key!r} is not an option of sbatch: write its long name, like mail-type")
            if key in KEPT:
                raise ValueError(f"extras: {key!r} is not for a run to set: each stage is a job of its own")
        own = {name: value for name, value in self.__dict__.items() if name in StageResources.model_fields}
        for name, value in {**own, **self.extras}.items():
            if isinstance(value, str) and not value.isprintable():
                raise ValueError(f"{name}: {value!r} holds a line end or another character that does not print")
        return self


class SlurmConfig(StageResources):
    """For all stages, with overrides in `[slurm.stages.NAME]`."""

    nodes: Ranks | None = 1
    gpus: CountOrNone | None = 0
    time: str | None = "4:00:00"
    max_restarts: CountOrNone | None = 20
    stop_before_s: Count | None = 120
    stages: dict[str, StageResources] = {}
    """By a stage's kind (write, surrogate, cluster, vote, score, prune, compact, pretrain, transfer, report), its name,
    or a pattern of names ("pretrain-dense*"). Later ones win."""

    def resources(self, stage: str, *, distributed: bool, nproc: int) -> StageResources:
        """What the stage of that name asks for. One that is not distributed is one task without a GPU."""
        whole = self.model_dump(exclude={"stages"}, exclude_none=True)
        if not distributed:
            whole |= {"nodes": 1, "tasks": 1, "gpus": 0}
        for pattern, table in self.stages.items():
            if stage.partition("-")[0] == pattern or fnmatch.fnmatchcase(stage, pattern):
                given = table.model_dump(exclude_none=True)
                whole |= {**given, "extras": {**whole["extras"], **given["extras"]}}
        whole.setdefault("tasks", whole["gpus"] or nproc)
        return StageResources(**whole)

    def ranks(self, stage: Stage, nproc: int) -> int:
        """The ranks of a stage, on all of its nodes."""
        given = self.resources(stage.name, distributed=stage.distributed, nproc=nproc)
        return (given.nodes or 1) * (given.tasks or 1)


def minutes(time: str) -> int:
    """A SLURM time limit in whole minutes, rounded up; 0 where it is none."""
    found = TIME.fullmatch(time)
    if not found:
        return 0
    if found["only"]:
        return int(found["only"])
    days, hours, mins, seconds = (int(found[name] or 0) for name in ("days", "hours", "minutes", "seconds"))
    return (days * 24 + hours) * 60 + mins + (seconds > 0)
