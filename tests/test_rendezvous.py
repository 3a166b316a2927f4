"""Where ranks meet: whom a rank that waits names, and how it ends where nobody comes."""

import itertools
import socket
import subprocess
import sys
import threading
import time

import pytest

from dp4tl_dist import rendezvous
from dp4tl_dist.errors import LostRank
from dp4tl_dist.rendezvous import meet, ranks_named


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "TELL_AFTER_S", 0.3)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_missing_ranks_are_named(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 of 5 come: rank 0 speaks for both, ever more seldom, and the store listens on the loopback."""
    port, ended = free_port(), list[BaseException]()
    monkeypatch.setattr(rendezvous, "_meetings", itertools.repeat(0))  # the ranks share a process here

    def come(rank: int) -> None:
        try:
            meet(f"127.0.0.1:{port}", rank=rank, num_ranks=5, timeout_s=3)
        except LostRank as error:
            ended.append(error)

    ranks = [threading.Thread(target=come, args=(rank,)) for rank in (0, 2)]
    for rank in ranks:
        rank.start()
    with socket.socket() as other:  # another address of this machine
        assert other.connect_ex(("127.0.0.2", port)) != 0
    for rank in ranks:
        rank.join(20)
    told = capfd.readouterr().err.splitlines()
    assert 1 <= len(told) <= 5
    assert all(f"warning: waiting for ranks 1, 3-4 of 5 to come to 127.0.0.1:{port} (" in line for line in told), told
    assert len(ended) == 2 and all("waited 3 s for" in str(error) for error in ended)


@pytest.mark.parametrize("what", ["nobody", "another program"])
def test_who_waits_for_rank_0_says_so_and_gives_up(what: str, capfd: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        if what == "another program":  # which takes the connection and never answers
            server.listen()
        began = time.monotonic()
        with pytest.raises(LostRank):
            meet(f"127.0.0.1:{port}", rank=1, num_ranks=2, timeout_s=2)
        assert time.monotonic() - began < 60  # 2 s, and what a busy machine adds: not the store's own 300
    for thread in set(threading.enumerate()) - {threading.main_thread()}:
        thread.join(10)
    told = capfd.readouterr().err.splitlines()
    assert told[0].startswith(f"warning: waiting for rank 0 at 127.0.0.1:{port}")
    assert len(told) < 5 or what == "another program", told


def test_a_port_that_is_taken_is_told_at_once() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        with pytest.raises(LostRank, match="is another program's: start again, or set MASTER_PORT"):
            meet(f"127.0.0.1:{server.getsockname()[1]}", rank=0, num_ranks=2, timeout_s=60)


def test_a_name_that_does_not_resolve_is_told() -> None:
    with pytest.raises(LostRank, match=r"for rank 0 at no-such-host.invalid:29500 \(Name or service"):
        meet("no-such-host.invalid:29500", rank=1, num_ranks=2, timeout_s=3)


def test_the_descriptor_of_another_file_is_not_listened_on() -> None:
    """A process started by a rank inherits the variable, and not the socket."""
    program = (
        "import os; from dp4tl_dist import rendezvous\n"
        "handle = os.open('/dev/null', os.O_RDONLY); os.environ[rendezvous.LISTENING] = str(handle)\n"
        "assert rendezvous._listening(0) != handle and rendezvous.LISTENING not in os.environ"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([0, 1], "ranks 0-1"), ([0, 2, 3, 4, 9], "ranks 0, 2-4, 9")]
)
def test_ranks_in_words(ranks: list[int], text: str) -> None:
    assert ranks_named(ranks) == text
