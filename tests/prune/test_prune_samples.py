"""`prune` by scores, within classes, by balanced draws and by several votes files."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.subset import Subset, load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, make_meta, save_npz
from dp4tl_dist.prune.make import prune
from dp4tl_dist.prune.scores_file import Scores, load_scores, save_scores
from dp4tl_dist.prune.votes_file import Votes, save_votes


def write_scores(path: Path, source: Beton, *, keeps: str = "highest", per_class: bool = False) -> Path:
    values = np.random.default_rng(5).random(source.num_samples).astype(np.float32)
    meta = make_meta("scores", inputs={"source": source.fingerprint})
    save_scores(path, Scores(values, "moderate" if keeps == "middle" else "el2n", keeps, per_class, meta))
    return path


def write_votes(path: Path, source: Beton, *rows: list[int], method: str = "lm") -> Path:
    votes = np.array(rows, np.int64)
    predictions = np.concatenate([np.repeat(np.arange(10), row) for row in votes])
    meta = make_meta("votes", inputs={"source": source.fingerprint})
    sizes = votes.sum(axis=1)
    save_votes(path, Votes(votes, np.zeros(votes.shape), predictions, sizes, method, source.classes, meta))
    return path


def kept(source: Beton, folder: Path, **arguments: Any) -> Subset:
    prune(source=source.path, out=folder / "x.npz", force=True, **arguments)
    return load_subset(folder / "x.npz", beton=source)


def test_by_scores(source: Beton, tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.npz", source)
    values = load_scores(path, beton=source).scores
    subset = kept(source, tmp_path, scores=path, keep=0.4, apply_to=source.path)
    assert subset.indices.tolist() == sorted(np.argsort(-values)[:33].tolist())
    assert subset.method == "el2n" and len(subset.groups) == 0 and subset.ratio == 50 / 83
    assert subset.meta["inputs"].keys() == {"source", "scores"} and subset.meta["seed"] is None
    assert len(load_subset(tmp_path / "x.val.npz", beton=source).indices) == 83
    other = kept(source, tmp_path, scores=path, keep=0.4, reverse=True)
    assert other.indices.tolist() == sorted(np.argsort(values)[:33].tolist()) and other.method == "el2n-reverse"


def per_class(source: Beton, subset: Subset) -> list[int]:
    return np.bincount(source.labels[subset.indices], minlength=10).tolist()


def test_class_balance_is_the_methods_or_asked_for(source: Beton, tmp_path: Path) -> None:
    half = [int(count / 2 + 0.5) for count in np.bincount(source.labels, minlength=10)]
    path = write_scores(tmp_path / "s.npz", source)
    assert per_class(source, kept(source, tmp_path, scores=path, keep=0.5)) != half
    assert per_class(source, kept(source, tmp_path, scores=path, keep=0.5, balanced=True)) == half
    path = write_scores(tmp_path / "m.npz", source, keeps="middle", per_class=True)
    assert per_class(source, kept(source, tmp_path, scores=path, keep=0.5)) == half
    assert per_class(source, kept(source, tmp_path, scores=path, keep=0.5, balanced=False)) != half


def test_random_balanced(source: Beton, tmp_path: Path) -> None:
    half = [int(count / 2 + 0.5) for count in np.bincount(source.labels, minlength=10)]
    draws = [kept(source, tmp_path, random="balanced", keep=0.5, seed=seed) for seed in (0, 0, 1)]
    assert all(per_class(source, draw) == half and draw.method == "random-balanced" for draw in draws)
    assert draws[0].indices.tolist() == draws[1].indices.tolist() != draws[2].indices.tolist()
    assert draws[2].meta["seed"] == 1
    same = kept(source, tmp_path, random="samples", keep=0.5, seed=1, balanced=True)
    assert same.indices.tolist() == draws[2].indices.tolist() and same.method == "random-balanced"


def test_within_classes(source: Beton, tmp_path: Path) -> None:
    votes = write_votes(tmp_path / "v.npz", source, [3, 0, 9, 3, 0, 1, 0, 0, 0, 4])
    path = write_scores(tmp_path / "s.npz", source)
    values = load_scores(path).scores
    expected = []
    for label in (2, 9):
        members = np.flatnonzero(source.labels == label)
        expected += members[np.argsort(-values[members])[: int(len(members) / 2 + 0.5)]].tolist()
    for within, scores in ((f"{path}:0.5", None), ("el2n:0.5", path), (f"{path}:0.5", path)):
        subset = kept(source, tmp_path, votes=votes, keep_classes=2, within=within, scores=scores)
        assert subset.indices.tolist() == sorted(expected) and subset.groups.tolist() == [2, 9]
        assert subset.method == "lm+el2n:0.5" and subset.ratio == 0.8
        assert subset.meta["inputs"].keys() == {"source", "votes", "scores"}
    drawn = [
        kept(source, tmp_path, votes=votes, keep_classes=2, within="random:0.5", seed=seed).indices.tolist()
        for seed in (0, 1)
    ]
    assert len(drawn[0]) == len(drawn[1]) == len(expected) and drawn[0] != drawn[1]
    # All samples of the kept classes validate: what is best to train on says nothing of them.
    prune(source=source.path, out=tmp_path / "y.npz", votes=votes, keep_classes=2, within="el2n:0.5", scores=path,
          apply_to=source.path)  # fmt: skip
    val = load_subset(tmp_path / "y.val.npz", beton=source)
    assert len(val.indices) == np.isin(source.labels, [2, 9]).sum()


def test_votes_of_several_files(source: Beton, tmp_path: Path) -> None:
    """A big target joins a small one: normalised, the small one keeps its classes; by counts it loses them."""
    big = write_votes(tmp_path / "big.npz", source, [500, 300, 150, 50, 0, 0, 0, 0, 0, 0])
    small = write_votes(tmp_path / "small.npz", source, [0, 0, 0, 0, 0, 0, 0, 1, 4, 5])
    both = write_votes(tmp_path / "both.npz", source, [500, 300, 150, 50, 0, 0, 0, 0, 0, 0], [0] * 7 + [1, 4, 5])

    def groups(*votes: Path, **arguments: Any) -> list[int]:
        return kept(source, tmp_path, votes=list(votes), keep_classes=4, **arguments).groups.tolist()

    assert groups(big, small) == groups(both) == [0, 1, 8, 9]
    assert groups(big, small, combine="counts") == groups(big, small, combine="sum") == [0, 1, 2, 3]
    assert groups(big, small, combine="max", keep=None) == [0, 1, 8, 9]
    assert groups(small, big, weights=[0.1, 10]) == [0, 1, 2, 3]
    assert load_subset(tmp_path / "x.npz", beton=source).meta["inputs"].keys() == {"source", "votes0", "votes1"}
    fm = write_votes(tmp_path / "fm.npz", source, [0] * 9 + [7], method="fm")
    assert kept(source, tmp_path, votes=[big, fm], keep_classes=2).method == "lm+fm"


def test_on_the_command_line(source: Beton, tmp_path: Path) -> None:
    a = write_votes(tmp_path / "a.npz", source, [9, 0, 0, 0, 0, 0, 0, 0, 0, 1])
    b = write_votes(tmp_path / "b.npz", source, [0, 0, 0, 8, 0, 0, 0, 0, 0, 2])
    scores = write_scores(tmp_path / "s.npz", source)
    where = ["prune", "--source", str(source.path), "--out", str(tmp_path / "x.npz"), "--force"]
    whole = [*where, "--keep", "0.2", "--votes", str(a), str(b), "--weights", "2,1", "--combine", "counts"]
    assert main(whole) == 0
    assert load_subset(tmp_path / "x.npz", beton=source).groups.tolist() == [0, 3]
    again = [*where, "--keep", "0.2", "--votes", str(a), "--votes", str(b), "--weights", "2,1", "--combine", "counts"]
    assert main(again) == 0
    assert load_subset(tmp_path / "x.npz", beton=source).groups.tolist() == [0, 3]
    assert main([*whole, "--scores", str(scores), "--within-class", "el2n:0.5"]) == 0
    assert load_subset(tmp_path / "x.npz", beton=source).method == "lm+el2n:0.5"
    assert main([*where, "--keep", "0.2", "--scores", str(scores), "--class-balanced", "--reverse"]) == 0
    assert main([*where, "--keep", "0.2", "--random", "balanced"]) == 0
    assert main([*where, "--keep", "0.2", "--scores", str(scores), "--votes", str(a)]) == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"scores": "S", "votes": "V", "keep": 0.5}, "exactly one"),
    ({"scores": "S", "keep_classes": 5}, "--keep alone"),
    ({"scores": "S", "coverage": 0.5}, "--keep alone"),
    ({"scores": "S", "within": "el2n:0.5", "keep": 0.5}, "--within-class"),
    ({"votes": "V", "within": "el2n:0.5", "keep": 0.5}, "el2n is not there"),
    ({"votes": "V", "scores": "S", "within": "grand:0.5", "keep": 0.5}, "which is el2n"),
    ({"votes": "V", "within": "el2n", "keep": 0.5}, "SCORES:SHARE"),
    ({"votes": "V", "within": "el2n:1.5", "keep": 0.5}, "SCORES:SHARE"),
    ({"votes": "V", "within": "el2n:nan", "keep": 0.5}, "SCORES:SHARE"),
    ({"votes": "V", "within": ":0.5", "keep": 0.5}, "SCORES:SHARE"),
    ({"random": "samples", "within": "random:0.5", "keep": 0.5}, "--within-class"),
    ({"random": "balanced", "keep_classes": 2}, "--keep alone"),
    ({"random": "classes", "keep": 0.5, "balanced": True}, "--class-balanced"),
    ({"random": "samples", "keep": 0.5, "reverse": True}, "--reverse"),
    ({"scores": "V", "keep": 0.5}, "'scores' file is needed"),
    ({"votes": "S", "keep": 0.5}, "'votes' file is needed"),
    ({"scores": "OTHER", "keep": 0.5}, "made for another source"),
]


@pytest.mark.parametrize(("choice", "says"), BAD, ids=[f"{i}-{says}" for i, (_, says) in enumerate(BAD)])
def test_bad_choices(source: Beton, target: Beton, tmp_path: Path, choice: dict[str, Any], says: str) -> None:
    files = {
        "V": write_votes(tmp_path / "v.npz", source, [1] * 10), "S": write_scores(tmp_path / "s.npz", source),
        "OTHER": write_scores(tmp_path / "t.npz", target),
    }  # fmt: skip
    given = {key: files.get(value, value) if isinstance(value, str) else value for key, value in choice.items()}
    with pytest.raises(UserError, match=says) as caught:
        prune(source=source.path, out=tmp_path / "x.npz", **given)
    assert "\n" not in str(caught.value) and not (tmp_path / "x.npz").exists()


def test_votes_for_other_groups(source: Beton, tmp_path: Path) -> None:
    path = write_votes(tmp_path / "v.npz", source, [1] * 10)
    arrays, meta = load_npz(path, "votes")
    save_npz(tmp_path / "w.npz", arrays, {**meta, "classes": [f"other {i}" for i in range(10)]})
    with pytest.raises(UserError, match="other groups"):
        prune(source=source.path, out=tmp_path / "x.npz", votes=[path, tmp_path / "w.npz"], keep=0.5)


@pytest.mark.parametrize(
    "damage",
    [
        {"scores": np.full(83, np.nan, np.float32)}, {"scores": np.zeros(82, np.float32)}, {"scores": np.zeros(83)},
        {"method": 3}, {"keeps": "best"}, {"keeps": ["highest"]}, {"per_class": 1}, {"inputs": None},
    ],
    ids=lambda damage: next(iter(damage)),
)  # fmt: skip
def test_damaged_scores(source: Beton, tmp_path: Path, damage: dict[str, Any]) -> None:
    path = write_scores(tmp_path / "s.npz", source)
    arrays, meta = load_npz(path, "scores")
    for name, value in damage.items():
        (arrays if name in arrays else meta)[name] = value
    save_npz(path, arrays, meta)
    with pytest.raises(UserError, match=r"s\.npz"):
        load_scores(path, beton=source)
