"""Scores within a class by where its samples lie in feature space: Moderate, herding, k-centre. Pure numpy.

Each function takes the features of one class, float64 (n, dim), and returns float64 (n,). Nothing is summed by a linear
algebra library, whose rounding depends on its threads: the order of a class is the same wherever it is made.
"""

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
Scores = NDArray[np.float64]


def moderate(features: Features) -> Scores:
    """The L2 distance to the class's median, taken dimension by dimension. Kept: those in the middle.

    Xia, Liu, Yu, Shen, Han, Liu: "Moderate Coreset", ICLR 2023: samples whose distance is close to the median of the
    distances are neither redundant nor odd. The centre is the median as in the authors' code, and the middle is taken
    of each class, so that classes of wide and of narrow spread keep the same share.
    """
    return _length(features - np.median(features, axis=0))


def herding(features: Features) -> Scores:
    """The place, 1 for the first down to 0, in which greedy herding takes a sample. Kept: the highest.

    Welling: "Herding Dynamical Weights to Learn", ICML 2009, in the form of iCaRL's exemplars (Rebuffi et al., CVPR
    2017, algorithm 4): each next sample brings the mean of those taken nearest to the mean of the class. Equally good
    ones go by position. n^2 x dim operations.
    """
    total = _in_order(features)
    mean, squares, order = total / len(features), np.einsum("ij,ij->i", features, features), []
    taken = np.zeros_like(mean)
    free = np.zeros(len(features))
    for count in range(1, len(features) + 1):
        # ||mean - (taken + x) / count||^2 up to what all x share.
        cost = squares - 2 * np.einsum("ij,j->i", features, count * mean - taken) + free
        best = int(cost.argmin())
        order.append(best)
        taken = taken + features[best]
        free[best] = np.inf
    return _places(order)


def k_centre(features: Features) -> Scores:
    """The place, 1 for the first down to 0, in which the farthest-first rule takes a sample. Kept: the highest.

    Sener and Savarese: "Active Learning for Convolutional Neural Networks: A Core-Set Approach", ICLR 2018 (arXiv
    1708.00489), algorithm 1: each next sample is the one farthest from all that were taken. The first one is the
    nearest to the class's mean. Equally far ones go by position. n^2 x dim operations.
    """
    nearest = -_length(features - _in_order(features) / len(features))
    order: list[int] = []
    for _ in range(len(features)):
        best = int(nearest.argmax())
        order.append(best)
        distance = _length(features - features[best])
        nearest = distance if len(order) == 1 else np.minimum(nearest, distance)
        nearest[order] = -np.inf
    return _places(order)


def _in_order(features: Features) -> NDArray[np.float64]:
    """The sum (dim,) of the rows, added from the first to the last."""
    return np.add.reduce(features, axis=0)


def _length(rows: Features) -> Scores:
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))


def _places(order: list[int]) -> Scores:
    scores = np.empty(len(order))
    scores[order] = 1 - np.arange(len(order)) / len(order)
    return scores
