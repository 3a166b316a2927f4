"""What rank 0 does alone may take longer than the ranks' timeout; what ends rank 0 then still ends the others."""

import contextlib
import io
import os
import signal
import time

import numpy as np
import pytest
from ranks import run_ranks

from dp4tl_dist import collectives
from dp4tl_dist.errors import UserError
from dp4tl_dist.world import World, all_sum, alone, on_main

TIMEOUT_S = 2


def slow(world: World, how: str) -> object:
    """(result, a sum over the ranks, whether rank 0 told what it was at); or what was raised."""
    collectives.ALONE_TELL_S = 1.0

    def action() -> str:
        time.sleep(3 * TIMEOUT_S)
        if how == "refuses":
            raise UserError("no room")
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        return "done"

    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            result = on_main(world, action) if how == "refuses" else alone(world, "which is slow", action)
        except UserError as error:
            return str(error)
    total = float(all_sum(world, np.ones(1))[0])
    return result, total, "the ranks wait for rank 0, which is slow" in told.getvalue()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_rank_0_may_take_longer_than_the_timeout(num_ranks: int) -> None:
    several = num_ranks > 1
    expected = [("done", num_ranks, several), *[(None, num_ranks, False)] * (num_ranks - 1)]
    assert run_ranks(slow, num_ranks, "works", patience_s=TIMEOUT_S) == expected
    if several:
        assert run_ranks(slow, num_ranks, "refuses", patience_s=TIMEOUT_S) == ["no room"] * num_ranks
        with pytest.raises(RuntimeError, match="rank 0 died"):
            run_ranks(slow, num_ranks, "dies", patience_s=TIMEOUT_S)
