"""Whose run folder it is. A job that SLURM gave up on may still run on a node that was cut off: it must not write.

A lock holds on one machine only. Here the newest life of a run leaves its name in the folder, and every life looks
before it writes: one that finds another's name ends. What could slip between the look and the write is harmless, as
the same step of the same run has the same content.
"""

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from dp4tl_dist.files import read_json, write_json

OWNER = "owner.json"


class Owner:
    """This process's claim on a run folder. Used by rank 0."""

    def __init__(self, out: Path, environ: Mapping[str, str] = os.environ) -> None:
        self.path = out / OWNER
        self.name = {"host": socket.gethostname(), "pid": os.getpid(), "job": environ.get("SLURM_JOB_ID", ""),
                     "restarts": int(environ.get("SLURM_RESTART_COUNT", "0"))}  # fmt: skip

    def claim(self) -> None:
        """Take the folder over. RuntimeError where a later life of the same job has it already."""
        found = self._read()
        same_job = self.name["job"] and found.get("job") == self.name["job"]
        if same_job and int(str(found.get("restarts", 0))) > int(str(self.name["restarts"])):
            self._give_up(found)
        write_json(self.path, self.name)

    def check(self) -> None:
        """RuntimeError where another life has taken the folder over since."""
        found = self._read()
        if found and found != self.name:
            self._give_up(found)

    def _read(self) -> dict[str, object]:
        found = read_json(self.path) if self.path.exists() else {}
        return found if isinstance(found, dict) else {}

    def _give_up(self, found: dict[str, object]) -> None:
        def said(name: dict[str, object]) -> str:
            job = f"job {name.get('job')} (restart {name.get('restarts')})" if name.get("job") else "a process"
            return f"{job} on {name.get('host')}, pid {name.get('pid')}"

        raise RuntimeError(
            f"{self.path.parent} was taken over by {said(found)}: {said(dict(self.name))} ends, and writes nothing more"
        )
