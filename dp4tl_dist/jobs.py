"""The jobs of a run: which stages they wait for, where they stand, and how they ended."""

import getpass
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from dp4tl_dist.errors import EXIT_DONE, EXIT_FAILURE, UserError
from dp4tl_dist.files import read_json, write_json
from dp4tl_dist.log import on_terminal, say
from dp4tl_dist.records import plan, read_record
from dp4tl_dist.stage import Stage
from dp4tl_dist.stages import Graph

POLL_S = 2.0
REPORT = "report"


class SavedJobs:
    """RUN_DIR/jobs.json: the last job of each stage, and the config that it was submitted with."""

    def __init__(self, out: Path) -> None:
        self.path = out / "jobs.json"
        found = read_json(self.path) if self.path.exists() else {}
        well = isinstance(found, dict) and all(isinstance(item, dict) and "job" in item for item in found.values())
        if not well:
            raise UserError(f"{self.path} is not what launch/submit.py writes: remove it, and submit again")
        self.entries: dict[str, dict[str, str]] = found

    def ids(self) -> list[str]:
        return [entry["job"] for entry in self.entries.values()]

    def job(self, stage: str) -> str:
        """The id of a stage's last job; empty where it never had one."""
        return self.entries.get(stage, {}).get("job", "")

    def add(self, stage: str, job: str, config: str) -> None:
        """Written at once: a submission that is cut off leaves no job that nobody knows."""
        self.entries[stage] = {"job": job, "config": config}
        write_json(self.path, self.entries)

    def refuse_other(self, config: str, waiting: dict[str, str], out: Path) -> None:
        """Jobs of another config would make files that this one takes for its own."""
        other = [
            entry["job"] for entry in self.entries.values() if entry["job"] in waiting and entry["config"] != config
        ]
        if other:
            raise UserError(
                f"{out} has jobs of another config in the queue ({', '.join(other)}): wait, or end them with --cancel"
            )


def needs(stage: Stage, among: Sequence[Stage]) -> list[str]:
    """The stages of `among` that make what `stage` reads."""
    return [other.name for other in among if {other.output, *other.also} & set(stage.inputs)]


def lanes(stages: Sequence[Stage], max_parallel: int) -> dict[str, list[str]]:
    """For each stage the one that it must wait for so that no more than `max_parallel` run at once (0: no limit).

    The stages are dealt to so many lanes, and in a lane one comes after the other. An array's limit would do so for
    stages that are alike alone: each here waits for stages of its own.
    """
    ends: list[str] = []
    waits: dict[str, list[str]] = {}
    for i, stage in enumerate(stages):
        waits[stage.name] = []
        if not max_parallel:
            continue
        if len(ends) < max_parallel:
            ends.append(stage.name)
            continue
        before = needs(stage, stages[:i])
        lane = next((lane for lane, last in enumerate(ends) if last in before), i % max_parallel)
        waits[stage.name] = [ends[lane]]
        ends[lane] = stage.name
    return waits


# ---------------------------------------------------------------- SLURM's queue


def in_queue(ids: Iterable[str]) -> dict[str, str]:
    """The state of those of `ids` that SLURM has in its queue."""
    wanted = set(ids)
    if not wanted:
        return {}
    line = ["squeue", "--noheader", "--user", getpass.getuser(), "--format", "%A|%T"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"squeue does not answer ({error}): is this a submit node?") from error
    if done.returncode:
        raise UserError(f"squeue failed ({done.stderr.strip()}): is the controller up?")
    found = dict(row.split("|", 1) for row in done.stdout.splitlines() if "|" in row)
    return {job: state for job, state in found.items() if job in wanted and state not in ("COMPLETED", "CANCELLED")}


def cancel(saved: SavedJobs) -> list[str]:
    """End the jobs that are in the queue, and return their ids."""
    ids = sorted(in_queue(saved.ids()), key=int)
    if ids:
        subprocess.run(["scancel", *ids], check=True)
    return ids


def follow(graph: Graph, saved: SavedJobs) -> int:
    """Show where each stage stands until no job is left. Returns the exit code: of a failure unless all are done."""
    shown: dict[str, str] = {}
    with Live(transient=False, auto_refresh=False) if on_terminal() else _Lines(shown) as live:
        while True:
            waiting = in_queue(saved.ids())
            states = {name: state_of(graph, name, waiting.get(saved.job(name), "")) for name in saved.entries}
            live.update(_as_table(states, saved), refresh=True) if isinstance(live, Live) else live.update(states)
            if not waiting:
                break
            time.sleep(POLL_S)
    # A record of before may say "done" of a stage whose turn, in this submission, never came.
    left = {stage.name for stage, why in plan(graph) if why != "skip"}
    stale = {name for name, state in states.items() if state == "done" and (name in left or (left and name == REPORT))}
    return conclude(graph, {name: "not run" if name in stale else state for name, state in states.items()})


def state_of(graph: Graph, name: str, in_slurm: str) -> str:
    """Where a stage stands, in one word."""
    if name not in graph.stages:  # the report
        return in_slurm.lower() or ("done" if (graph.out / "report.html").exists() else "not run")
    status = read_record(graph, graph.stages[name]).get("status", "")
    if in_slurm:
        return in_slurm.lower()
    return str(status) if status in ("done", "failed") else "stopped" if status == "running" else "not run"


def conclude(graph: Graph, states: dict[str, str]) -> int:
    """Tell what failed, the causes before what they stopped."""
    for name, state in states.items():
        if state in ("failed", "stopped"):
            error = read_record(graph, graph.stages[name]).get("error", "its job ended without a word")
            say(f"{name} {state}: {error} (logs: {graph.out / 'jobs'})")
    left = [name for name, state in states.items() if state == "not run"]
    if left:
        say(f"not run: {', '.join(left)}")
    return EXIT_DONE if all(state == "done" for state in states.values()) else EXIT_FAILURE


class _Lines:
    """Where there is no terminal: a line for each change."""

    def __init__(self, shown: dict[str, str]) -> None:
        self.shown = shown

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, *error: object) -> None:
        return None

    def update(self, states: dict[str, str]) -> None:
        for name, state in states.items():
            if self.shown.get(name) != state:
                say(f"{time.strftime('%H:%M:%S')}  {name:<32} {state}")
        self.shown.update(states)


def _as_table(states: dict[str, str], saved: SavedJobs) -> Table:
    table = Table("stage", "job", "state")
    for name, state in states.items():
        table.add_row(Text(name), saved.job(name), state)
    return table


# ---------------------------------------------------------------- without SLURM


def run_all(graph: Graph, stages: Sequence[Stage], launch: Callable[[Stage], Any], *, max_parallel: int) -> list[str]:
    """Start each stage once what it needs is done, `max_parallel` at a time. Returns the stages that failed.

    launch(stage) starts a process and returns an object with done() and cancel().
    """
    left, running, failed = list(stages), dict[str, Any](), list[str]()
    try:
        while running or (left and not failed):
            ready = [stage for stage in left if not {*needs(stage, left), *running} & set(needs(stage, stages))]
            for stage in ready[: 0 if failed else max_parallel - len(running)]:
                say(f"{stage.name} ...")
                running[stage.name] = launch(stage)
                left.remove(stage)
            for name in [name for name, job in running.items() if job.done()]:
                del running[name]
                record = read_record(graph, graph.stages[name])
                if record.get("status") == "done":
                    say(f"{name}: done in {record['seconds']:.1f} s")
                else:
                    failed.append(name)
                    say(f"{name} failed: {record.get('error', 'its process ended without a word')}")
            time.sleep(0.2)
    finally:
        for job in running.values():
            job.cancel()
    if left:
        say(f"not run: {', '.join(stage.name for stage in left)}")
    return failed
