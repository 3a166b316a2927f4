"""`prune`: which samples are kept, what the file says of it, and what is refused."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, make_meta, save_npz
from dp4tl_dist.prune import make
from dp4tl_dist.prune.make import prune
from dp4tl_dist.prune.votes_file import Votes, load_votes, save_votes

COUNTS = [3, 0, 9, 3, 0, 1, 0, 0, 0, 4]
AFFINITY = [2.0, 0.5, 8.0, 3.0, 0.1, 1.0, 0.55, 0.5, 0.6, 4.3]
RANKING = [2, 9, 3, 0, 5, 8, 6, 1, 7, 4]


def cast(source: Beton, *rows: list[int]) -> Votes:
    votes = np.array(rows or [COUNTS], np.int64)
    sizes = votes.sum(axis=1)
    predictions = np.concatenate([np.repeat(np.arange(len(row)), row) for row in votes])
    meta = make_meta("votes", inputs={"source": source.fingerprint})
    return Votes(votes, np.tile(AFFINITY, (len(votes), 1)), predictions, sizes, "lm", source.classes, meta)


@pytest.fixture
def votes(source: Beton, tmp_path: Path) -> Path:
    path = tmp_path / "votes.npz"
    save_votes(path, cast(source))
    return path


@pytest.mark.parametrize(
    ("amount", "count"),
    [
        ({"keep": 0.5}, 5), ({"keep": 0.25}, 3), ({"keep": 1.0}, 10), ({"keep": 0.01}, 1), ({"keep_classes": 4}, 4),
        ({"coverage": 0.45}, 1), ({"coverage": 0.46}, 2), ({"coverage": 0.95}, 4), ({"coverage": 1.0}, 5),
    ],
)  # fmt: skip
@pytest.mark.parametrize("reverse", [False, True])
def test_by_votes(
    source: Beton, votes: Path, tmp_path: Path, amount: dict[str, Any], count: int, reverse: bool
) -> None:
    out = tmp_path / "x.npz"
    summary = prune(source=source.path, votes=votes, out=out, reverse=reverse, **amount)
    subset = load_subset(out, beton=source)
    ranking = RANKING[::-1] if reverse else RANKING
    assert subset.groups.tolist() == sorted(ranking[:count])
    assert subset.indices.tolist() == [i for i, label in enumerate(source.labels) if label in ranking[:count]]
    assert subset.ratio == (10 - count) / 10
    assert subset.method == ("lm-reverse" if reverse else "lm")
    assert subset.meta["inputs"].keys() == {"source", "votes"} and subset.meta["seed"] is None
    assert str(len(subset.indices)) in str(summary) and f"{count} of 10 classes" in str(summary)
    assert not make.val_path(out).exists()


def test_several_targets(source: Beton, tmp_path: Path) -> None:
    path, out = tmp_path / "votes.npz", tmp_path / "x.npz"
    save_votes(path, cast(source, [60, 40, *[0] * 8], [*[0] * 8, 6, 4]))
    kept = {}
    for how in ("normalised", "sum", "max"):
        prune(source=source.path, votes=path, keep_classes=2, out=out, combine=how, force=True)
        kept[how] = load_subset(out, beton=source).groups.tolist()
    assert kept == {"normalised": [0, 8], "sum": [0, 1], "max": [0, 8]}
    prune(source=source.path, votes=path, keep_classes=2, out=out, weights=[1, 9], force=True)
    assert load_subset(out, beton=source).groups.tolist() == [8, 9]


def test_random_classes(source: Beton, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    kept = []
    for seed in (0, 0, 1):
        prune(source=source.path, random="classes", keep=0.4, seed=seed, out=out, force=True)
        subset = load_subset(out, beton=source)
        assert len(subset.groups) == 4 and subset.ratio == 0.6 and subset.method == "random-classes"
        assert subset.meta["seed"] == seed
        kept.append(subset.indices.tolist())
    assert kept[0] == kept[1] != kept[2]


def test_random_samples_leave_the_validation_set_whole(source: Beton, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    summary = prune(source=source.path, random="samples", keep=0.5, out=out, apply_to=source.path)
    subset, val = load_subset(out, beton=source), load_subset(tmp_path / "x.val.npz", beton=source)
    assert len(subset.indices) == 42 and len(subset.groups) == 0
    assert subset.ratio == 41 / 83 and val.ratio == 0
    assert len(val.indices) == 83 and "left whole" in str(summary)


def test_as_large_as_another_subset(source: Beton, votes: Path, tmp_path: Path) -> None:
    first, out = tmp_path / "lm.npz", tmp_path / "x.npz"
    prune(source=source.path, votes=votes, keep="auto", out=first)
    kept = load_subset(first, beton=source)
    assert kept.groups.tolist() == sorted(RANKING[:4])  # 16 of the 20 votes for 3 classes: 95 % are 19, of 4 classes
    assert kept.meta["config"]["keep"] == "auto"
    prune(source=source.path, random="classes", like=first, seed=5, out=out)
    subset = load_subset(out, beton=source)
    assert len(subset.groups) == 4 and subset.method == "random-classes" and "like" in subset.meta["inputs"]
    prune(source=source.path, random="samples", like=first, seed=5, out=out, force=True)
    chosen = load_subset(out, beton=source)
    assert len(chosen.indices) == len(kept.indices) and not len(chosen.groups)
    with pytest.raises(UserError, match="keeps single samples"):
        prune(source=source.path, votes=votes, like=out, out=tmp_path / "y.npz")


def test_list(source: Beton, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("class 3\n7 # by id\n")
    prune(source=source.path, list_file=tmp_path / "list.txt", out=tmp_path / "x.npz")
    subset = load_subset(tmp_path / "x.npz", beton=source)
    assert subset.groups.tolist() == [3, 7] and subset.ratio == 0.8 and subset.method == "list"


def test_validation_loses_the_same_classes(
    source: Beton, votes: Path, tmp_path: Path, make_beton: Callable[..., Beton]
) -> None:
    val = make_beton([9, 1, 2, 2, 3, 0], list(source.classes))
    summary = prune(source=source.path, votes=votes, keep=0.2, out=tmp_path / "x.npz", apply_to=val.path)
    subset = load_subset(tmp_path / "x.val.npz", beton=val)
    assert subset.indices.tolist() == [0, 2, 3] and subset.groups.tolist() == [2, 9] and subset.ratio == 0.8
    assert "3 of 6" in str(summary)
    with pytest.raises(UserError, match="was made for another source"):
        load_subset(tmp_path / "x.val.npz", beton=source)
    prune(source=source.path, votes=votes, keep=0.2, out=tmp_path / "y.npz", apply_to=val.path, out_val=tmp_path / "z")
    assert load_subset(tmp_path / "z", beton=val).indices.tolist() == [0, 2, 3]


BAD_CHOICES: list[tuple[dict[str, Any], str]] = [
    ({"keep": 0.5}, "exactly one"),
    ({"votes": "V", "random": "classes", "keep": 0.5}, "exactly one"),
    ({"votes": "V"}, "exactly one"),
    ({"votes": "V", "keep": 0.5, "keep_classes": 5}, "exactly one"),
    ({"votes": "V", "keep": 0.0}, "--keep 0.0"),
    ({"votes": "V", "keep": 1.5}, "--keep 1.5"),
    ({"votes": "V", "keep": float("nan")}, "--keep nan"),
    ({"votes": "V", "coverage": 1.01}, "--coverage 1.01"),
    ({"votes": "V", "keep_classes": 0}, "--keep-classes 0"),
    ({"votes": "V", "keep_classes": -3}, "--keep-classes -3"),
    ({"random": "classes", "keep_classes": 11}, "--keep-classes 11 .* 10 classes"),
    ({"random": "classes", "coverage": 0.5}, "use it with --votes"),
    ({"random": "samples", "keep_classes": 3}, "--keep alone"),
    ({"random": "samples", "keep": "auto"}, "use it with --votes"),
    ({"random": "classes", "keep": "auto"}, "use it with --votes"),
    ({"random": "classes", "like": Path("none.npz")}, "none.npz"),
    ({"votes": "V", "like": "V"}, "'subset' file is needed"),
    ({"random": "images", "keep": 0.5}, "classes, samples"),
    ({"random": "classes", "keep": 0.5, "reverse": True}, "--reverse"),
    ({"random": "classes", "keep": 0.5, "seed": -1}, "--seed"),
    ({"list_file": "V", "keep": 0.5}, "leave --keep"),
    ({"list_file": Path("none.txt")}, "none.txt"),
    ({"votes": Path("none.npz"), "keep": 0.5}, "none.npz"),
    ({"votes": "V", "keep": 0.5, "source": Path("none.beton")}, "none.beton"),
    ({"votes": "V", "keep": 0.5, "weights": [1.0, 2.0]}, "--weights"),
]


@pytest.mark.parametrize(
    ("choice", "says"), BAD_CHOICES, ids=[f"{i}-{says}" for i, (_, says) in enumerate(BAD_CHOICES)]
)
def test_bad_choices(source: Beton, votes: Path, tmp_path: Path, choice: dict[str, Any], says: str) -> None:
    given = {"source": source.path, **{key: votes if value == "V" else value for key, value in choice.items()}}
    with pytest.raises(UserError, match=says) as caught:
        prune(out=tmp_path / "x.npz", apply_to=source.path, **given)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [votes]


def test_existing_outputs_are_kept(source: Beton, votes: Path, tmp_path: Path) -> None:
    (tmp_path / "x.val.npz").write_text("mine")
    with pytest.raises(UserError, match=r"x\.val\.npz exists"):
        prune(source=source.path, votes=votes, keep=0.5, out=tmp_path / "x.npz", apply_to=source.path)
    assert not (tmp_path / "x.npz").exists() and (tmp_path / "x.val.npz").read_text() == "mine"
    prune(source=source.path, votes=votes, keep=0.5, out=tmp_path / "x.npz", apply_to=source.path, force=True)


def test_classes_without_samples(source: Beton, tmp_path: Path, make_beton: Callable[..., Beton]) -> None:
    (tmp_path / "list.txt").write_text("class 6\n")
    with pytest.raises(UserError, match="no sample of the 1 kept classes"):
        prune(source=source.path, list_file=tmp_path / "list.txt", out=tmp_path / "x.npz")
    val = make_beton([0, 1], list(source.classes))
    (tmp_path / "list.txt").write_text("class 5\n")
    with pytest.raises(UserError, match="no sample"):
        prune(source=source.path, list_file=tmp_path / "list.txt", out=tmp_path / "x.npz", apply_to=val.path)
    assert not (tmp_path / "x.npz").exists()


def test_a_validation_set_of_other_classes(
    source: Beton, votes: Path, tmp_path: Path, make_beton: Callable[..., Beton]
) -> None:
    names = list(source.classes)
    for classes, place in (([*names[:4], "other", *names[5:]], 4), (names[:9], 9), (names[::-1], 0)):
        val = make_beton([0, 1], classes)
        with pytest.raises(UserError, match=f"number {place}"):
            prune(source=source.path, votes=votes, keep=0.5, out=tmp_path / "x.npz", apply_to=val.path)


def test_votes_for_another_source(source: Beton, target: Beton, votes: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prune(source=target.path, votes=votes, keep=0.5, out=tmp_path / "x.npz")
    for part in (str(votes), str(target.path), source.fingerprint, target.fingerprint):
        assert part in str(caught.value)


def test_votes_file(source: Beton, votes: Path, tmp_path: Path) -> None:
    arrays, _ = load_npz(votes, "votes")
    assert arrays["votes"].shape == (10,) and arrays["affinity"].shape == (10,)
    loaded = load_votes(votes, beton=source)
    assert loaded.votes.tolist() == [COUNTS] and loaded.affinity.tolist() == [AFFINITY]
    assert loaded.classes == source.classes and loaded.method == "lm" and loaded.target_sizes.tolist() == [20]
    save_votes(tmp_path / "two.npz", cast(source, COUNTS, COUNTS))
    assert load_npz(tmp_path / "two.npz", "votes")[0]["votes"].shape == (2, 10)
    assert load_votes(tmp_path / "two.npz").votes.tolist() == [COUNTS, COUNTS]


@pytest.mark.parametrize(
    "damage",
    [
        {"votes": np.zeros(10, np.int64)}, {"votes": np.zeros(10)}, {"votes": np.array([-1, *[0] * 8, 21])},
        {"affinity": np.full(10, np.nan)}, {"affinity": np.zeros(9)}, {"target_sizes": np.array([19])},
        {"predictions": np.zeros(3, np.int64)}, {"target_sizes": np.zeros(0, np.int64)}, {"classes": ["a"]},
        {"classes": None}, {"method": 3}, {"inputs": None},
    ],
    ids=lambda damage: next(iter(damage)),
)  # fmt: skip
def test_damaged_votes(source: Beton, votes: Path, damage: dict[str, Any]) -> None:
    arrays, meta = load_npz(votes, "votes")
    for name, value in damage.items():
        (arrays if name in arrays else meta)[name] = value
    save_npz(votes, arrays, meta)
    with pytest.raises(UserError, match=r"votes\.npz"):
        load_votes(votes, beton=source)


def test_a_million_samples_take_no_time(source: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = np.random.default_rng(0).integers(0, 1000, 1_281_167)
    big = replace(source, labels=labels, classes=tuple(f"c{i}" for i in range(1000)))
    monkeypatch.setattr(make, "open_beton", lambda path: big)
    votes = np.bincount(np.random.default_rng(1).integers(0, 400, 20_000), minlength=1000)
    meta = make_meta("votes", inputs={"source": big.fingerprint})
    path = tmp_path / "votes.npz"
    predictions = np.repeat(np.arange(1000), votes)
    save_votes(path, Votes(votes[None], np.zeros((1, 1000)), predictions, np.array([20_000]), "lm", big.classes, meta))
    choices: tuple[dict[str, Any], ...] = (
        {"votes": path, "keep": 0.4}, {"votes": path, "coverage": 0.95}, {"random": "samples", "keep": 0.4},
    )  # fmt: skip
    for number, choice in enumerate(choices):
        started = time.perf_counter()
        prune(source=source.path, out=tmp_path / f"{number}.npz", **choice)
        print(f"{choice}: {time.perf_counter() - started:.2f} s")
        assert time.perf_counter() - started < 2
