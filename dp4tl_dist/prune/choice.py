"""One selector and one amount -> the samples that are kept. `make` turns the answer into files."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.subset import Subset, load_subset, samples_of_groups
from dp4tl_dist.errors import UserError, one_of
from dp4tl_dist.files import digest_file
from dp4tl_dist.prune import select
from dp4tl_dist.prune.amount import suggest
from dp4tl_dist.prune.influence import Influence, load_influence, rank_influence
from dp4tl_dist.prune.ranking import choose_samples
from dp4tl_dist.prune.scores_file import Scores, load_scores
from dp4tl_dist.prune.votes_file import Votes, load_votes, same_members

NO_GROUPS = np.zeros(0, np.int64)
AUTO_NEEDS = "--keep auto reads the size off the votes: use it with --votes, or give a share"
CLASSES = "a choice by classes"
RANDOM = ("classes", "samples", "balanced")


@dataclass(frozen=True)
class Amount:
    """How much to keep: exactly one of them is given, and none where a list says it all."""

    keep: float | Literal["auto"] | None = None
    """A share, or what the votes suggest."""
    keep_classes: int | None = None
    coverage: float | None = None
    like: Path | None = None
    """As many classes as this subset has, or samples."""

    @property
    def num_given(self) -> int:
        return sum(value is not None for value in (self.keep, self.keep_classes, self.coverage, self.like))

    def count(self, beton: Beton, votes_sorted: NDArray[Any] | None = None) -> int:
        """The number of groups to keep. `votes_sorted` (groups,), descending, is what coverage and "auto" need."""
        num_groups = beton.num_classes if votes_sorted is None else len(votes_sorted)
        if self.like is not None:
            other = load_subset(self.like, beton=beton)
            groups, kind = other.groups, other.meta.get("groups_are", "classes")
            if not len(groups) or (votes_sorted is None and kind != "classes"):
                kept = kind if len(groups) else "single samples"
                raise UserError(f"--like {self.like} keeps {kept}, and here classes are chosen: use --random samples")
            return select.check_count(num_groups, len(groups))
        if self.keep == "auto":
            if votes_sorted is None:
                raise UserError(AUTO_NEEDS)
            return suggest(votes_sorted).count
        if self.keep is not None:
            return select.count_for_share(num_groups, self.keep)
        if self.keep_classes is not None:
            return select.check_count(num_groups, self.keep_classes)
        if votes_sorted is None or self.coverage is None:
            raise UserError("--coverage counts votes: use it with --votes, or use --keep or --keep-classes")
        return select.count_for_coverage(votes_sorted, self.coverage)

    def share(self, beton: Beton, what: str) -> float:
        """The share of the samples to keep, for selectors that choose samples and not classes."""
        if self.like is not None:
            return len(load_subset(self.like, beton=beton).indices) / beton.num_samples
        if self.keep == "auto":
            raise UserError(AUTO_NEEDS)
        if self.keep is None:
            raise UserError(f"{what} chooses samples: it takes its amount from --keep alone, or --like")
        return self.keep


@dataclass(frozen=True)
class Choice:
    """What `prune` is asked for: one of votes, scores, random and list_file, an amount, and what refines them."""

    amount: Amount
    votes: tuple[Path, ...] = ()
    influence: Path | None = None
    scores: Path | None = None
    random: str | None = None
    list_file: Path | None = None
    within: tuple[str, float] | None = None
    """Of each kept class: the share of its samples that is kept, the best by "random", a scores file or `scores`."""
    balanced: bool | None = None
    """Whether scores keep the same share of every class; None leaves it to the method."""
    reverse: bool = False
    combine: str = "normalised"
    weights: list[float] | None = None
    seed: int = 0

    @property
    def draws(self) -> bool:
        """Whether the seed matters."""
        return self.random is not None or (self.within is not None and self.within[0] == "random")


def parse_within(text: str | None) -> tuple[str, float] | None:
    """ "moderate:0.5" -> ("moderate", 0.5)"""
    if text is None:
        return None
    what, colon, share = text.rpartition(":")
    try:
        number = float(share)
    except ValueError:
        colon = ""
    if not colon or not what or not 0 < number <= 1:
        raise UserError(f"--within-class {text!r} is not of the form SCORES:SHARE, like moderate:0.5 or scores.npz:0.5")
    return what, number


def check_choice(choice: Choice) -> None:
    """Raise UserError where the options do not go together."""
    ranks_classes = bool(choice.votes) or choice.influence is not None
    by_class = bool(choice.votes) + sum(
        value is not None for value in (choice.influence, choice.random, choice.list_file)
    )
    for_within = choice.within is not None and by_class > 0  # then --scores says what is best within a class
    given = by_class + (choice.scores is not None and not for_within)
    if given != 1:
        raise UserError(f"{given} of --votes, --influence, --scores, --random and --list were given: give exactly one")
    if choice.random is not None:
        one_of("--random", choice.random, RANDOM)
    if choice.within is not None and not (ranks_classes or choice.list_file or choice.random == "classes"):
        raise UserError("--within-class chooses among the samples of kept classes: use it with --votes or --list")
    amounts = choice.amount.num_given
    if choice.list_file is None and amounts != 1:
        raise UserError(f"{amounts} of --keep, --keep-classes, --coverage and --like were given: give exactly one")
    if choice.list_file is not None and amounts:
        raise UserError("--list names what is kept: leave --keep, --keep-classes, --coverage and --like out")
    if choice.reverse and not ranks_classes and choice.scores is None:
        raise UserError("--reverse turns a ranking round: use it with --votes or --scores")
    if choice.balanced is not None and (choice.scores is None or for_within) and choice.random != "samples":
        raise UserError("--class-balanced is about single samples: use it with --scores or --random samples")


def choose(beton: Beton, choice: Choice) -> tuple[Subset, dict[str, str], list[dict[str, Any]]]:
    """The subset of `beton` that is asked for, and digests and metas of the files that it was made from."""
    inputs: dict[str, str] = {}
    metas: list[dict[str, Any]] = []
    group_of_sample: NDArray[np.integer] = beton.labels
    if choice.votes:
        subset, group_of_sample, metas = _by_votes(beton, choice)
        several = len(choice.votes) > 1
        inputs |= {f"votes{i}" if several else "votes": digest_file(path) for i, path in enumerate(choice.votes)}
    elif choice.influence is not None:
        influence = load_influence(choice.influence, beton=beton)
        subset, metas = _by_influence(beton, choice, influence), [influence.meta]
        inputs["influence"] = digest_file(choice.influence)
    elif choice.list_file is not None:
        subset = _by_class(beton, "list", select.read_list(choice.list_file, beton.classes))
        inputs["list"] = digest_file(choice.list_file)
    elif choice.scores is not None:
        scores = load_scores(choice.scores, beton=beton)
        subset, metas = _by_scores(beton, choice, scores), [scores.meta]
        inputs["scores"] = digest_file(choice.scores)
    else:
        subset = _by_chance(beton, choice)
    if choice.amount.like is not None:
        inputs["like"] = digest_file(choice.amount.like)
    if choice.within is None:
        return subset, inputs, metas
    scores, path = _within_scores(beton, choice, *choice.within)
    inputs |= {"scores": digest_file(path)} if path else {}
    return _within(group_of_sample, subset, scores, choice.within[1]), inputs, [*metas, scores.meta]


def _by_class(beton: Beton, method: str, groups: NDArray[np.int64]) -> Subset:
    ratio = (beton.num_classes - len(groups)) / beton.num_classes
    return Subset(samples_of_groups(beton.labels_for(CLASSES), groups), groups, ratio, method)


def _by_influence(beton: Beton, choice: Choice, found: Influence) -> Subset:
    count, ranking = choice.amount.count(beton), rank_influence(found.influence)
    chosen = ranking[::-1][:count] if choice.reverse else ranking[:count]
    return _by_class(beton, "influence-reverse" if choice.reverse else "influence", np.sort(chosen))


def _by_votes(beton: Beton, choice: Choice) -> tuple[Subset, NDArray[np.integer], list[dict[str, Any]]]:
    """The subset, the group (class or cluster) of each sample of `beton`, and the votes' metas."""
    cast = [load_votes(path, beton=beton) for path in choice.votes]
    votes, affinity = join_votes(cast, choice.votes)
    combined, closeness = select.combine(votes, affinity, how=choice.combine, weights=choice.weights)
    ranking = select.rank_groups(combined, closeness)
    count = choice.amount.count(beton, combined[ranking])
    chosen = ranking[::-1][:count] if choice.reverse else ranking[:count]
    method = "+".join(dict.fromkeys(item.method for item in cast))
    method, members = f"{method}-reverse" if choice.reverse else method, cast[0].members
    metas = [item.meta for item in cast]
    if members is None:
        return _by_class(beton, method, np.sort(chosen)), beton.labels, metas
    kept, total = samples_of_groups(members.assignment, chosen), len(ranking)
    about = {"groups_are": "clusters", "num_groups": total}
    return Subset(kept, np.sort(chosen), (total - count) / total, method, about), members.assignment, metas


def join_votes(cast: list[Votes], paths: tuple[Path, ...]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Votes and affinity (targets of all files, groups), in the files' order. Other groups are a UserError."""
    for path, item in zip(paths, cast, strict=True):
        if item.classes != cast[0].classes or not same_members(item.members, cast[0].members):
            raise UserError(f"{path} holds votes for other groups than {paths[0]}: cast both for the same ones")
    return np.concatenate([item.votes for item in cast]), np.concatenate([item.affinity for item in cast])


def _by_chance(beton: Beton, choice: Choice) -> Subset:
    if choice.random == "classes":
        chosen = select.random_choice(beton.num_classes, choice.amount.count(beton), seed=choice.seed)
        return _by_class(beton, "random-classes", chosen)
    share, total = choice.amount.share(beton, f"--random {choice.random}"), beton.num_samples
    balanced = choice.random == "balanced" or choice.balanced
    if not balanced:
        kept = select.random_choice(total, select.count_for_share(total, share), seed=choice.seed)
    else:
        draw = select.random_keys(total, seed=choice.seed)
        kept = choose_samples(draw, share, rule="lowest", labels=beton.labels_for(CLASSES))
    return Subset(kept, NO_GROUPS, (total - len(kept)) / total, "random-balanced" if balanced else "random-samples")


def _by_scores(beton: Beton, choice: Choice, scores: Scores) -> Subset:
    share, total = choice.amount.share(beton, "--scores"), beton.num_samples
    balanced = scores.per_class if choice.balanced is None else choice.balanced
    labels = beton.labels_for(CLASSES) if balanced else None
    kept = choose_samples(scores.scores, share, rule=scores.keeps, labels=labels, reverse=choice.reverse)
    method = f"{scores.method}-reverse" if choice.reverse else scores.method
    return Subset(kept, NO_GROUPS, (total - len(kept)) / total, method)


def _within_scores(beton: Beton, choice: Choice, what: str, share: float) -> tuple[Scores, Path | None]:
    """What ranks the samples of a class, and the file that it came from."""
    if what == "random":
        draw = select.random_keys(beton.num_samples, seed=choice.seed)
        return Scores(draw, "random", "lowest", per_class=True), None
    path = choice.scores or Path(what)
    scores = load_scores(path, beton=beton)
    if choice.scores is not None and what not in (scores.method, str(path)):
        raise UserError(f"--within-class {what}:{share:g} is not the method of {path}, which is {scores.method}")
    return scores, path


def _within(groups: NDArray[np.integer], subset: Subset, scores: Scores, share: float) -> Subset:
    inside, labels = subset.indices, groups.astype(np.int64)
    kept = choose_samples(scores.scores[inside], share, rule=scores.keeps, labels=labels[inside])
    return replace(subset, indices=inside[kept], method=f"{subset.method}+{scores.method}:{share:g}")
