"""Scores from the losses that a training logged: forgetting events, correlation of loss differences. Pure numpy."""

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.losses import SampleLosses
from dp4tl_dist.errors import UserError

ROWS = 1 << 16  # samples at once


def forgetting(losses: SampleLosses, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """How often a sample was forgotten: classified correctly at one presentation, and wrongly at the next. Kept: the
    highest. One that was never classified correctly counts as forgotten at every presentation.

    Toneva, Sordoni, Tachet des Combes, Trischler, Bengio, Gordon: "An Empirical Study of Example Forgetting during Deep
    Neural Network Learning", ICLR 2019 (arXiv 1812.05159), section 3. An epoch that left a sample out is no
    presentation of it.
    """
    num_epochs, num_samples = losses.losses.shape
    events, ever = np.zeros(num_samples), np.zeros(num_samples, bool)
    before = np.zeros(num_samples, bool)
    for epoch in range(num_epochs):
        seen, correct = ~np.isnan(losses.losses[epoch]), losses.correct[epoch]
        events += seen & before & ~correct
        ever |= seen & correct
        before = np.where(seen, correct, before)
    return np.where(ever, events, float(num_epochs))


def cld(losses: SampleLosses, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """The correlation of a sample's loss differences, from one validated epoch to the next, with those of the mean
    validation loss of its class. Kept: the highest, of every class the same share.

    Nagaraj, Ravikumar, Roy: "Coresets from Trajectories: Selecting Data via Correlation of Loss Differences", TMLR 2025
    (arXiv 2508.20230). The losses here are those of the training crops at the time when they were seen, not those
    of saved checkpoints. Where nothing can be correlated (a loss that is constant or was not seen twice, a class
    without validation samples) the score is 0.
    """
    epochs = np.flatnonzero(~np.isnan(losses.val_losses).all(axis=1))
    check_validated(len(epochs))
    steps = np.diff(losses.val_losses[epochs].astype(np.float64), axis=0)  # (epochs - 1, classes)
    scores = np.zeros(losses.losses.shape[1])
    for start in range(0, len(scores), ROWS):
        part = slice(start, start + ROWS)
        own = np.diff(losses.losses[:, part][epochs].astype(np.float64), axis=0)
        scores[part] = _correlation(own, steps[:, labels[part]])
    return scores


def check_validated(epochs: int) -> None:
    """UserError where a training validated too seldom for `cld`."""
    if epochs < 3:
        raise UserError(
            f"cld follows the validation loss, and the run has {epochs} validated epochs: train with data.val, "
            "log.sample_losses and 3 epochs or more (train.val_every)"
        )


def _correlation(left: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """Pearson's, of each column (times, n), over the times at which both are known; 0 where it has no value."""
    known = ~(np.isnan(left) | np.isnan(right))
    count = np.maximum(known.sum(axis=0), 1)
    a, b = np.where(known, left, 0), np.where(known, right, 0)
    a, b = (np.where(known, values - values.sum(axis=0) / count, 0) for values in (a, b))
    norm = np.sqrt((a * a).sum(axis=0) * (b * b).sum(axis=0))
    return np.divide((a * b).sum(axis=0), norm, out=np.zeros(len(norm)), where=norm > 0)
