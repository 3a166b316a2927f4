"""Order as arithmetic: properties over grids of sizes, ranks, batches, epochs and resume points."""

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dp4tl_dist.config import OptimConfig
from dp4tl_dist.data.order import check_indices, epoch_order, inference_batches, rank_batches, spread_batches
from dp4tl_dist.errors import UserError
from dp4tl_dist.schedule import Plan

SIZES = [1, 2, 7, 64, 1000]


def kept_of(size, stride=3):
    return np.arange(size, dtype=np.int64) * stride + 5


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_epoch_order_is_a_permutation_that_depends_on_its_arguments_alone(size, paged, epoch):
    kept = kept_of(size)
    pages = kept // 10 if paged else None
    order = epoch_order(kept, pages, seed=3, epoch=epoch, window=4)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), kept)
    assert np.array_equal(order, epoch_order(kept.copy(), pages, seed=3, epoch=epoch, window=4))
    mixed = np.random.default_rng(size).permutation(size)
    again = epoch_order(kept[mixed], None if pages is None else pages[mixed], seed=3, epoch=epoch, window=4)
    assert np.array_equal(order, again)
    if size >= 64:
        assert not np.array_equal(order, epoch_order(kept, pages, seed=3, epoch=epoch + 1, window=4))
        assert not np.array_equal(order, epoch_order(kept, pages, seed=4, epoch=epoch, window=4))


def test_the_order_stays_the_same_over_versions():
    assert epoch_order(np.arange(10), seed=0, epoch=0).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    assert epoch_order(np.arange(10), np.arange(10) // 2, seed=1, epoch=2, window=2).tolist() == [
        8,
        9,
        5,
        4,
        1,
        0,
        6,
        3,
        2,
        7,
    ]


@pytest.mark.parametrize("seed", range(3))
def test_each_page_is_needed_during_one_bounded_stretch(seed):
    num_pages, per_page, window = 400, 20, 8
    kept = np.arange(num_pages * per_page)
    pages = kept // per_page
    order = epoch_order(kept, pages, seed=seed, epoch=0, window=window)
    place = np.empty(len(kept), np.int64)
    place[order] = np.arange(len(kept))
    of_page = place.reshape(num_pages, per_page)
    assert (np.ptp(of_page, axis=1) <= (window + 2) * per_page).all()
    # And within that stretch samples of several pages mix: a batch of two pages' size is not two pages.
    batches = pages[order].reshape(-1, 2 * per_page)
    assert np.mean([len(np.unique(batch)) for batch in batches]) > window * 0.8


def test_a_window_over_the_whole_file_is_a_plain_shuffle():
    kept = np.arange(300)
    plain = epoch_order(kept, seed=1, epoch=1)
    assert np.array_equal(plain, epoch_order(kept, kept // 100, seed=1, epoch=1, window=3))


def test_plain_order_is_even():
    # Over many epochs each sample's mean place is the middle: chi-square-like bound with a wide margin.
    places = np.stack([np.argsort(epoch_order(np.arange(50), seed=9, epoch=e)) for e in range(400)])
    assert np.abs(places.mean(0) - 24.5).max() < 4 * 14.43 / np.sqrt(400)


@pytest.mark.parametrize(
    ("size", "ranks", "per_rank", "drop"), list(product([24, 25, 100], [1, 2, 3, 4], [1, 2, 5], [0, 1, 24]))
)
def test_ranks_share_the_global_batches(size, ranks, per_rank, drop):
    batch = ranks * per_rank
    order = epoch_order(kept_of(size), seed=0, epoch=0)
    parts = [rank_batches(order, batch_size=batch, num_ranks=ranks, rank=r, drop_first=drop) for r in range(ranks)]
    steps = (size - drop) // batch
    assert all(part.shape == (steps, per_rank) for part in parts)
    for step in range(steps):
        together = np.concatenate([part[step] for part in parts])
        assert together.tolist() == order[drop + step * batch :][:batch].tolist()


@pytest.mark.parametrize(("ranks_before", "ranks_after"), list(product([1, 2, 4], [1, 2, 4])))
@pytest.mark.parametrize("done", [0, 1, 5, 12])
def test_resume_continues_exactly_also_with_other_ranks(ranks_before, ranks_after, done):
    order = epoch_order(kept_of(100), seed=0, epoch=4)

    def run(ranks, drop):
        parts = [rank_batches(order, batch_size=8, num_ranks=ranks, rank=r, drop_first=drop) for r in range(ranks)]
        return np.concatenate(parts, axis=1)

    whole = run(1, 0)
    assert np.array_equal(whole, np.concatenate([run(ranks_before, 0)[:done], run(ranks_after, 8 * done)]))


@pytest.mark.parametrize(("size", "batch", "ranks"), list(product([0, 1, 7, 8, 9, 100], [1, 4, 8, 128], [1, 2, 3, 5])))
def test_inference_covers_everything_once_in_the_batches_of_one_rank(size, batch, ranks):
    kept = kept_of(size)
    alone = inference_batches(kept, batch_size=batch, num_ranks=1, rank=0)
    together = [b for r in range(ranks) for b in inference_batches(kept, batch_size=batch, num_ranks=ranks, rank=r)]
    assert [b.tolist() for b in alone] == [b.tolist() for b in together]
    assert np.array_equal(np.concatenate([*together, np.empty(0, np.int64)]), kept)
    assert all(len(b) == batch for b in together[:-1])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 9}, "does not divide"),
        ({"batch_size": 102}, "do not fill"),
        ({"drop_first": 101}, "drop_first"),
        ({"drop_first": -1}, "drop_first"),
        ({"rank": 2}, "rank 2"),
        ({"batch_size": 0}, "batch_size 0"),
    ],
)
def test_wrong_shares_are_refused(change, words):
    with pytest.raises(UserError, match=words):
        rank_batches(np.arange(100), **{"batch_size": 10, "num_ranks": 2, "rank": 0} | change)


def test_wrong_orders_are_refused():
    for change in ({"seed": -1}, {"epoch": -1}, {"window": 0}):
        with pytest.raises(UserError):
            epoch_order(np.arange(3), **{"seed": 0, "epoch": 0} | change)
    with pytest.raises(UserError, match="2 pages were given for 3"):
        epoch_order(np.arange(3), np.arange(2), seed=0, epoch=0)


@pytest.mark.parametrize(
    ("indices", "words"),
    [
        (np.array([0, 10]), "do not fit 10"),
        (np.array([-1, 3]), "from -1"),
        (np.array([1, 1, 2]), "1 indices are repeated"),
        (np.array([0.0, 1.0]), "float64"),
        (np.array([True, False]), "bool"),
        (np.array([[1, 2]]), "2 axes"),
        (np.array([2**64 - 1], np.uint64), "do not fit"),
    ],
)
def test_wrong_indices_are_refused(indices, words):
    with pytest.raises(UserError, match=f"it: .*{words}"):
        check_indices(indices, 10, what="it")


@pytest.mark.parametrize("dtype", ["int64", "uint8", "int32"])
def test_right_indices_become_int64(dtype):
    checked = check_indices(np.array([9, 0, 3], dtype), 10, what="it")
    assert checked.dtype == np.int64 and checked.tolist() == [9, 0, 3]
    assert check_indices(np.empty(0, np.int64), 10, what="it").tolist() == []


def test_imagenet_takes_well_under_a_second():
    kept = np.arange(1_280_000)
    for pages in (None, kept // 70):
        start = time.perf_counter()
        epoch_order(kept, pages, seed=0, epoch=0)
        assert time.perf_counter() - start < 3  # about 0.3 s on an idle core; the rest is for busy machines


@given(st.integers(1, 200), st.integers(1, 300), st.integers(1, 4), st.integers(0, 5))
def test_spread_batches_take_every_sample_once_however_many_ranks(size, batch, ranks, first):
    order = np.random.default_rng(size).permutation(size).astype(np.int64)
    mine = [spread_batches(order, batch_size=batch, num_ranks=ranks, rank=rank) for rank in range(ranks)]
    steps = [np.concatenate(parts) for parts in zip(*mine, strict=True)]
    alone = spread_batches(order, batch_size=batch, num_ranks=1, rank=0)
    assert [step.tolist() for step in steps] == [step.tolist() for step in alone]
    assert np.concatenate(steps).tolist() == order.tolist()
    assert len(steps) == -(-size // batch) and max(map(len, steps)) - min(map(len, steps)) <= 1
    assert all(max(map(len, parts)) - min(map(len, parts)) <= 1 for parts in zip(*mine, strict=True))
    plan = Plan(size, OptimConfig(batch_size=batch, epochs=16), whole=True)
    assert [plan.seen(step + 1) - plan.seen(step) for step in range(len(steps))] == list(map(len, steps))
    assert plan.seen(len(steps) * 3) == 3 * size
    rest = spread_batches(order, batch_size=batch, num_ranks=1, rank=0, first=first)
    assert [step.tolist() for step in rest] == [step.tolist() for step in alone[first:]]
