"""Runs cases in child processes: what ends one (a crash, a hang, too much memory) is counted, and the next goes on."""

import contextlib
import ctypes
import faulthandler
import json
import mmap
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from fuzz_readers import Files, Reader, check_nothing_ran
from numpy.typing import NDArray

from dp4tl_dist.data.crops import BadSampleError
from dp4tl_dist.errors import UserError

SECONDS = 10.0
"""A part of a case that takes longer hangs."""
MEMORY = 1 << 30
"""Bytes that a child may map beyond what it starts with."""
BATCH = 2000
"""Cases of one child: libraries that keep something from each call start anew after so many."""
SHOWN = 20
"""Findings kept in full, for each reader."""


@dataclass
class Result:
    reader: str
    cases: int = 0
    read: int = 0
    refused: int = 0
    crashes: int = 0
    hangs: int = 0
    other: int = 0
    seconds: float = 0.0
    findings: list[dict[str, Any]] = field(default_factory=list)

    def add(self, finding: dict[str, Any]) -> None:
        if len(self.findings) < SHOWN:
            self.findings.append(finding)

    @property
    def clean(self) -> bool:
        return not (self.crashes or self.hangs or self.other)


def case(reader: Reader, seeds: list[Files], seed: int, index: int) -> Files:
    """The files of one case: a function of the reader, the seed and the index alone."""
    rng = Random(f"{seed} {reader.name} {index}")
    return reader.mutate(rng, rng.choice(seeds), seeds)


def write_files(folder: Path, files: Files) -> None:
    """Exactly these files in `folder`."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and str(path.relative_to(folder)) not in files:
            path.unlink()
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def judge(error: Exception) -> str:
    """ "" where `error` is a proper refusal, else what is wrong with it."""
    if isinstance(error, BadSampleError):
        return ""
    if not isinstance(error, UserError):
        return f"{type(error).__name__} instead of UserError"
    if isinstance(error.__cause__, MemoryError):
        return "allocated what the file claims"
    text = str(error)
    if not text or not text.isprintable():
        return "not one printable line"
    return "a line of more than 2000 characters" if len(text) > 2000 else ""


def run_case(reader: Reader, files: Files, folder: Path) -> Iterator[str]:
    """Yields "" between the parts of a case, and at last "read" or "refused"; anything else that happens is raised."""
    write_files(folder, files)
    try:
        for _ in reader.read(folder):
            yield ""
    except (UserError, BadSampleError) as error:
        wrong = judge(error)
        if wrong:
            raise AssertionError(f"{wrong}: {str(error)[:300]!r}") from error
        outcome = "refused"
    else:
        outcome = "read"
    check_nothing_ran()
    yield outcome


def fuzz(reader: Reader, *, cases: int, seed: int, folder: Path, first: int = 0, batch: int = BATCH) -> Result:
    """Run cases first .. first + cases - 1 of `reader` in an empty folder below `folder`."""
    started, result = time.monotonic(), Result(reader.name, cases=cases)
    work = folder / reader.name
    shutil.rmtree(work, ignore_errors=True)
    (work / "seeds").mkdir(parents=True)
    (work / "case").mkdir()
    seeds = reader.seeds(work / "seeds")
    for files in seeds:  # also warms up what children then need not do: imports, and compiling the decoder
        write_files(work / "case", files)
        for _ in reader.read(work / "case"):
            pass
    index, end = first, first + cases
    while index < end:
        index = _child(reader, seeds, seed, index, min(end, index + batch), work, result)
    result.seconds = round(time.monotonic() - started, 1)
    shutil.rmtree(work)
    return result


def _child(reader: Reader, seeds: list[Files], seed: int, index: int, end: int, work: Path, result: Result) -> int:
    """Fork a process for the cases index .. end - 1, watch it, and return the first case that is left to do."""
    shared = mmap.mmap(-1, mmap.PAGESIZE)
    board, clock = np.frombuffer(shared, np.int64, 3), np.frombuffer(shared, np.float64, 1, offset=64)
    board[0], clock[0] = index, time.monotonic()
    (work / "findings.jsonl").write_text("")
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        with contextlib.suppress(BaseException):  # whatever happens, the child must not go on as its parent
            _work(reader, seeds, seed, range(index, end), work, board, clock)
            code = 0
        os._exit(code)
    status, hung = _watch(pid, clock)
    result.read += int(board[1])
    result.refused += int(board[2])
    for line in (work / "findings.jsonl").read_text().splitlines():
        result.other += 1
        result.add(json.loads(line))
    if status == 0:
        return end
    result.hangs += hung
    result.crashes += not hung
    how = f"more than {SECONDS:g} s" if hung else f"ended by {os.waitstatus_to_exitcode(status)}"
    result.add({"case": int(board[0]), "what": how})
    return int(board[0]) + 1


def _watch(pid: int, clock: NDArray[np.float64]) -> tuple[int, bool]:
    """Wait for a child: how it ended, and whether that was because it hung."""
    while True:
        time.sleep(0.01)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status, False
        if time.monotonic() - clock[0] > SECONDS:
            os.kill(pid, signal.SIGKILL)
            return os.waitpid(pid, 0)[1], True


def _work(
    reader: Reader,
    seeds: list[Files],
    seed: int,
    indices: range,
    work: Path,
    board: NDArray[np.int64],
    clock: NDArray[np.float64],
) -> None:
    """The child's part: `board` and `clock` tell the parent which case is under way, the outcomes, and since when."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * mmap.PAGESIZE + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler.disable()  # a crash is counted, and its dump would look like one of the tests themselves
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(-8, 2)  # M_ARENA_MAX: each arena would take 64 MiB of the limit
    os.chdir(work / "case")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries and `log.warn` tell the same on every case
    with open(work / "findings.jsonl", "a") as findings:
        for index in indices:
            board[0], clock[0] = index, time.monotonic()
            files = case(reader, seeds, seed, index)
            try:
                for outcome in run_case(reader, files, work / "case"):
                    clock[0] = time.monotonic()
                    board[1] += outcome == "read"
                    board[2] += outcome == "refused"
            except Exception as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                what = f"{type(error).__name__}: {error}"[:400]
                print(
                    json.dumps({"case": index, "what": what, "where": f"{where.name}:{where.lineno}"}),
                    file=findings,
                    flush=True,
                )
