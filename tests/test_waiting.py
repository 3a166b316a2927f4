"""Whom the ranks wait for in a collective: told by one of those that wait."""

import contextlib
import io
import os
import signal
import time

import numpy as np
import pytest
from ranks import run_ranks

from dp4tl_dist import waiting
from dp4tl_dist.waiting import behind
from dp4tl_dist.world import World, all_sum


def test_who_is_behind() -> None:
    written = {0: "7 3", 1: "7 9", 2: "6 4", 3: "8 2", 4: ""}
    later = {0: "7 4", 1: "7 9", 2: "6 5", 3: "8 3", 4: ""}
    assert behind(0, 7, written, later) == [1, 2, 4]  # 1 writes no more, 2 came to fewer, 4 never wrote
    assert behind(3, 8, written, later) == [0, 1, 2, 4]
    assert behind(0, 7, {}, {0: "7 1", 1: "7 1"}) == []


def waits(world: World, how: str) -> str:
    """What this rank says while the last one comes late: busy with something else, or stopped by a signal."""
    waiting.TELL_AFTER_S, waiting.WRITE_EVERY_S = 1.0, 0.1  # the watch of this group has begun, with a longer pause
    with contextlib.redirect_stderr(io.StringIO()) as told:
        all_sum(world, np.ones(1))
        if how == "calm":
            time.sleep(5)  # nobody waits
        elif world.rank == world.num_ranks - 1:
            own = os.getpid()
            if how == "stopped":
                if not os.fork():  # a stopped process does not wake itself
                    time.sleep(6)
                    os.kill(own, signal.SIGCONT)
                    os._exit(0)
                os.kill(own, signal.SIGSTOP)
            else:
                time.sleep(6)
        all_sum(world, np.ones(1))
        return told.getvalue()


@pytest.mark.parametrize("how", ["busy", "stopped", "calm"])
def test_who_is_late_is_told_once(how: str) -> None:
    first, second, last = run_ranks(waits, 3, how)
    assert second == last == "", "the lowest of those who wait speaks for all"
    if how == "calm":
        assert first == ""
        return
    lines = first.splitlines()
    assert 1 <= len(lines) <= 3 and all(line.startswith("warning: waiting for rank 2 (") for line in lines), lines
    assert " of 30 s)" in lines[0]
