"""Asking a run to stop, and agreeing on it: the signal sets a flag, all ranks act on it at the end of the same step."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from dp4tl_dist.waiting import together
from dp4tl_dist.world import World

STOP_SIGNALS = (signal.SIGUSR2, signal.SIGTERM)


class StopFlag:
    """Set by SIGUSR2 or SIGTERM while the block runs; the handlers of before are restored afterwards.

    after_s: seconds after which it sets itself, for a job's time limit; None for never.
    """

    def __init__(self, after_s: float | None = None) -> None:
        self.asked = False
        self._before: dict[int, Any] = {}
        self._timer = None if after_s is None else threading.Timer(max(0.0, after_s), self._expire)

    def _expire(self) -> None:
        self.asked = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> "StopFlag":
        self._before = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        if self._timer:
            self._timer.daemon = True
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Agreement:
    """What any rank wants, known to all ranks one step later.

    The sum over the ranks travels while the next step computes, so that agreeing costs no waiting.
    """

    def __init__(self, world: World, stop: StopFlag, *, save_every_s: float) -> None:
        self.world, self.stop, self.save_every_s = world, stop, save_every_s
        self.saved_at = time.monotonic()
        self._flags = torch.zeros(2, dtype=torch.int64)
        self._work: Any = None

    def after_step(self) -> tuple[bool, bool]:
        """(stop, save): what the ranks had asked for by the end of the step before. Every rank calls it every step."""
        answer = self.settle()
        due = self.world.is_main and self.save_every_s > 0 and time.monotonic() - self.saved_at >= self.save_every_s
        self._flags = torch.tensor([int(self.stop.asked), int(due)])
        if self.world.num_ranks > 1:
            self._work = dist.all_reduce(self._flags, op=dist.ReduceOp.MAX, async_op=True)
            return answer
        return self.settle()

    def settle(self) -> tuple[bool, bool]:
        """The answer that is still on its way, if any; needed at an epoch's end and before leaving."""
        if self._work is not None:
            with together():
                self._work.wait()
            self._work = None
        stop, save = (bool(flag) for flag in self._flags.tolist())
        self._flags = torch.zeros(2, dtype=torch.int64)
        return stop, save
