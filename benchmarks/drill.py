"""Kill a small training run at random moments, continue it each time, and compare its end with a run left alone.

    python benchmarks/drill.py --kills 100 --record

Each kill is a SIGKILL of one rank, of all processes at once, or of the launcher: while the run starts, after a random
number of steps, or while a checkpoint is being written. Nothing is lost when the final weights, the metrics (times
apart) and the order of samples equal those of the run left alone, bit by bit.
"""

import argparse
import datetime
import itertools
import json
import os
import random
import secrets
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import harness
from drill_run import STEPS_PER_EPOCH, facts, file_number, last_step, saved_step, write_inputs

from dp4tl_dist.children import python

MARK = "DP4TL_DRILL"
STEPS_PER_KILL, KILLS_PER_RUN = 15, 10
PATIENCE_S = 120.0


@dataclass
class Kill:
    """One kill and what it cost."""

    target: str
    moment: str
    step: int
    """The last step that was done."""
    saved: int
    """The step of the newest whole checkpoint."""
    torn: bool
    """Whether a half-written checkpoint was left behind."""
    ended_s: float
    """Seconds until every process was gone."""
    redone_s: float = 0.0
    """Seconds of work that were done again: the steps since the checkpoint at the undisturbed run's pace."""


class Drill:
    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder, self.token = arguments, folder, secrets.token_hex(8)
        self.random = random.Random(arguments.seed)
        self.kills: list[Kill] = []
        self.starts: list[float] = []
        """Seconds from a start to its first step."""
        epochs = max(2, -(-min(arguments.kills, KILLS_PER_RUN) * STEPS_PER_KILL // STEPS_PER_EPOCH))
        self.config = write_inputs(folder, epochs=epochs, ranks=arguments.ranks)

    def run(self) -> int:
        """All kills; returns how many were in runs that ended differently."""
        reference = self.folder / "undisturbed"
        began = time.monotonic()
        self.start(reference).wait()
        expected = facts(reference)
        self.pace = (time.monotonic() - began - self.starts[0]) / max(1, len(expected["order"]))
        lost = 0
        for number in itertools.count():
            out, before = self.folder / f"run{number}", len(self.kills)
            while len(self.kills) < self.arguments.kills and self.disturb(out):
                print(f"{len(self.kills)}: {self.kills[-1]}", file=sys.stderr)
            process = self.start(out)
            code = process.wait()
            same = code == 0 and facts(out) == expected
            print(f"{out.name}: {'equal' if same else 'DIFFERENT'}", file=sys.stderr)
            lost += 0 if same else len(self.kills) - before
            if len(self.kills) >= self.arguments.kills:
                return lost
        raise AssertionError

    def start(self, out: Path) -> "subprocess.Popen[bytes]":
        """Start or continue a run."""
        command = python("dp4tl_dist.ranks", str(self.arguments.ranks), "train", "--config", str(self.config), "--out",
                         str(out))  # fmt: skip
        environ = {**os.environ, MARK: self.token, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
        with open(self.folder / f"{out.name}.log", "ab") as log:
            process = subprocess.Popen(command, env=environ, stdout=log, stderr=log, start_new_session=True)
        self.began, self.first = time.monotonic(), saved_step(out)
        if out.name == "undisturbed":
            self.until(process, lambda: last_step(out) > 0)
            self.starts.append(time.monotonic() - self.began)
        return process

    def until(self, process: "subprocess.Popen[bytes]", there: Callable[[], bool], pause_s: float = 0.002) -> bool:
        """Wait for something of a running process; False where it ended first."""
        deadline = time.monotonic() + PATIENCE_S
        while not there():
            if process.poll() is not None:
                return False
            if time.monotonic() > deadline:
                raise TimeoutError(f"nothing happened for {PATIENCE_S:.0f} s: see the logs in {self.folder}")
            time.sleep(pause_s)
        return True

    def disturb(self, out: Path) -> bool:
        """Start or continue, kill, and wait until all is over. False where the run was complete before."""
        ranks = [f"rank {rank}" for rank in range(self.arguments.ranks)]
        target = self.random.choice([*ranks, *ranks, "all", "all", "all", "launcher"])
        moment = self.random.choices(["start", "step", "checkpoint"], [3, 8, 9])[0]
        before = file_number(out)
        process = self.start(out)
        if not self.wait_for(process, out, moment, before):
            return False
        at, step = time.monotonic(), last_step(out)
        if not self.kill(process, target):
            process.wait()
            return False
        self.until_gone(process)
        torn = any((out / "checkpoints").glob(".*.tmp"))
        found = Kill(target, moment, max(step, last_step(out)), saved_step(out), torn, time.monotonic() - at)
        found.redone_s = max(0, found.step - found.saved) * self.pace
        self.kills.append(found)
        return True

    def wait_for(self, process: "subprocess.Popen[bytes]", out: Path, moment: str, before: int) -> bool:
        """Wait for a random moment of that kind; False where the run ended before."""
        if moment == "start":
            pause = self.random.uniform(0.3, self.starts[0])
            return self.until(process, lambda: time.monotonic() - self.began > pause)
        steps = self.random.randint(1, 2 * STEPS_PER_KILL)
        # A run that goes on first drops the lines past its checkpoint: until then the file is the old one.
        if not self.until(process, lambda: file_number(out) != before and last_step(out) > self.first):
            return False
        self.starts.append(time.monotonic() - self.began)
        if not self.until(process, lambda: last_step(out) >= self.first + steps):
            return False
        if moment == "checkpoint":
            folder = out / "checkpoints"
            if not self.until(process, lambda: any(folder.glob(".step_*.tmp")), pause_s=0.0005):
                return False
        time.sleep(self.random.uniform(0, self.pace if moment == "step" else 0.01))
        return True

    def kill(self, process: "subprocess.Popen[bytes]", target: str) -> bool:
        """SIGKILL the target; False where the run has ended by itself."""
        found = self.processes()
        wanted = {"all": list(found), "launcher": [process.pid]}.get(target)
        if wanted is None:
            wanted = [pid for pid, rank in found.items() if rank == target] or list(found)  # no ranks yet
        for pid in wanted:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return process.poll() != 0

    def until_gone(self, process: "subprocess.Popen[bytes]") -> None:
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None or self.processes():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes are left: {self.processes()}; see the logs in {self.folder}")
            time.sleep(0.02)

    def processes(self) -> dict[int, str]:
        """The live processes of this drill, by their number: "rank N", or "launcher"."""
        found = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit() and int(entry.name) != os.getpid():
                try:
                    environ = dict(
                        item.split(b"=", 1) for item in (entry / "environ").read_bytes().split(b"\0") if item
                    )
                except (OSError, ValueError):
                    continue  # it has ended, or is not ours to read
                if environ.get(MARK.encode()) == self.token.encode():
                    rank = environ.get(b"RANK", b"").decode()
                    found[int(entry.name)] = f"rank {rank}" if rank else "launcher"
        return found


def shared_files() -> set[str]:
    return {item.name for item in Path("/dev/shm").iterdir() if item.is_file()}


def spread(seconds: list[float]) -> str:
    return f"median {median(seconds):.2f} s ({min(seconds):.2f} .. {max(seconds):.2f})" if seconds else "-"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results/ as well")
    arguments = parser.parse_args()
    shared, began = shared_files(), time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drill-") as scratch:
        drill = Drill(arguments, Path(scratch))
        lost = drill.run()
        stray = drill.processes()
    left = sorted(shared_files() - shared)
    kills, count = drill.kills, len(drill.kills)
    result = {
        "kills": count, "recovered": count - lost, "lost": lost, "torn_checkpoints": sum(kill.torn for kill in kills),
        "by_target": Counter(kill.target for kill in kills), "by_moment": Counter(kill.moment for kill in kills),
        "stray_processes": len(stray), "left_in_dev_shm": left, "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    print(f"{count} kills, {count - lost} recovered, {lost} lost")
    print(f"work done again after a kill: {spread([kill.redone_s for kill in kills])}")
    print(f"every process gone after a kill: {spread([kill.ended_s for kill in kills])}")
    print(f"from a start to its first step: {spread(drill.starts)}")
    print(f"killed inside a checkpoint's write: {result['torn_checkpoints']}; {dict(result['by_target'])}")
    print(f"left behind: {len(stray)} processes, {len(left)} files in /dev/shm; all in {result['seconds']:.0f} s")
    if arguments.record:
        record(result | {"each": [asdict(kill) for kill in kills], "starts": drill.starts})
    return 1 if lost or stray or left else 0


def record(result: dict[str, Any], *, name: str = "drill", script: Path = Path(__file__)) -> None:
    """Keep a drill's result in benchmarks/results."""
    now, machine = datetime.datetime.now(datetime.timezone.utc), harness.machine()
    content = {"name": name, "date": now.isoformat(timespec="seconds"),
               "command": shlex.join(["python", f"benchmarks/{script.name}", *sys.argv[1:]]), "machine": machine,
               "versions": harness.versions(), "git": harness.git(),
               "source_hash": harness.source_hash(script), "result": result}  # fmt: skip
    harness.RESULTS.mkdir(exist_ok=True)
    path = harness.RESULTS / f"{now.date()}_{name}_{machine['name']}.json"
    path.write_text(json.dumps(content, indent=2) + "\n")
    print(f"wrote {path.relative_to(harness.ROOT)}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
