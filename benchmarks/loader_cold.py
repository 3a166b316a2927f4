"""How many bytes an epoch reads from the disk for the bytes that it needs, when nothing of the file is in memory."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from harness import Bench, Case, Seconds

SCRIPT = Path(__file__).with_name("loader_peers.py")
NOTES = {
    "os": "the mapped file; a fault reads what lies around it, too",
    "process": "whole pages of the file, as the coming batches need them, and samples from all over the file",
    "window": "the same, and samples from a moving window of pages (page_aware)",
}


class ColdEpoch:
    """One epoch of a fresh process on a file that the kernel was told to forget."""

    def __init__(self, command: list[str], needed: int, file: Path) -> None:
        self.command, self.needed, self.file = command, needed, file
        self.found = {"disk": 0, "asked": 0}

    def __call__(self) -> Seconds:
        forget(self.file)
        text = subprocess.check_output([sys.executable, *self.command, "--cold"], text=True)
        self.found = json.loads(text.splitlines()[-1])
        return Seconds(self.found["seconds"])

    def facts(self, _: float) -> Mapping[str, float | str]:
        """Bytes over the payloads' bytes: from the disk (0 where the kernel does not tell), and asked for by read(),
        which a mapped file does not use."""
        return {f"{key} / needed": self.found[key] / self.needed for key in ("disk", "asked")}


def forget(file: Path) -> None:
    """Drop the file's pages from the kernel's cache: nothing maps it, and nothing of it waits to be written."""
    with open(file, "rb") as handle:
        os.fsync(handle.fileno())
        os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare_cold(
    bench: Bench, arguments: argparse.Namespace, commands: Mapping[str, list[str]], files: Mapping[str, Path],
    needed: int,
) -> None:  # fmt: skip
    """`commands` and `files` of the subset by indices and of the compacted file, which need the same bytes."""
    window = ["--process-cache", "--window", str(arguments.window)]
    ways = {"os": [], "process": ["--process-cache"], "window": window}
    cases = []
    for kind, command in commands.items():
        for way in arguments.ways:
            more = ways[way]
            epoch = ColdEpoch([*command, *more], needed, files[kind])
            cases.append(Case(f"{kind} {way}", epoch, needed / 2**20, NOTES[way], facts=epoch.facts))
    title = f"a cold epoch of {arguments.keep:.0%} of the samples, {needed / 2**20:.0f} MiB of payloads"
    bench.compare(title, cases, unit="needed MiB", peers=False)
