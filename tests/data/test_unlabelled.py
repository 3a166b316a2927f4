"""Files of stock FFCV whose labels are -1: unlabelled. What needs no labels works, the rest refuses in one line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.synthetic import draw

SMALL = {"epochs": 1, "peak_epoch": 0.5, "batch_size": 8, "resolution": 32, "val_resolution": 32}


class Images:
    """24 images; `labelled` of them have a label."""

    def __init__(self, labelled: int) -> None:
        self.labelled = labelled

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return draw("source", "train", int(index) % 4, int(index)), int(index) % 4 if index < self.labelled else -1


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Betons of stock FFCV's writer (all, some and none labelled), and surrogates with and without a head."""
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    folder = tmp_path_factory.mktemp("unlabelled")
    for name, labelled in (("all", 24), ("some", 20), ("none", 0)):
        fields = {"image": RGBImageField(write_mode="jpg"), "label": IntField()}
        DatasetWriter(str(folder / f"{name}.beton"), fields, num_workers=1).from_indexed_dataset(
            Images(labelled), shuffle_indices=False
        )
    for name, source, kind in (("surrogate", "all", "supervised"), ("moco", "none", "moco")):
        assert train(folder, name, source, kind) == 0
    return folder


def train(place: Path, name: str, source: str, kind: str, **more: Any) -> int:
    config = {
        "data": {"train": str(place / f"{source}.beton"), **more}, "model": {"arch": "resnet_tiny"},
        "task": {"kind": kind, "moco": {"queue": 16, "bn_groups": 1, "neighbours": 3}}, "train": SMALL,
        "log": {"tensorboard": False}, "engine": {"device": "cpu"},
    }  # fmt: skip
    (place / f"{name}.json").write_text(json.dumps(config))
    return run("train", "--config", place / f"{name}.json", "--out", place / name)


def run(*argv: object) -> int:
    return main([str(item) for item in argv])


def refused(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    capsys.readouterr()
    assert run(*argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no label (-1)" in line
    return line


@pytest.mark.parametrize(("name", "classes", "unlabelled"), [("some", 4, 4), ("none", 0, 24)])
def test_they_open_and_say_so(
    place: Path, name: str, classes: int, unlabelled: int, capsys: pytest.CaptureFixture[str]
) -> None:
    beton = open_beton(place / f"{name}.beton")
    assert beton.num_classes == classes and (beton.labels == -1).sum() == unlabelled
    capsys.readouterr()
    assert run("info", place / f"{name}.beton") == 0
    assert f"num_unlabelled: {unlabelled}\n" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"no label .-1., and counting needs them"):
        beton.labels_for("counting")


@pytest.mark.parametrize("name", ["some", "none"])
def test_what_needs_no_labels_works(place: Path, tmp_path: Path, name: str) -> None:
    source = place / f"{name}.beton"
    for method in ("lm", "fm"):
        more = ("--source", place / "all.beton") if method == "fm" else ()
        votes = tmp_path / f"{method}.npz"
        argv = ("--surrogate", place / "surrogate", "--target", source, *more, "--out", votes)
        assert run("vote", "--method", method, *argv) == 0
    clusters = tmp_path / "clusters.npz"
    argv = ("--surrogate", place / "moco", "--source", source, "--clusters", 3)
    assert run("cluster", *argv, "--out", clusters) == 0
    argv = ("--surrogate", place / "moco", "--target", place / "all.beton", "--clusters", clusters)
    assert run("vote", "--method", "fm", *argv, "--out", tmp_path / "fmc.npz") == 0
    subset = tmp_path / "subset.npz"
    assert run("prune", "--source", source, "--votes", tmp_path / "fmc.npz", "--keep-classes", 2, "--out", subset) == 0
    assert run("prune", "--source", source, "--random", "samples", "--keep", 0.5, "--out", tmp_path / "r.npz") == 0
    assert run("compact", "--source", source, "--subset", subset, "--out", tmp_path / "c.beton") == 0
    copied, kept = open_beton(tmp_path / "c.beton"), open_beton(source)
    assert np.array_equal(copied.labels, kept.labels[copied.identifiers]) and copied.classes == kept.classes
    argv = ("--surrogate", place / "surrogate", "--source", source, "--target", place / "all.beton")
    assert run("score", "--method", "retrieval", *argv, "--out", tmp_path / "s.npz") == 0
    assert (
        run("prune", "--source", source, "--scores", tmp_path / "s.npz", "--keep", 0.5, "--out", subset, "--force") == 0
    )
    # The probe of a MoCo run counts the labelled ones.
    assert train(tmp_path, "moco2", name, "moco", train=str(source), val=str(place / "some.beton")) == 0
    (line,) = [
        json.loads(line) for line in (tmp_path / "moco2" / "metrics.jsonl").read_text().splitlines() if "val" in line
    ][-1:]
    assert 0 <= line["val_top1"] <= 1


@pytest.mark.parametrize("name", ["some", "none"])
def test_what_needs_labels_refuses_in_one_line(
    place: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, labelled, out = place / f"{name}.beton", place / "all.beton", tmp_path / "out.npz"
    surrogate = ("--surrogate", place / "surrogate")
    refused(capsys, "vote", "--method", "fm", *surrogate, "--source", source, "--target", labelled, "--out", out)
    for method in ("el2n", "grand", "moderate", "herding", "k-centre"):
        assert method in refused(capsys, "score", "--method", method, *surrogate, "--source", source, "--out", out)
    for random in ("classes", "balanced"):
        if name == "some" or random == "balanced":
            refused(capsys, "prune", "--source", source, "--random", random, "--keep", 0.5, "--out", out)
    if name == "some":
        argv = ("--random", "classes", "--keep", 0.5, "--apply-to", source, "--out", out)
        assert "--apply-to" in refused(capsys, "prune", "--source", labelled, *argv)
    for train_on, test_on in ((source, labelled), (labelled, source)):
        argv = ("--checkpoint", place / "surrogate", "--train", train_on, "--test", test_on, "--mode", "lp")
        refused(capsys, "transfer", *argv, "--out", tmp_path / "r.json")
    for kind, data in (
        ("supervised", {}),
        ("adversarial", {}),
        ("supervised", {"train": str(labelled), "val": str(source)}),
    ):
        capsys.readouterr()
        assert train(tmp_path, "refused", name, kind, **{"train": str(source), **data}) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "no label (-1)" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["refused.json"]


def test_a_subset_of_labelled_samples_trains(place: Path, tmp_path: Path) -> None:
    """What counts is what is trained on."""
    from dp4tl_dist.data.subset import Subset, save_subset

    beton = open_beton(place / "some.beton")
    meta = {"inputs": {"source": beton.fingerprint}}
    labelled = np.flatnonzero(beton.labels >= 0).astype(np.int64)
    save_subset(tmp_path / "x.npz", Subset(labelled, labelled[:0], 0.2, "list", meta))
    more = {"train": str(place / "some.beton"), "subset": str(tmp_path / "x.npz")}
    assert train(tmp_path, "trained", "some", "supervised", **more) == 0


@pytest.mark.parametrize("label", [-2, -100, 1 << 40])
def test_other_negative_labels_are_damage(tmp_path: Path, label: int) -> None:
    from dp4tl_dist.data.beton import BetonWriter

    with BetonWriter(tmp_path / "x.beton", capacity=1) as writer:
        writer.add(b"x", height=1, width=1, label=label, identifier=0)
        writer.finish(["a"], {})
    with pytest.raises(ValueError, match="labels from"):
        open_beton(tmp_path / "x.beton")
