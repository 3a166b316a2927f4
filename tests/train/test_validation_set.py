"""Validation looks at the classes that are trained on, and says so where that is not plain."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factory import make_beton

from dp4tl_dist.config import TrainConfig, validate
from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.subset import Subset, samples_of_groups, save_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import make_meta
from dp4tl_dist.prune.make import prune
from dp4tl_dist.train.job import Job
from dp4tl_dist.train.supervised import make_job
from dp4tl_dist.world import World

CLASSES, PER_CLASS = 4, 6


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("validation")
    for split in ("train", "val"):
        make_beton(root / f"{split}.beton", split=split, num_classes=CLASSES, per_class=PER_CLASS)
    return root


def job_of(root: Path, out: Path, task: str = "supervised", **data: Path) -> Job:
    paths = {"train": root / "train.beton", "val": root / "val.beton", **data}
    content: dict[str, Any] = {
        "data": {key: str(path) for key, path in paths.items()}, "model": {"arch": "resnet_tiny"},
        "task": {"kind": task, "moco": {"queue": 8}}, "train": {"epochs": 1, "batch_size": 4, "resolution": 16},
        "engine": {"device": "cpu"},
    }  # fmt: skip
    return make_job(validate(TrainConfig, content, source="x"), out=out, world=World())


def kept(job: Job) -> list[int]:
    assert job.val is not None
    return job.val.kept.tolist()


def of_classes(beton: Beton, groups: list[int]) -> list[int]:
    return samples_of_groups(beton.labels, np.array(groups)).tolist()


@pytest.mark.parametrize("keep", [0.25, 0.5, 0.75, 1.0])
def test_a_subset_by_classes_is_as_prune_applies_it(
    root: Path, tmp_path: Path, keep: float, capsys: pytest.CaptureFixture[str]
) -> None:
    source, val = root / "train.beton", root / "val.beton"
    prune(source=source, out=tmp_path / "s.npz", random="classes", keep=keep, apply_to=val)
    job = job_of(root, tmp_path / "run", subset=tmp_path / "s.npz")
    (line,) = capsys.readouterr().out.splitlines()
    groups = round(keep * CLASSES)
    assert line == (
        f"validation: {groups * PER_CLASS} of 24 samples, of the {groups} classes that are trained on "
        "(data.val_subset is not set)"
    )
    told = job_of(root, tmp_path / "run", subset=tmp_path / "s.npz", val_subset=tmp_path / "s.val.npz")
    assert kept(job) == kept(told) and capsys.readouterr() == ("", "")


def test_other_subsets(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Samples: the classes that have some, and so in a compacted file. Clusters, and a task without labels: all."""
    train, val = open_beton(root / "train.beton"), open_beton(root / "val.beton")
    meta = make_meta("subset", inputs={"source": train.fingerprint})
    two = np.flatnonzero(train.labels < 2)[1:]  # not every sample of theirs
    save_subset(tmp_path / "samples.npz", Subset(two, np.zeros(0, np.int64), 0.5, "list", meta))
    in_clusters = Subset(two, np.array([1, 5]), 0.5, "fm", {**meta, "groups_are": "clusters"})
    save_subset(tmp_path / "clusters.npz", in_clusters)
    compact(source=train.path, subset=tmp_path / "samples.npz", out=tmp_path / "two.beton")
    whole, of_two = list(range(24)), of_classes(val, [0, 1])
    for data, task, expected, said in (
        ({"subset": tmp_path / "samples.npz"}, "supervised", of_two, "12 of 24 samples, of the 2 classes"),
        ({"train": tmp_path / "two.beton"}, "supervised", of_two, "12 of 24 samples, of the 2 classes"),
        ({"subset": tmp_path / "clusters.npz"}, "supervised", whole, "24 of 24 samples, of all classes"),
        ({"subset": tmp_path / "samples.npz"}, "moco", whole, "24 of 24 samples, of all classes"),
        ({}, "supervised", whole, ""),
        ({"train": tmp_path / "two.beton"}, "moco", whole, ""),
    ):
        assert kept(job_of(root, tmp_path / "run", task, **data)) == expected
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == bool(said) and all(said in line for line in lines)


def test_nothing_to_validate_on(root: Path, tmp_path: Path) -> None:
    source, val = open_beton(root / "train.beton"), open_beton(root / "val.beton")
    for beton, groups, name in ((source, [0], "s"), (val, [1, 2, 3], "v")):
        meta = make_meta("subset", inputs={"source": beton.fingerprint})
        chosen = Subset(np.array(of_classes(beton, groups)), np.array(groups), 0.5, "list", meta)
        save_subset(tmp_path / f"{name}.npz", chosen)
    compact(source=val.path, subset=tmp_path / "v.npz", out=tmp_path / "v.beton")
    with pytest.raises(UserError, match=r"v\.beton has no sample of the 1 class"):
        job_of(root, tmp_path / "run", subset=tmp_path / "s.npz", val=tmp_path / "v.beton")


def test_validating_on_the_training_file_is_warned_of(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".beton", ".beton.json", ".beton.rows"):
        (tmp_path / f"copy{suffix}").write_bytes((root / f"train{suffix}").read_bytes())
    for val in (root / "train.beton", tmp_path / "copy.beton"):
        job_of(root, tmp_path / "run", val=val)
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("warning: run: data.val holds the samples of data.train")
