"""Learning rate and resolution at their corners."""

import math

import pytest

from dp4tl_dist.config import OptimConfig, TrainConfig, load_config
from dp4tl_dist.schedule import Plan, learning_rate, resolution

TRIANGLE = OptimConfig(epochs=16, lr=0.5, schedule="triangular", peak_epoch=2)
COSINE = OptimConfig(epochs=10, lr=2.0, schedule="cosine", peak_epoch=2)


@pytest.mark.parametrize(
    ("optim", "epoch", "expected"),
    [
        (TRIANGLE, 0, 0.5 * 1e-4), (TRIANGLE, 1, 0.25), (TRIANGLE, 2, 0.5), (TRIANGLE, 9, 0.25), (TRIANGLE, 16, 0),
        (COSINE, 0, 2e-4), (COSINE, 1, 1.0), (COSINE, 2, 2.0), (COSINE, 6, 1.0), (COSINE, 10, 0),
        (COSINE, 4, 1 + math.sqrt(0.5)),
        (OptimConfig(epochs=4, lr=3.0, schedule="cosine", peak_epoch=0), 0, 3.0),
        (OptimConfig(epochs=4, lr=3.0, schedule="triangular", peak_epoch=0), 0, 3.0),
        (OptimConfig(epochs=4, lr=3.0, schedule="triangular", peak_epoch=4), 2, 1.5),
        (OptimConfig(epochs=4, lr=3.0, schedule="constant"), 0, 3.0),
        (OptimConfig(epochs=4, lr=3.0, schedule="constant"), 3.99, 3.0),
    ],
)  # fmt: skip
def test_learning_rate_at_the_corners(optim: OptimConfig, epoch: float, expected: float) -> None:
    assert learning_rate(optim, epoch) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("optim", [TRIANGLE, COSINE])
def test_one_peak(optim: OptimConfig) -> None:
    rates = [learning_rate(optim, step / 100) for step in range(100 * optim.epochs + 1)]
    top = round(optim.peak_epoch * 100)
    assert rates[top] == max(rates) == optim.lr
    assert all(a <= b for a, b in zip(rates[:top], rates[1 : top + 1], strict=True))
    assert all(a > b for a, b in zip(rates[top:-1], rates[top + 1 :], strict=True))
    assert all(rate > 0 for rate in rates[:-1])


def test_the_published_ramp() -> None:
    optim = load_config(TrainConfig, "resnet18-surrogate").train
    sides = [resolution(optim, epoch) for epoch in range(optim.epochs)]
    assert sides[:12] == [160] * 12 and sides[13:] == [192] * 3
    assert sides[12] in (160, 192)


@pytest.mark.parametrize(("start", "end", "step"), [(64, 256, 32), (96, 224, 32), (32, 64, 4), (128, 128, 32)])
def test_a_ramp_grows_in_its_steps(start: int, end: int, step: int) -> None:
    optim = OptimConfig(
        epochs=20, start_resolution=start, resolution=end, ramp_start=3, ramp_end=15, resolution_step=step
    )
    sides = [resolution(optim, epoch) for epoch in range(20)]
    assert sides[:4] == [start] * 4 and sides[15:] == [end] * 5
    assert sides == sorted(sides) and all(side % step == 0 for side in sides)
    for epoch in range(4, 15):
        exact = start + (end - start) * (epoch - 3) / 12
        assert abs(sides[epoch] - exact) <= step / 2


def test_no_ramp() -> None:
    assert {resolution(OptimConfig(resolution=200), epoch) for epoch in range(16)} == {200}
    at_once = OptimConfig(start_resolution=64, resolution=128, ramp_start=5, ramp_end=5)
    assert [resolution(at_once, epoch) for epoch in (4, 5)] == [64, 128]


@pytest.mark.parametrize(("kept", "steps"), [(64, 0), (64, 40), (20, 40), (12, 33), (8, 5)])
def test_schedule_and_ramp_stretch_over_the_steps(kept: int, steps: int) -> None:
    """Whatever the passes over the samples, a run goes once through its schedule, as one of `epochs` epochs does."""
    optim = OptimConfig(epochs=5, steps=steps, batch_size=8, lr=1.0, peak_epoch=1, start_resolution=32, resolution=64,
                        ramp_start=1, ramp_end=4, resolution_step=8)  # fmt: skip
    plan = Plan(kept, optim)
    assert plan.num_steps == (steps or kept // 8 * 5)
    ends = [plan.last_step(epoch) for epoch in range(plan.num_epochs)]
    assert ends[-1] == plan.num_steps and ends[:-1] == [(i + 1) * (kept // 8) for i in range(plan.num_epochs - 1)]
    assert [plan.position(0), plan.position(plan.num_steps)] == [0, 5]
    rates = [learning_rate(optim, plan.position(step)) for step in range(plan.num_steps)]
    assert abs(rates.index(max(rates)) - plan.num_steps / 5) <= 1 and 0 < rates[-1] <= 2 / plan.num_steps * 5
    sides = [plan.side(epoch) for epoch in range(plan.num_epochs)]
    assert sides == sorted(sides) and sides[0] == 32
    if not steps:  # an epoch's position is its number, to the bit
        assert [plan.position(epoch * (kept // 8)) for epoch in range(5)] == [0, 1, 2, 3, 4]
        assert all(plan.position(step) == step / (kept // 8) for step in range(plan.num_steps))
