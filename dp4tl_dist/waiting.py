"""Whom the ranks wait for: told while they do, for a collective itself is silent until its timeout.

All ranks meet in the same collectives in the same order. Each counts those that it came to, and writes the number to
the store of the run now and then; the ranks behind the others, or that write nothing any more, are waited for.
"""

import contextlib
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from dp4tl_dist.rendezvous import ranks_named

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

TELL_AFTER_S = 20.0
WRITE_EVERY_S = 3.0
READS = 4
"""So many reads lie between two that are compared: a rank may be late once."""


class Count:
    """The collectives that this process came to, and those that it left."""

    came = left = 0


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A block that ends once all ranks have come to it."""
    Count.came += 1
    try:
        yield
    finally:
        Count.left += 1


def behind(rank: int, came: int, before: Mapping[int, str], after: Mapping[int, str]) -> list[int]:
    """The ranks that `rank`, which came to its collective number `came`, waits for.

    before, after: what every rank wrote ("collectives, how often it wrote"), a while apart. A rank is waited for that
    wrote nothing meanwhile, or came to fewer.
    """
    return [
        other for other, text in after.items()
        if other != rank and (text == before.get(other) or not text or int(text.split()[0]) < came)
    ]  # fmt: skip


class Watch:
    """A thread that tells whom this rank waits for, of all that wait only the lowest does. It ends with the block."""

    def __init__(self, store: "Store", *, rank: int, num_ranks: int, timeout_s: float) -> None:
        self.store, self.rank, self.num_ranks, self.timeout_s = store, rank, num_ranks, timeout_s
        self._ended, self._writes = threading.Event(), 0
        self._answers: deque[dict[int, str]] = deque([{}], maxlen=READS)

    def __enter__(self) -> None:
        threading.Thread(target=self._run, daemon=True).start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        seen, since, tell_at = (0, 0), time.monotonic(), TELL_AFTER_S
        asked = threading.Thread()
        while not self._ended.wait(WRITE_EVERY_S):
            if not asked.is_alive():
                asked = threading.Thread(target=self._exchange, daemon=True)
                asked.start()
                asked.join(WRITE_EVERY_S)
            now = (Count.came, Count.left)
            if now != seen:
                seen, since, tell_at = now, time.monotonic(), TELL_AFTER_S
            waited = time.monotonic() - since
            if now[0] > now[1] and waited >= tell_at and not self._ended.is_set():
                whom = [0] if asked.is_alive() else behind(self.rank, now[0], self._answers[0], self._answers[-1])
                first = min(set(range(self.num_ranks)).difference(whom), default=self.rank)
                if first == self.rank:
                    tell_at = 2 * waited
                    text = ranks_named(whom) if whom else "all ranks, which are in the same step or exchange"
                    limit = f"{waited:.0f} of {self.timeout_s:.0f} s"
                    print(f"warning: waiting for {text} ({limit})", file=sys.stderr, flush=True)

    def _exchange(self) -> None:
        """Write this rank's number, and read what all have written. The store of a rank 0 that is stopped does not
        answer."""
        self._writes += 1
        with contextlib.suppress(RuntimeError):  # the store is gone: the collectives end of it, and tell
            self.store.set(f"came {self.rank}", f"{Count.came} {self._writes}")
            keys = {other: f"came {other}" for other in range(self.num_ranks)}
            self._answers.append(
                {other: self.store.get(key).decode() if self.store.check([key]) else "" for other, key in keys.items()}
            )
