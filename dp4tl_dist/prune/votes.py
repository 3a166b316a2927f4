"""How target images vote for source groups: label mapping (LM) and feature mapping (FM).

Sums must not depend on how samples are spread over batches and ranks, so nothing here adds floating-point numbers
that could round: terms are put on a fixed grid and added as integers (`to_units`), and the dot products behind
distances are taken of slices whose products add exactly (`exact_distances`). What remains is elementwise, or the
softmax of a row, by one thread. So any number of threads may compute it.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.errors import UserError
from dp4tl_dist.exact import one_thread

UNIT = 2.0**-30
LIMIT = 2.0**33  # |sum| below this fits int64 in units
CHUNK = 1 << 20  # distances held at once


def to_units(values: Tensor, unit: float = UNIT) -> Tensor:
    """float (...) -> int64 (...) in units of 2^-30, or of another power of two, rounded to the nearest.

    Integers add exactly in any order: a sum of units is bit-identical for any batches and ranks. The error of a term is
    half a unit; a sum of units of 2^-30 is right as long as it stays below 2^33, which `check_sums` proves.
    """
    return (values.double() / unit).round().long()


def from_units(units: Tensor, unit: float = UNIT) -> Tensor:
    """int64 units -> float64, correctly rounded."""
    return units.double() * unit


def fitting_unit(largest_term: float, num_terms: int) -> float:
    """The smallest power of two in whose units the sum of so many terms of that size is sure to fit int64."""
    return 2.0 ** (math.ceil(math.log2(max(largest_term * max(num_terms, 1), 2.0**-900))) - 62)


def largest(values: Tensor) -> float:
    """The largest magnitude in `values`; inf where any is NaN or infinite."""
    top = float(values.abs().amax()) if values.numel() else 0.0
    return math.inf if math.isnan(top) else top


def check_sums(largest_term: float, num_terms: int, *, what: str) -> None:
    """Raise UserError unless `num_terms` terms of that size are finite and their sum fits the units."""
    if not largest_term * max(num_terms, 1) < LIMIT:
        raise UserError(
            f"{what} not finite or far too large (up to {largest_term:g}): has this surrogate's training failed?"
        )


@dataclass
class Tally:
    """What some target images voted. Tallies of disjoint parts add up, exactly."""

    votes: Tensor
    """int64 (groups,)."""
    affinity: Tensor
    """int64 (groups,), in units of 2^-30."""
    predictions: Tensor
    """int64 (images,): the group that each image voted for."""
    largest: float
    """The largest term of `affinity` before rounding, for `check_sums`."""


def lm_tally(logits: Tensor) -> Tally:
    """Label mapping: each image votes for its argmax, the lowest id of equals; affinity is the softmax mass.

    logits: float (images, classes).
    """
    with one_thread():
        mass = logits.double().softmax(dim=1)
    predictions = logits.argmax(dim=1)
    votes, top = torch.bincount(predictions, minlength=logits.shape[1]), largest(mass)
    # A term is at most 2^30 units: float64 adds up to 2^23 such whole numbers exactly, and faster than int64 does.
    units = mass.div_(UNIT).round_().sum(dim=0).long()
    return Tally(votes, units, predictions, top)


def fm_tally(features: Tensor, centres: Tensor) -> Tally:
    """Feature mapping: each image votes for the nearest centre, the lowest id of equals; affinity: minus the distance.

    features: float (images, dim). centres: float64 (groups, dim); a centre with a NaN belongs to an empty group, which
    gets no vote. Its affinity here is 0, as minus infinity has no units; `vote` puts it last.
    """
    num_groups = len(centres)
    empty = centres.isnan().any(dim=1)
    solid = torch.where(empty[:, None], 0.0, centres.double())
    affinity = torch.zeros(num_groups, dtype=torch.int64, device=features.device)
    predictions, top = [], 0.0
    for rows in features.split(max(1, CHUNK // num_groups)):
        distances = exact_distances(rows.double(), solid)
        top = max(top, largest(distances))
        affinity -= to_units(distances).masked_fill(empty, 0).sum(dim=0)
        predictions.append(distances.masked_fill(empty, math.inf).argmin(dim=1))
    found = torch.cat(predictions) if predictions else affinity[:0]
    return Tally(torch.bincount(found, minlength=num_groups), affinity, found, top)


def lm_votes(logits: Tensor, *, num_groups: int) -> tuple[Tensor, Tensor]:
    """votes int64 (groups,) and affinity float64 (groups,) of logits (images, groups); see `lm_tally`."""
    if logits.shape[1] != num_groups:
        raise UserError(f"the surrogate has {logits.shape[1]} outputs, and the source has {num_groups} classes")
    tally = lm_tally(logits)
    return tally.votes, from_units(tally.affinity)


def fm_votes(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """votes int64 (groups,) and affinity float64 (groups,), minus infinity for empty groups; see `fm_tally`."""
    tally = fm_tally(features, centres)
    return tally.votes, from_units(tally.affinity).masked_fill(centres.isnan().any(dim=1), -math.inf)


def add_group_sums(sums: Tensor, counts: Tensor, features: Tensor, labels: Tensor) -> None:
    """Add features (n, dim) of samples in groups `labels` (n,) to `sums` (groups, dim), int64 units, and `counts`."""
    sums.index_add_(0, labels, to_units(features))
    counts += torch.bincount(labels, minlength=len(counts))


def group_sums(features: Tensor, labels: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Sums float64 (groups, dim) of features (n, dim) by group, and counts int64 (groups,)."""
    sums = torch.zeros(num_groups, features.shape[1], dtype=torch.int64, device=features.device)
    counts = torch.zeros(num_groups, dtype=torch.int64, device=features.device)
    add_group_sums(sums, counts, features, labels)
    return from_units(sums), counts


def centres_of(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Group means float64 (groups, dim); NaN for a group without samples."""
    means = np.full_like(sums, np.nan)
    return np.divide(sums, counts[:, None], out=means, where=counts[:, None] > 0)


# ---------------------------------------------------------------- distances without rounding in the sums


def exact_distances(left: Tensor, right: Tensor) -> Tensor:
    """L2 distances float64 (n, groups) of the rows of `left` (n, dim) and `right` (groups, dim), both float64.

    A distance depends on its two rows alone: not on the batch, the chunk, the number of threads or the device, so that
    equal centres are equally near. Memory: a few times the result.
    """
    a, b = _slices(left), _slices(right)
    square = _dot(a, a)[:, None] + _dot(b, b)[None, :]
    return (square - 2 * _dot(a, b, pairs=True)).clamp_(min=0).sqrt_()


def exact_squares(values: Tensor) -> Tensor:
    """Squared lengths float64 (n,) of the rows of `values` (n, dim), float64; each depends on its own row alone."""
    sliced = _slices(values)
    return _dot(sliced, sliced).clamp_(min=0)


def _slices(values: Tensor) -> tuple[Tensor, Tensor]:
    """Two matrices that add up to `values` (n, dim) to within 2^-40 or so of each row's largest element.

    Each holds, for one row, small whole multiples of one power of two: products of two such rows, summed over `dim`,
    fit the 53 bits of float64, so a matrix product of them is exact in whatever order it is added.
    """
    bits = (53 - math.ceil(math.log2(max(values.shape[1], 2)))) // 2
    top = values.abs().amax(dim=1, keepdim=True)
    fraction = torch.frexp(top).mantissa
    scale = torch.where(top > 0, top / fraction, torch.ones_like(top)) * 2.0**-bits
    coarse = (values / scale).round() * scale
    finer = scale * 2.0**-bits
    return coarse, ((values - coarse) / finer).round() * finer


def _dot(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], *, pairs: bool = False) -> Tensor:
    """Dot products of sliced rows: row by row (n,), or of all pairs (n, groups). Exact terms, added in fixed order."""
    terms = [x @ y.T if pairs else (x * y).sum(dim=1) for x in a for y in b]
    return (terms[0] + (terms[1] + terms[2])) + terms[3]
