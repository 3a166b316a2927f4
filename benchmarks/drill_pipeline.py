"""Disturb a small `dp4tl run` in random ways, run it again each time, and compare its table with one left alone.

    python benchmarks/drill_pipeline.py --rounds 50 --record

A round is one of: SIGKILL or SIGTERM for a process of the run's tree, or for all of them, at any moment; a full disk
(where a small file system may be mounted); a finished output or a record damaged; an input edited. Nothing is lost when
the run then ends with the table of its inputs, run again as often as it takes; when every finished output that the
round did not damage is whole after it; and when files that the run does not know are as they were. Where a record was
removed, the run is to refuse its stage's output as another's, in one line: what the line says is done, and counted.
"""

import argparse
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import harness
import numpy as np
from drill import record
from PIL import Image

from dp4tl_dist.config import load_config
from dp4tl_dist.errors import EXIT_BAD_INPUT
from dp4tl_dist.outputs import places
from dp4tl_dist.records import finished, output_digest, read_record
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph

MARK = "DP4TL_DRILL"
PATIENCE_S, TRIES = 600.0, 4
TRAIN = {"epochs": 2, "peak_epoch": 1, "batch_size": 8, "resolution": 32, "val_resolution": 32}
FAULTS = {"kill one": 4, "kill all": 4, "stop": 2, "full disk": 2, "damage": 3, "edit": 2}


def images(folder: Path, num_classes: int, count: int, *, version: int = 0) -> None:
    for label in range(num_classes):
        place = folder / f"class{label}"
        place.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            edited = version if (label, i) == (0, 0) else 0
            noise = np.random.default_rng([label, i, count, edited]).integers(0, 60, (36, 36, 3))
            Image.fromarray((noise + 40 * label).astype(np.uint8)).save(place / f"{i}.png")


def write_config(place: Path) -> Path:
    """The inputs, and the config of a run over them."""
    for name, (num_classes, count) in {"source": (4, 8), "train": (2, 8), "test": (2, 4)}.items():
        images(place / name, num_classes, count)
    table = {"model": {"arch": "resnet_tiny"}, "train": TRAIN, "min_scale": 0.5}
    config = {
        "arms": ["lm@0.5"], "source": {"train": str(place / "source")}, "surrogate": table, "pretrain": table,
        "targets": {"small": {"train": str(place / "train"), "test": str(place / "test")}},
        "transfer": {"cached": True, "lp": {**TRAIN, "batch_size": 4}}, "engine": {"device": "cpu"},
        "log": {"tensorboard": False},
    }  # fmt: skip
    path = place / "config.json"
    path.write_text(json.dumps(config))
    return path


class Drill:
    def __init__(self, arguments: argparse.Namespace, place: Path, disk: Path | None) -> None:
        self.random, self.place, self.disk = random.Random(arguments.seed), place, disk
        self.rounds, self.token = arguments.rounds, secrets.token_hex(8)
        self.config, self.version = write_config(place), 0
        self.out = (disk or place) / "run"
        self.tables: dict[int, Any] = {}
        self.lost: list[str] = []
        self.faults: Counter[str] = Counter()
        self.refused: list[str] = []
        self.moved, self.orphans = 0, set[Path]()
        """How many outputs were moved away that had lost their record, and which those may be."""

    def run(self) -> None:
        began = time.monotonic()
        for version in (1, 0):
            self.edit(version)
            self.tables[version] = self.complete(self.place / f"alone{version}")
            self.length = time.monotonic() - began
            began = time.monotonic()
        self.complete(self.out)
        (self.out / "mine.txt").write_text("not the run's")
        names = [name for name in FAULTS if self.disk or name != "full disk"]
        for number in range(self.rounds):
            fault = self.random.choices(names, [FAULTS[name] for name in names])[0]
            self.faults[fault] += 1
            touched = self.disturb(fault)
            self.check_finished(f"round {number}, {fault}", touched)
            table = self.complete(self.out)
            if table != self.tables[self.version]:
                self.lost.append(f"round {number}, {fault}: {table} and not {self.tables[self.version]}")
            print(f"{number}: {fault}: {'equal' if table == self.tables[self.version] else 'LOST'}", file=sys.stderr)

    def edit(self, version: int) -> None:
        self.version = version
        images(self.place / "source", 4, 8, version=version)

    def start(self, out: Path) -> "subprocess.Popen[str]":
        line = [sys.executable, "-m", "dp4tl_dist", "run", "--config", str(self.config), "--out", str(out)]
        environ = {**os.environ, MARK: self.token, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(harness.ROOT)}
        return subprocess.Popen(
            line, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def complete(self, out: Path) -> Any:
        """Run to the end, as often as that takes, and return the table without its times."""
        for _ in range(TRIES + len(self.orphans)):
            process = self.start(out)
            _, told = process.communicate(timeout=PATIENCE_S)
            if process.returncode == 0:
                rows = json.loads((out / "results.json").read_text())
                return [[row["arm"], row["samples"], row["accuracy"]] for row in rows]
            last = told.strip().splitlines()[-1] if told.strip() else "nothing was said"
            self.refused.append(last.replace(str(self.place), "PLACE"))
            foreign = re.fullmatch(r"dp4tl: error: (?P<path>.*) was not made by this run .*", last)
            if foreign and process.returncode == EXIT_BAD_INPUT and Path(foreign["path"]) in self.orphans:
                self.moved += 1
                shutil.move(foreign["path"], self.place / f"moved{self.moved}")
        return f"no end after {TRIES} tries: {self.refused[-1]}"

    def disturb(self, fault: str) -> set[Path]:
        """Do the fault. Returns the files that it touched."""
        if fault == "edit":
            self.edit(1 - self.version)
            return set()
        if fault == "damage":
            return self.damage()
        if self.random.random() < 0.7:  # else there is little to do, and the fault meets the plan and the report
            self.edit(1 - self.version)
        process = self.start(self.out)
        time.sleep(self.random.uniform(0.2, self.length))
        if fault == "full disk":
            filler = self.out / "filler"
            with open(filler, "wb") as handle:
                try:
                    while handle.write(bytes(1 << 16)):
                        handle.flush()
                except OSError:
                    pass
            process.communicate(timeout=PATIENCE_S)
            filler.unlink()
            return set()
        pids = self.processes()
        for pid in pids if fault == "kill all" else [self.random.choice(pids)] if pids else []:
            try:
                os.kill(pid, signal.SIGTERM if fault == "stop" else signal.SIGKILL)
            except ProcessLookupError:
                continue
        process.communicate(timeout=PATIENCE_S)
        deadline = time.monotonic() + 60
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        return set()

    def damage(self) -> set[Path]:
        """Change a byte of a file that the run made, cut it short, or remove it."""
        kinds = ("*.npz", "*.beton", "*.beton.json", "transfer/*.json", "weights.safetensors", "stages/*.json")
        found = sorted({path for kind in kinds for path in self.out.rglob(kind) if path.is_file()})
        path = self.random.choice(found)
        content = bytearray(path.read_bytes())
        at = self.random.randrange(len(content))
        way = self.random.choice(["flip", "cut", "remove"])
        if way == "remove":
            if path.parent.name == "stages":
                graph = Graph(load_config(RunConfig, str(self.config)), self.out)
                self.orphans |= set(places(graph.stages[path.stem]))
            path.unlink()
        else:
            content[at] ^= 0xFF
            path.write_bytes(content if way == "flip" else content[:at])
        return {path}

    def check_finished(self, what: str, touched: set[Path]) -> None:
        """Every output that its record tells of is whole, unless this round touched it; others' files are there."""
        graph = Graph(load_config(RunConfig, str(self.config)), self.out)
        for name, stage in graph.stages.items():
            record = read_record(graph, stage)
            mine = any(path.is_relative_to(output) for output in stage.outputs for path in touched)
            told = finished(record).get("output")
            if told and not mine and "swap" not in record and told != output_digest(stage):
                self.lost.append(f"{what}: {name} is not what its record says")
        if (self.out / "mine.txt").read_text() != "not the run's":
            self.lost.append(f"{what}: a file that the run does not know was changed")

    def processes(self) -> list[int]:
        """The live processes of this drill."""
        found, mark = [], f"{MARK}={self.token}".encode()
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it has ended, or is not ours to read
        return found


def small_disk(place: Path, held: ExitStack) -> Path | None:
    """A file system that can be filled; None where none may be mounted."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=120m", "tmpfs", str(place)]
    if os.geteuid() != 0 or not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        return None
    held.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
    return place


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the result to benchmarks/results/ as well")
    arguments = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="drill-") as scratch, ExitStack() as held:
        drill = Drill(arguments, Path(scratch), small_disk(Path(scratch) / "disk", held))
        drill.run()
        stray = drill.processes()
    print(f"{arguments.rounds} rounds, {len(drill.lost)} lost; {dict(drill.faults)}")
    print("\n".join([*drill.lost, f"left behind: {len(stray)} processes; {time.monotonic() - began:.0f} s"]))
    if arguments.record:
        record(
            {"rounds": arguments.rounds, "lost": drill.lost, "faults": drill.faults, "ended_with": drill.refused,
             "moved_away": drill.moved,
             "stray_processes": len(stray), "seconds": round(time.monotonic() - began, 1)},
            name="drill_pipeline", script=Path(__file__),
        )  # fmt: skip
    return 1 if drill.lost or stray else 0


if __name__ == "__main__":
    sys.exit(main())
