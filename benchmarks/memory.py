"""How much memory a run of something needs, by the kernel's count for this process."""

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """Calls `run` and keeps the highest resident memory that any call met, and how much of it was new, in MiB.

    Where the kernel does not let a process reset its mark, the highest since the process began counts.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        self.run, self.mib, self.mib_new = run, 0.0, 0.0

    def __call__(self) -> None:
        before = start_watch()
        self.run()
        peak = resident("VmHWM")
        self.mib, self.mib_new = max(self.mib, peak), max(self.mib_new, peak - before)


def start_watch() -> float:
    """Give back what is unused, set the mark of the highest resident memory to what is there now, and return that."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    with suppress(OSError):
        CLEAR.write_text("5")
    return resident("VmRSS")


def resident(key: str = "VmRSS") -> float:
    """MiB of resident memory: now (VmRSS) or at most (VmHWM)."""
    found = re.search(rf"^{key}:\s*(\d+) kB", STATUS.read_text(), flags=re.MULTILINE)
    return int(found[1]) / 1024 if found else 0.0
