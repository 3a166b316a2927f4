"""The verb `prune`: choose what to keep of a source, and of its validation set. (`vote` lives in `prune.vote`.)"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.subset import Subset, samples_of_groups, save_subset
from dp4tl_dist.errors import UserError, one_of
from dp4tl_dist.files import check_output, digest_file, make_meta
from dp4tl_dist.prune import select
from dp4tl_dist.prune.vote import vote
from dp4tl_dist.prune.votes_file import load_votes

__all__ = ["Amount", "PruneSummary", "prune", "val_path", "vote"]

NO_GROUPS = np.zeros(0, np.int64)


@dataclass(frozen=True)
class Amount:
    """How much to keep: exactly one of the three is given, and none where a list says it all."""

    keep: float | None = None
    keep_classes: int | None = None
    coverage: float | None = None

    @property
    def num_given(self) -> int:
        return sum(value is not None for value in (self.keep, self.keep_classes, self.coverage))

    def count(self, num_groups: int, votes_sorted: NDArray[Any] | None = None) -> int:
        """The number of groups to keep. `votes_sorted` (groups,), descending, is what coverage needs."""
        if self.keep is not None:
            return select.count_for_share(num_groups, self.keep)
        if self.keep_classes is not None:
            return select.check_count(num_groups, self.keep_classes)
        if votes_sorted is None or self.coverage is None:
            raise UserError("--coverage counts votes: use it with --votes, or use --keep or --keep-classes")
        return select.count_for_coverage(votes_sorted, self.coverage)


@dataclass(frozen=True)
class PruneSummary:
    """What `prune` kept."""

    method: str
    num_kept: int
    num_samples: int
    groups_kept: int | None
    num_groups: int
    val_kept: int | None = None
    val_samples: int | None = None

    def __str__(self) -> str:
        groups = "" if self.groups_kept is None else f" of {self.groups_kept} of {self.num_groups} classes"
        text = f"{self.num_kept} of {self.num_samples} samples{groups} ({self.method})"
        if self.val_kept is None:
            return text
        whole = ", left whole: samples were chosen, not classes" if self.groups_kept is None else ""
        return f"{text}; validation: {self.val_kept} of {self.val_samples} samples{whole}"


def val_path(out: Path) -> Path:
    """Where the validation set's subset goes by default: X.npz -> X.val.npz."""
    return out.with_name(f"{out.stem}.val.npz")


def prune(
    *,
    source: Path,
    out: Path,
    votes: Path | None = None,
    random: str | None = None,
    list_file: Path | None = None,
    keep: float | None = None,
    keep_classes: int | None = None,
    coverage: float | None = None,
    reverse: bool = False,
    seed: int = 0,
    apply_to: Path | None = None,
    out_val: Path | None = None,
    combine: str = "normalised",
    weights: list[float] | None = None,
    force: bool = False,
) -> PruneSummary:
    """Write the subset of `source` that one selector (votes, random, list_file) and one amount choose.

    random: "classes" or "samples". `reverse` takes as many groups from the ranking's other end. With `apply_to`, the
    validation beton loses the same classes, in a second subset at `out_val`. Bad input is a UserError, and nothing is
    written then.
    """
    amount = Amount(keep, keep_classes, coverage)
    _check_choice(votes, random, list_file, amount, reverse=reverse)
    out_val = out_val or val_path(out)
    for path in [out] if apply_to is None else [out, out_val]:
        check_output(path, force=force)
    beton = open_beton(source)
    inputs = {"source": beton.fingerprint}
    config = {
        "source": str(source), "votes": votes and str(votes), "random": random, "list": list_file and str(list_file),
        "keep": keep, "keep_classes": keep_classes, "coverage": coverage, "reverse": reverse,
        "combine": combine, "weights": weights,
    }  # fmt: skip
    if votes is not None:
        choice = _by_votes(votes, beton, amount, reverse=reverse, how=combine, weights=weights)
        inputs["votes"] = digest_file(votes)
    elif list_file is not None:
        choice = _by_class(beton, "list", select.read_list(list_file, beton.classes))
        inputs["list"] = digest_file(list_file)
    else:
        choice = _by_chance(beton, amount, samples=random == "samples", seed=seed)
    meta = make_meta("subset", config=config, seed=seed if random else None, inputs=inputs)
    chosen = _not_empty(replace(choice, meta=meta), source)
    val = None if apply_to is None else _open_val(apply_to, beton)
    chosen_val = None if val is None else _not_empty(_apply(chosen, val), val.path)
    if chosen_val is not None:
        save_subset(out_val, chosen_val)
    save_subset(out, chosen)
    return PruneSummary(
        chosen.method, len(chosen.indices), beton.num_samples, len(chosen.groups) or None, beton.num_classes,
        None if chosen_val is None else len(chosen_val.indices), None if val is None else val.num_samples,
    )  # fmt: skip


def _check_choice(
    votes: Path | None, random: str | None, list_file: Path | None, amount: Amount, *, reverse: bool
) -> None:
    given = sum(choice is not None for choice in (votes, random, list_file))
    if given != 1:
        raise UserError(f"{given} of --votes, --random and --list were given: give exactly one")
    if random is not None:
        one_of("--random", random, ("classes", "samples"))
    if list_file is None and amount.num_given != 1:
        raise UserError(f"{amount.num_given} of --keep, --keep-classes and --coverage were given: give exactly one")
    if list_file is not None and amount.num_given:
        raise UserError("--list names what is kept: leave --keep, --keep-classes and --coverage out")
    if reverse and votes is None:
        raise UserError("--reverse turns a ranking round: use it with --votes")


def _by_class(beton: Beton, method: str, groups: NDArray[np.int64]) -> Subset:
    ratio = (beton.num_classes - len(groups)) / beton.num_classes
    return Subset(samples_of_groups(beton.labels, groups), groups, ratio, method)


def _by_chance(beton: Beton, amount: Amount, *, samples: bool, seed: int) -> Subset:
    if not samples:
        total = beton.num_classes
        return _by_class(beton, "random-classes", select.random_choice(total, amount.count(total), seed=seed))
    if amount.keep is None:
        raise UserError("--random samples takes its amount from --keep alone")
    total = beton.num_samples
    kept = select.random_choice(total, select.count_for_share(total, amount.keep), seed=seed)
    return Subset(kept, NO_GROUPS, (total - len(kept)) / total, "random-samples")


def _by_votes(
    path: Path, beton: Beton, amount: Amount, *, reverse: bool, how: str, weights: list[float] | None
) -> Subset:
    cast = load_votes(path, beton=beton)
    combined, affinity = select.combine(cast.votes, cast.affinity, how=how, weights=weights)
    ranking = select.rank_groups(combined, affinity)
    count = amount.count(len(ranking), combined[ranking])
    chosen = ranking[::-1][:count] if reverse else ranking[:count]
    return _by_class(beton, f"{cast.method}-reverse" if reverse else cast.method, np.sort(chosen))


def _open_val(path: Path, source: Beton) -> Beton:
    val = open_beton(path)
    if val.classes != source.classes:
        pairs = zip(source.classes, val.classes, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(source.num_classes, val.num_classes))
        raise UserError(
            f"{path} has other classes than {source.path} ({val.num_classes} and {source.num_classes}, the first to "
            f"differ is number {place}): --apply-to needs the source's own validation set"
        )
    return val


def _apply(chosen: Subset, val: Beton) -> Subset:
    """The validation samples of the kept classes; all of them where samples were chosen, not classes."""
    by_class = len(chosen.groups) > 0
    indices = samples_of_groups(val.labels, chosen.groups) if by_class else np.arange(val.num_samples, dtype=np.int64)
    meta = {**chosen.meta, "inputs": {**chosen.meta["inputs"], "source": val.fingerprint}}
    return Subset(indices, chosen.groups, chosen.ratio if by_class else 0.0, chosen.method, meta)


def _not_empty(subset: Subset, path: Path) -> Subset:
    if len(subset.indices) == 0:
        raise UserError(f"{path} has no sample of the {len(subset.groups)} kept classes: keep more of them")
    return subset
