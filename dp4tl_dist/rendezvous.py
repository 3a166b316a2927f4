"""Where the ranks of a run meet: at a store that rank 0 keeps, on one machine on its loopback alone.

Whoever waits there says for whom, and gives up when the run's timeout has passed.
"""

import contextlib
import datetime
import errno
import itertools
import os
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dp4tl_dist.errors import LostRank, printable

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]

LOOPBACK = "127.0.0.1"
LOOPBACK_INTERFACE = "lo"
LISTENING = "DP4TL_LISTENING"
"""Names the descriptor of a socket that listens already; whoever started rank 0 has opened it."""
TELL_AFTER_S = 20.0
_meetings = itertools.count()


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def stay_on_loopback() -> None:
    """Have the ranks of one machine talk by its loopback: its name may resolve to another's address, or to none."""
    if LOOPBACK_INTERFACE in (name for _, name in socket.if_nameindex()):
        for library in ("GLOO", "NCCL"):
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", LOOPBACK_INTERFACE)


def meet(master: str, *, rank: int, num_ranks: int, timeout_s: float) -> "Store":
    """The store at `master` ("host:port"), once all `num_ranks` ranks have come there.

    Raises LostRank where one does not come within `timeout_s`, or the port is another program's.
    """
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    host, _, port = master.rpartition(":")
    told = Patience(timeout_s)
    attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}.{next(_meetings)}"
    store = PrefixStore(attempt, _store(host, int(port), rank, num_ranks, told))
    store.set(f"rank {rank}", "here")
    missing = set(range(num_ranks))

    def all_there() -> bool:
        if rank != 0:
            return store.check(["all"])
        missing.difference_update([one for one in missing if store.check([f"rank {one}"])])
        return not missing

    def waits_for() -> str:
        here = [one for one in range(num_ranks) if store.check([f"rank {one}"])]
        absent = sorted(set(range(num_ranks)).difference(here))
        # The lowest of those who wait speaks for all.
        return f"{ranks_named(absent)} of {num_ranks} to come to {master}" if absent and here[0] == rank else ""

    try:
        told.wait(all_there, waits_for)
        if rank == 0:
            store.set("all", "here")
    except RuntimeError as error:  # of the store
        if isinstance(error, LostRank):
            raise
        raise LostRank(f"rank 0 at {master} ended while the ranks met ({_first_line(error)})") from error
    return store


class Patience:
    """Waiting with an end, and with a word to the user now and then."""

    def __init__(self, timeout_s: float) -> None:
        self.began, self.timeout_s, self.tell_at = time.monotonic(), timeout_s, TELL_AFTER_S

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self.began

    def wait(self, ready: Callable[[], bool], waits_for: Callable[[], str]) -> None:
        """Return once `ready()`. What `waits_for()` tells, if anything, is said ever more seldom; then LostRank."""
        pause = 0.005
        while not ready():
            if self.waited_s >= self.timeout_s:
                whom = waits_for() or "the other ranks"
                raise LostRank(f"waited {self.waited_s:.0f} s for {whom}: see what became of them (engine.timeout_s)")
            if self.waited_s >= self.tell_at:
                self.tell_at = 2 * self.waited_s
                if whom := waits_for():
                    text = f"warning: waiting for {whom} ({self.waited_s:.0f} of {self.timeout_s:.0f} s)"
                    print(text, file=sys.stderr, flush=True)
            time.sleep(pause)
            pause = min(2 * pause, 0.25)


def _store(host: str, port: int, rank: int, num_ranks: int, told: Patience) -> "Store":
    """The TCP store of the run: kept by this process if it is rank 0 and no torchrun keeps it already."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    keeps = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
    listening: dict[str, Any] = {}
    if keeps and is_loopback(host):
        listening["master_listen_fd"] = _listening(port)
    if not keeps:
        _wait_for_rank_0(host, port, told)
    timeout = datetime.timedelta(seconds=told.timeout_s)
    made: list[Any] = []

    def make() -> None:
        try:
            # Not by its name: a machine's "localhost" may be ::1 first.
            where = LOOPBACK if listening else host
            made.append(TCPStore(where, port, num_ranks, keeps, timeout, wait_for_workers=False, **listening))
        except (RuntimeError, ValueError) as error:
            made.append(error)

    # In a thread: what answers at that port may be another program, which never says what the store waits to hear.
    threading.Thread(target=make, daemon=True).start()
    told.wait(lambda: bool(made), lambda: f"rank 0 at {host}:{port}")
    if isinstance(made[0], BaseException):
        if keeps and "EADDRINUSE" in str(made[0]):
            raise LostRank(_taken(port)) from made[0]
        raise LostRank(f"cannot meet rank 0 at {host}:{port} ({_first_line(made[0])})") from made[0]
    store: Store = made[0]
    return store


def _wait_for_rank_0(host: str, port: int, told: Patience) -> None:
    """Wait until somebody listens there."""
    reasons = ["nobody listens there"]

    def answers() -> bool:
        try:
            socket.create_connection((host, port), timeout=2).close()
        except ConnectionRefusedError:
            reasons[0] = "nobody listens there"
        except OSError as error:
            reasons[0] = str(error.strerror or error)
        else:
            return True
        return False

    told.wait(answers, lambda: f"rank 0 at {host}:{port} ({reasons[0]})")


def _listening(port: int) -> int:
    """The descriptor of a socket that listens on the loopback, at `port`."""
    given = os.environ.pop(LISTENING, "")
    with contextlib.suppress(OSError, ValueError):
        if stat.S_ISSOCK(os.fstat(int(given)).st_mode):
            return int(given)
    server = socket.socket()
    server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        server.bind((LOOPBACK, port))
        server.listen(1024)
    except OSError as error:
        server.close()
        if error.errno == errno.EADDRINUSE:
            raise LostRank(_taken(port)) from error
        raise
    return server.detach()


def _taken(port: int) -> str:
    return f"port {port}, where the ranks were to meet, is another program's: start again, or set MASTER_PORT"


def _first_line(error: BaseException) -> str:
    return printable(str(error).strip().partition("\n")[0])


def ranks_named(ranks: Iterable[int]) -> str:
    """[3] -> "rank 3", [0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank {text}" if text.isdigit() else f"ranks {text}"
