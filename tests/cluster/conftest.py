"""A SLURM of four nodes for these tests, and training runs on it that something happens to."""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


class Cluster:
    """tests/cluster/local_slurm.sh, and SLURM's own commands."""

    def __init__(self, place: Path) -> None:
        # Its own ports and addresses: another cluster of this kind may run on the machine.
        self.environ = {**os.environ, "LS_ROOT": str(place), "LS_PORT": "17800", "LS_NET": "10.198.0",
                        "LS_PREFIX": "test", "LS_TAG": "lst", "LS_DBD": "0", "LS_KILL_WAIT": "5",
                        "LS_SLURMD_TIMEOUT": "10", "LS_GRACE": "30"}  # fmt: skip
        self.environ["SLURM_CONF"] = str(place / "etc" / "slurm.conf")

    def start(self) -> None:
        """Start it, and a guard that stops it where this process is killed."""
        guard = 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; exec "$2" down'
        line = ["bash", "-c", guard, "guard", str(os.getpid()), str(HERE / "local_slurm.sh")]
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen(line, env=self.environ, start_new_session=True, **pipes)
        self.script("up", "4")

    def script(self, *argv: str) -> None:
        done = subprocess.run([HERE / "local_slurm.sh", *argv], env=self.environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def call(self, *argv: object, cwd: Path | None = None, **environ: str) -> "subprocess.CompletedProcess[str]":
        line = [str(item) for item in argv]
        return subprocess.run(
            line, env={**self.environ, **environ}, capture_output=True, text=True, cwd=cwd, timeout=700
        )

    def run(self, *argv: object, cwd: Path | None = None, **environ: str) -> str:
        """What a command that must succeed prints."""
        done = self.call(*argv, cwd=cwd, **environ)
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *argv: object, cwd: Path, **environ: str) -> str:
        """The id of a submitted job."""
        return self.run("sbatch", "--parsable", *argv, cwd=cwd, DP4TL_ROOT=str(ROOT), **environ).strip()

    def facts(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, NodeList, ..."""
        text = self.run("scontrol", "show", "job", "--oneliner", job)
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def until(self, what: Callable[[], object], seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < deadline, self.run("squeue", "-a")
            time.sleep(0.3)

    def ended(self, job: str) -> bool:
        return self.facts(job)["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    place = Path(tempfile.mkdtemp(prefix="dp4tl-slurm-"))
    place.chmod(0o755)  # munge has a user of its own
    made = Cluster(place)
    try:
        made.start()
        yield made
    finally:
        made.script("down")
        shutil.rmtree(place, ignore_errors=True)
