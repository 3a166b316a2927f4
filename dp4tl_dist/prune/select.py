"""From votes to the groups (classes or clusters) that are kept: pure functions, numpy only.

Every choice is exact and total: there is one answer for given votes, whatever the machine, and ties have a rule.
"""

import difflib
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.errors import UserError, one_of
from dp4tl_dist.inputs import read_text

Groups = NDArray[np.int64]
COMBINE = ("normalised", "counts", "max", "sum")
DECIMALS = 12  # of combined shares: rounding makes shares that are equal on paper compare equal
MAX_LIST_BYTES = 16 << 20


def rank_groups(votes: NDArray[np.number], affinity: NDArray[np.float64]) -> Groups:
    """All group ids (groups,), best first: votes descending, then affinity descending, then id ascending."""
    return np.lexsort((np.arange(len(votes)), -affinity, -votes)).astype(np.int64)


def count_for_share(num_groups: int, keep: float, *, what: str = "--keep") -> int:
    """How many of `num_groups` the share `keep` in (0, 1] is: rounded, halves up, and never none."""
    share = _share(keep, what)
    return max(1, math.floor(share * num_groups + Fraction(1, 2)))


def count_for_coverage(votes_sorted: NDArray[np.number], coverage: float) -> int:
    """The smallest k such that the first k of `votes_sorted` (descending) hold the share `coverage` of all votes."""
    share = _share(coverage, "--coverage")
    whole = votes_sorted
    if whole.dtype.kind == "f":
        whole = np.rint(whole * 10.0**DECIMALS)
    reached = np.cumsum(whole.astype(np.int64))
    # In whole numbers: 0.07 x 100 votes are 7 votes, and not the 7.000000000000001 of floating point.
    needed = math.ceil(share * int(reached[-1]))
    return max(1, int(np.searchsorted(reached, needed, side="left")) + 1)


def check_count(num_groups: int, count: int) -> int:
    """`count` if it is a number of classes that can be kept."""
    if not 1 <= count <= num_groups:
        raise UserError(f"--keep-classes {count} is not between 1 and the {num_groups} classes of the source")
    return count


def combine(
    votes: NDArray[np.int64],
    affinity: NDArray[np.float64],
    *,
    how: str = "normalised",
    weights: list[float] | None = None,
) -> tuple[NDArray[np.number], NDArray[np.float64]]:
    """One row (groups,) of votes and of affinity from those of several targets (targets, groups).

    normalised: each target's votes and affinity are divided by its number of votes first, so that a big target does not
    drown a small one. max: the largest of the normalised ones. counts (or sum): plain counts. `weights` (targets,)
    multiply rows.
    """
    one_of("--combine", how, COMBINE)
    counts = how in ("counts", "sum")
    factors = np.ones(len(votes)) if weights is None else _weights(weights, len(votes))
    if len(votes) == 1:
        return votes[0], affinity[0]
    if counts and weights is None:
        return votes.sum(axis=0), affinity.sum(axis=0)
    if not counts:
        factors = factors / votes.sum(axis=1)
    shares, closeness = votes * factors[:, None], affinity * factors[:, None]
    if how == "max":
        return np.round(shares.max(axis=0), DECIMALS), closeness.max(axis=0)
    return np.round(shares.sum(axis=0), DECIMALS), closeness.sum(axis=0)


def random_keys(num_items: int, *, seed: int) -> NDArray[np.uint64]:
    """A random number for each item (num_items,): raw generator output, which numpy keeps stable over its versions."""
    if not 0 <= seed < 2**63:
        raise UserError(f"--seed {seed} is not between 0 and {2**63 - 1}")
    return np.random.Philox(key=seed).random_raw(num_items)


def random_choice(num_items: int, count: int, *, seed: int) -> Groups:
    """`count` of `num_items` ids, sorted; a smaller count of the same seed is a part of a larger one."""
    return np.sort(np.argsort(random_keys(num_items, seed=seed), kind="stable")[:count]).astype(np.int64)


def read_list(path: Path, classes: tuple[str, ...]) -> Groups:
    """The class ids, sorted, that a text file lists: a name or an id on each line, and '#' starts a comment.

    A class whose name is a number goes by its name. Unknown ones are a UserError that lists a few close names.
    """
    try:
        if path.stat().st_size > MAX_LIST_BYTES:
            raise UserError(f"{path} is too large for a list of classes: is it the right file?")
        lines = read_text(path, limit=MAX_LIST_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UserError(f"cannot read the list {path} ({reason}): it should name one class on each line") from error
    ids = {name: i for i, name in reversed(list(enumerate(classes)))}
    found = {_class_id(line.strip(), ids, f"{path}:{number}") for number, line in enumerate(lines, start=1)} - {None}
    if not found:
        raise UserError(f"{path} lists no class: write one class name or id on each line")
    return np.array(sorted(i for i in found if i is not None), np.int64)


def _class_id(text: str, ids: dict[str, int], where: str) -> int | None:
    """The id that one line means; None for an empty line or a comment."""
    # A class name may hold a '#' itself.
    name = text if text in ids else "" if text.startswith("#") else text.split(" #")[0].split("\t#")[0].strip()
    if not name:
        return None
    if name in ids:
        return ids[name]
    if name.isascii() and name.isdigit():
        if len(name) < 20 and int(name) < len(ids):  # Python refuses thousands of digits
            return int(name)
        raise UserError(f"{where}: class id {name} is past the last one, {len(ids) - 1}")
    close = difflib.get_close_matches(name[:100], ids, n=3, cutoff=0.5) or list(ids)[:3]
    raise UserError(f"{where}: no class is called {name!r}: did you mean {' or '.join(map(repr, close))}?")


def _share(value: float, what: str) -> Fraction:
    """`value` in (0, 1] as the decimal number that its text shows."""
    if not 0 < value <= 1:  # False for NaN as well
        raise UserError(f"{what} {value} is not a share: give a number above 0 and up to 1")
    return Fraction(repr(float(value)))


def _weights(weights: list[float], num_targets: int) -> NDArray[np.float64]:
    if len(weights) != num_targets:
        raise UserError(f"--weights has {len(weights)} numbers, and the votes come from {num_targets} targets")
    if not all(0 < weight < math.inf for weight in weights):
        raise UserError(f"--weights {weights} must be positive, finite numbers: leave a target out to ignore it")
    return np.array(weights, np.float64) / sum(weights)
