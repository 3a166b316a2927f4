"""Evaluation counts every sample once, for any number of ranks, and leaves the module as it was."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from dp4tl_dist.data.loader import CentreView
from dp4tl_dist.train.evaluate import Split, evaluate
from dp4tl_dist.train.source import FeatureSource
from dp4tl_dist.train.task import Supervised
from dp4tl_dist.world import World

CASES = [(1, 8), (7, 8), (8, 8), (41, 8), (41, 50), (90, 7)]


class Table(nn.Module):
    """Logits straight from the input, scaled by a buffer as batch norm would."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(9, affine=False)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.norm(images)
        return result


def samples(count: int) -> FeatureSource:
    generator = torch.Generator().manual_seed(count)
    return FeatureSource(torch.randn(200, 9, generator=generator), torch.randint(0, 9, (200,), generator=generator))


def kept_of(count: int) -> np.ndarray:
    return np.sort(np.random.default_rng(count).permutation(200)[:count])


def scores(world: World, cases: list[tuple[int, int]]) -> list[tuple[float, float, float, int]]:
    """Each case's score; the ranks' batch-norm statistics differ by their rank."""
    module = Table()
    task = Supervised(module)
    engine = _Bare()
    module.norm.running_mean.fill_(float(world.rank))  # type: ignore[operator]
    module.train()
    result = []
    for count, batch_size in cases:
        split = Split(samples(count), kept_of(count))
        score = evaluate(task, engine, world, split, CentreView(8), batch_size=batch_size)  # type: ignore[arg-type]
        assert module.training and module.norm.running_mean.tolist() == [float(world.rank)] * 9  # type: ignore[operator]
        result.append((score.top1, score.top5, score.loss, score.num_samples))
    return result


class _Bare:
    """An engine without data parallelism: the module here has nothing to train."""

    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", enabled=False)


def oracle(count: int, mean: float) -> tuple[float, float, float]:
    """(top1, top5, cross-entropy) sample by sample."""
    source, hits, hits5, loss = samples(count), 0, 0, 0.0
    for position in kept_of(count):
        logits = (source.features[position].double().numpy() - mean) / np.sqrt(1 + 1e-5)
        label = int(source.labels[position])
        hits += int(np.argmax(logits)) == label
        hits5 += label in np.argsort(-logits)[:5]
        loss += np.log(np.exp(logits).sum()) - logits[label]
    return hits / count, hits5 / count, loss / count


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_against_a_slow_oracle(num_ranks: int) -> None:
    results = run_ranks(scores, num_ranks, CASES) if num_ranks > 1 else [scores(World(), CASES)]
    assert all(result == results[0] for result in results)
    for (count, _), (top1, top5, loss, num_samples) in zip(CASES, results[0], strict=True):
        expected = oracle(count, (num_ranks - 1) / 2)
        assert (top1, top5, num_samples) == (expected[0], expected[1], count)
        assert loss == pytest.approx(expected[2], rel=1e-5)


def test_fewer_classes_than_five() -> None:
    source = FeatureSource(torch.eye(3), torch.tensor([0, 1, 0]))
    task = Supervised(nn.Identity())
    score = evaluate(task, _Bare(), World(), Split(source, np.arange(3)), CentreView(8))  # type: ignore[arg-type]
    assert score.top1 == pytest.approx(2 / 3) and score.top5 == 1.0


def test_label_smoothing_does_not_touch_the_validation_loss() -> None:
    split = Split(samples(30), kept_of(30))
    losses = {
        evaluate(Supervised(Table(), label_smoothing=s), _Bare(), World(), split, CentreView(8)).loss  # type: ignore[arg-type]
        for s in (0.0, 0.4)
    }
    assert len(losses) == 1
