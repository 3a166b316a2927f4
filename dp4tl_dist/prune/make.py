"""The verb `prune`: choose what to keep of a source, and of its validation set. (`vote` lives in `prune.vote`.)"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.subset import Subset, samples_of_groups, save_subsets
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import check_output, make_meta
from dp4tl_dist.log import warn
from dp4tl_dist.prune.choice import NO_GROUPS, Amount, Choice, check_choice, choose, parse_within
from dp4tl_dist.prune.vote import vote

__all__ = ["Amount", "PruneSummary", "prune", "val_path", "vote"]


@dataclass(frozen=True)
class PruneSummary:
    """What `prune` kept."""

    method: str
    num_kept: int
    num_samples: int
    groups_kept: int | None
    num_groups: int
    what: str = "classes"
    val_kept: int | None = None
    val_samples: int | None = None

    def __str__(self) -> str:
        groups = "" if self.groups_kept is None else f" of {self.groups_kept} of {self.num_groups} {self.what}"
        text = f"{self.num_kept} of {self.num_samples} samples{groups} ({self.method})"
        if self.val_kept is None:
            return text
        chosen = "samples" if self.groups_kept is None else self.what
        whole = "" if chosen == "classes" else f", left whole: {chosen} were chosen, not classes"
        return f"{text}; validation: {self.val_kept} of {self.val_samples} samples{whole}"


def val_path(out: Path) -> Path:
    """Where the validation set's subset goes by default: X.npz -> X.val.npz."""
    return out.with_name(f"{out.stem}.val.npz")


def prune(
    *,
    source: Path,
    out: Path,
    votes: Path | Sequence[Path] | None = None,
    influence: Path | None = None,
    scores: Path | None = None,
    random: str | None = None,
    list_file: Path | None = None,
    within: str | None = None,
    keep: float | Literal["auto"] | None = None,
    keep_classes: int | None = None,
    coverage: float | None = None,
    like: Path | None = None,
    balanced: bool | None = None,
    reverse: bool = False,
    seed: int = 0,
    apply_to: Path | None = None,
    out_val: Path | None = None,
    combine: str = "normalised",
    weights: list[float] | None = None,
    force: bool = False,
) -> PruneSummary:
    """Write the subset of `source` that one selector (votes, influence, scores, random, list_file) and amount choose.

    votes: one file or several, whose targets count together. random: "classes", "samples" or "balanced". within:
    "SCORES:SHARE" of the samples of each kept class. `reverse` takes as much from the ranking's other end. With
    `apply_to`, the validation beton loses the same classes, in a second subset at `out_val`. Bad input is a UserError,
    and nothing is written then.
    """
    files = () if votes is None else (votes,) if isinstance(votes, Path) else tuple(votes)
    choice = Choice(
        Amount(keep, keep_classes, coverage, like), votes=files, influence=influence, scores=scores, random=random,
        list_file=list_file, within=parse_within(within), balanced=balanced, reverse=reverse, combine=combine,
        weights=weights, seed=seed,
    )  # fmt: skip
    check_choice(choice)
    out_val = out_val or val_path(out)
    read = [source, *files, influence, scores, list_file, choice.within and choice.within[0], like, apply_to]
    for path in [out] if apply_to is None else [out, out_val]:
        check_output(path, force=force, inputs=read)
    beton = open_beton(source)
    config = {
        "source": str(source), "votes": [str(path) for path in files] or None,
        "influence": influence and str(influence), "scores": scores and str(scores), "random": random,
        "list": list_file and str(list_file), "within": within, "keep": keep, "keep_classes": keep_classes,
        "coverage": coverage, "like": like and str(like), "balanced": balanced, "reverse": reverse, "combine": combine,
        "weights": weights,
    }  # fmt: skip
    subset, inputs, metas = choose(beton, choice)
    inputs = {"source": beton.fingerprint, **inputs}
    about = {"groups_are": "classes", "num_groups": beton.num_classes, **subset.meta}
    drawn = seed if choice.draws else None
    meta = make_meta("subset", config=config, seed=drawn, inputs=inputs, made_from=metas) | about
    chosen = _not_empty(replace(subset, meta=meta), source)
    val = None if apply_to is None else _open_val(apply_to, beton)
    chosen_val = None if val is None else _not_empty(_apply(chosen, val), val.path)
    save_subsets({out: chosen} if chosen_val is None else {out: chosen, out_val: chosen_val})
    if chosen_val is None and out_val.exists():
        warn(f"{out_val} is of an earlier subset than {out}: remove it, or add --apply-to to make it anew")
    return PruneSummary(
        chosen.method, len(chosen.indices), beton.num_samples, len(chosen.groups) or None,
        meta["num_groups"], meta["groups_are"],
        None if chosen_val is None else len(chosen_val.indices), None if val is None else val.num_samples,
    )  # fmt: skip


def _open_val(path: Path, source: Beton) -> Beton:
    val = open_beton(path)
    check_val_classes(path, val.classes, source.path, source.classes)
    return val


def check_val_classes(path: Path, classes: Sequence[str], source: Path, wanted: Sequence[str]) -> None:
    """Raise UserError unless a validation set has the source's classes."""
    if tuple(classes) != tuple(wanted):
        pairs = zip(wanted, classes, strict=False)
        place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(wanted), len(classes)))
        raise UserError(
            f"{path} has other classes than {source} ({len(classes)} and {len(wanted)}, the first to "
            f"differ is number {place}): --apply-to needs the source's own validation set"
        )


def _apply(chosen: Subset, val: Beton) -> Subset:
    """The validation samples of the kept classes; all of them where samples or clusters of samples were chosen."""
    meta = {**chosen.meta, "inputs": {**chosen.meta["inputs"], "source": val.fingerprint}}
    if len(chosen.groups) == 0 or meta["groups_are"] != "classes":
        return Subset(np.arange(val.num_samples, dtype=np.int64), NO_GROUPS, 0.0, chosen.method, meta)
    return Subset(
        samples_of_groups(val.labels_for("--apply-to"), chosen.groups), chosen.groups, chosen.ratio, chosen.method, meta
    )


def _not_empty(subset: Subset, path: Path) -> Subset:
    if len(subset.indices) == 0:
        raise UserError(
            f"{path} has no sample of the {len(subset.groups)} kept {subset.meta['groups_are']}: keep more of them"
        )
    return subset
