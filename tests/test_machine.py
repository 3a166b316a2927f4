"""What control groups of both versions leave to a process."""

import os
from pathlib import Path

import pytest

from dp4tl_dist import machine
from dp4tl_dist.machine import cpu_quota, memory_limit, num_cores

GIB = 1 << 30
UNLIMITED_V1 = "9223372036854771712"


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    for name, text in {
        "proc/self/cgroup": groups,
        **{f"sys/fs/cgroup/{key}": text for key, text in files.items()},
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


V1 = {"memory/memory.limit_in_bytes": UNLIMITED_V1, "memory/job/memory.limit_in_bytes": str(GIB)}
V1_QUOTA = {"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}
NESTED = {"job/step/memory.max": "max", "job/memory.max": str(2 * GIB), "job/cpu.max": "4 2"}


@pytest.mark.parametrize(
    ("groups", "files", "cores", "memory"),
    [
        ("0::/", {"memory.max": "max", "cpu.max": "max 100000"}, None, None),
        ("0::/", {"memory.max": str(GIB), "cpu.max": "150000 100000"}, 1.5, GIB),
        ("0::/job/step", NESTED, 2, 2 * GIB),
        ("0::/host/path/of/a/container", {"memory.max": str(GIB), "cpu.max": "300000 100000"}, 3, GIB),
        ("4:memory:/job\n1:cpu,cpuacct:/", {**V1, **V1_QUOTA, "cpu/cpu.cfs_quota_us": "-1"}, None, GIB),
        ("4:memory:/docker/1\n2:cpu:/docker/1", {"memory/memory.limit_in_bytes": str(GIB), **V1_QUOTA}, 0.5, GIB),
        ("9:name=systemd:/\n4:memory:/job\n0::/", V1, None, GIB),
        ("", {}, None, None),
        ("what\n::\n0", {"cpu.max": "", "memory.max": "a"}, None, None),
        ("0::/../..", {"memory.max": str(GIB)}, None, GIB),
    ],
)
def test_limits(groups: str, files: dict[str, str], cores: float | None, memory: int | None, tmp_path: Path) -> None:
    root = system(tmp_path, groups, files)
    assert (cpu_quota(root) if cores else cpu_quota(root) > 1000) == (cores or True)
    assert memory_limit(root) == memory


def test_threads_follow_the_quota(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    for quota, cores in ((0.5, 1), (1.5, 1), (4.0, 4), (99.0, 16)):
        monkeypatch.setattr(machine, "cpu_quota", lambda quota=quota: quota)
        assert num_cores() == cores


def test_this_machine() -> None:
    assert 1 <= num_cores() <= len(os.sched_getaffinity(0)) and (memory_limit() or 1) > 0
