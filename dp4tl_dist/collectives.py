"""What ranks find out and do together; with a single rank, the identity."""

import sys
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError
from dp4tl_dist.waiting import together

if TYPE_CHECKING:
    from dp4tl_dist.world import World

Result = TypeVar("Result")
SIGN_S, ALONE_TELL_S = 0.5, 30.0


def barrier(world: "World") -> None:
    if world.num_ranks > 1:
        all_sum(world, np.zeros(1))


def alone(world: "World", what: str, action: Callable[[], Result]) -> Result | None:
    """Run `action` on rank 0 and return its result there, None elsewhere, on all ranks at once.

    However long it takes, the timeout of collectives does not end the others: rank 0 gives signs of life meanwhile, and
    now and then says what it is at. Where it dies or is stopped they end as ever. `action` has no collective in it.
    """
    if world.num_ranks == 1:
        return action()
    if not world.is_main:
        while all_max(world, np.zeros(1, np.int64))[0]:
            pass
        return None
    done, failed = threading.Event(), list[RuntimeError]()

    def give_signs() -> None:
        began, tell_at = time.monotonic(), ALONE_TELL_S
        try:
            while not done.wait(SIGN_S):
                all_max(world, np.ones(1, np.int64))
                if (waited := time.monotonic() - began) >= tell_at:
                    tell_at = 2 * waited
                    print(f"warning: the ranks wait for rank 0, {what} ({waited:.0f} s)", file=sys.stderr, flush=True)
        except RuntimeError as error:  # another rank is gone: the action is still brought to its end
            failed.append(error)

    signs = threading.Thread(target=give_signs, daemon=True)
    signs.start()
    try:
        result = action()
    finally:
        done.set()
        signs.join()
    if failed:
        raise failed[0]
    all_max(world, np.zeros(1, np.int64))
    return result


def on_main(world: "World", action: Callable[[], Result]) -> Result | None:
    """Run `action` on rank 0 as `alone` does; its UserError is raised on every rank."""
    failures = [""]

    def attempt() -> Result | None:
        try:
            return action()
        except UserError as error:
            failures[0] = str(error)
            return None

    result = alone(world, "which reads or writes a file", attempt)
    if world.num_ranks > 1:
        import torch.distributed as dist

        with together():
            dist.broadcast_object_list(failures)
    if failures[0]:
        raise UserError(failures[0])
    return result


def all_sum(world: "World", values: NDArray[Any]) -> NDArray[Any]:
    """The elementwise sum of `values` over the ranks (int64 or float64), on every rank."""
    return _all_reduce(world, values, "SUM")


def all_max(world: "World", values: NDArray[Any]) -> NDArray[Any]:
    """The elementwise maximum of `values` over the ranks, on every rank."""
    return _all_reduce(world, values, "MAX")


def _all_reduce(world: "World", values: NDArray[Any], how: str) -> NDArray[Any]:
    if world.num_ranks == 1:
        return values
    import torch
    import torch.distributed as dist

    tensor: torch.Tensor = torch.from_numpy(np.array(values))
    with together():
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how))
    return tensor.numpy()


def gather_rows(world: "World", positions: NDArray[np.int64], rows: NDArray[Any], num_rows: int) -> NDArray[Any]:
    """Put each rank's `rows` (n_of_rank, ...) at `positions` (n_of_rank,) of one array (num_rows, ...), on every rank.

    Raises RuntimeError unless every position of `num_rows` is written exactly once over all ranks.
    """
    # A sum over disjoint rows is a gather that needs no padding and no knowledge of the others' sizes.
    inside = (positions >= 0) & (positions < num_rows)
    counts = np.bincount(positions[inside], minlength=num_rows).astype(np.int64)
    result = np.zeros((num_rows, *rows.shape[1:]), rows.dtype)
    result[positions[inside]] = rows[inside]
    # One number more tells every rank of what lies outside on any.
    outside, *_ = all_sum(world, np.array([np.count_nonzero(~inside)]))
    counts = all_sum(world, counts)
    if outside:
        raise RuntimeError(f"{outside} positions are not among the {num_rows} rows")
    if not (counts == 1).all():
        wrong = np.flatnonzero(counts != 1)
        raise RuntimeError(f"{len(wrong)} of {num_rows} rows were not written exactly once (first: row {wrong[:1]})")
    return all_sum(world, result)
