"""A test set that is a copy of its training set is told by the plan, whatever either is: the betons' fingerprints are
one, and whoever reads both would refuse them later."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist import plan_content
from dp4tl_dist.config import validate
from dp4tl_dist.data.beton import fingerprint
from dp4tl_dist.data.write import write_folder
from dp4tl_dist.errors import UserError
from dp4tl_dist.plan import check_plan
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph

SIDES = {"resolution": 16, "val_resolution": 16, "batch_size": 4}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three classes of JPEGs and PNGs."""
    for label in range(3):
        folder = tmp_path / "images" / f"class{label}"
        folder.mkdir(parents=True)
        for i in range(4):
            noise = np.random.default_rng([label, i]).integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(noise).save(folder / f"{i}.{'png' if i % 2 else 'jpg'}")
    return tmp_path / "images"


def plan(train: Path, test: Path, out: Path, **write: Any) -> None:
    stage = {"model": {"arch": "resnet_tiny"}, "train": SIDES}
    content = {
        "source": {"train": str(train)}, "targets": {"t": {"train": str(train), "test": str(test)}}, "arms": ["dense"],
        "seeds": [0, 1],
        "pretrain": stage, "transfer": {"lp": SIDES}, "engine": {"device": "cpu"}, "write": write,
    }  # fmt: skip
    check_plan(Graph(validate(RunConfig, content, source="test"), out), ranks=lambda stage: 1)


def as_it_is(folder: Path) -> None:
    """A plain copy."""


def other_names(folder: Path) -> None:
    for path in sorted(folder.rglob("*.*")):
        path.rename(path.with_name(f"a-{path.name}"))


def other_metadata(folder: Path) -> None:
    for path in folder.rglob("*.jpg"):
        data = path.read_bytes()
        path.write_bytes(data[:2] + b"\xff\xfe\x00\x06note" + data[2:])


def other_files(folder: Path) -> None:
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path, compress_level=0)


@pytest.mark.parametrize("change", [as_it_is, other_names, other_metadata, other_files])
@pytest.mark.parametrize("written", ["none", "train", "test"])
def test_a_copy_is_told_before_anything_is_written(
    images: Path, tmp_path: Path, change: Callable[[Path], None], written: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(images, copy)
    change(copy)
    one, two = tmp_path / "one.beton", tmp_path / "two.beton"
    write_folder(images, one)
    write_folder(copy, two)
    assert fingerprint(one) == fingerprint(two)  # what `transfer` would refuse
    train, test = (one if written == "train" else images), (two if written == "test" else copy)
    with pytest.raises(UserError, match="holds the samples of"):
        plan(train, test, tmp_path / "run")


def one_pixel_more(folder: Path) -> None:
    Image.new("RGB", (25, 20)).save(folder / "class2" / "3.png")


def one_less(folder: Path) -> None:
    (folder / "class1" / "0.jpg").unlink()


def another_order(folder: Path) -> None:
    (folder / "class0" / "0.jpg").rename(folder / "class0" / "9.jpg")


@pytest.mark.parametrize("change", [one_pixel_more, one_less, another_order])
@pytest.mark.parametrize("written", ["none", "train"])
def test_what_is_no_copy_is_taken(images: Path, tmp_path: Path, change: Callable[[Path], None], written: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(images, other)
    change(other)
    one, two = tmp_path / "one.beton", tmp_path / "two.beton"
    write_folder(images, one)
    write_folder(other, two)
    assert fingerprint(one) != fingerprint(two)
    plan(one if written == "train" else images, other, tmp_path / "run")


def test_images_that_cannot_be_read_have_no_part_in_it(images: Path, tmp_path: Path) -> None:
    (images / "class1" / "00.jpg").write_bytes(b"no image")
    shutil.copytree(images, tmp_path / "copy")
    (tmp_path / "copy" / "class1" / "00.jpg").write_bytes(b"none either")
    with pytest.raises(UserError, match="holds the samples of"):
        plan(images, tmp_path / "copy", tmp_path / "run", skip_bad=True)


def test_other_datasets_are_told_apart_by_their_first_images(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However large they are, and however many stages ask."""
    for path in images.rglob("*.jpg"):
        (tmp_path / "other" / path.parent.name).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 24)).save(tmp_path / "other" / path.parent.name / path.name)
    encode, read = plan_content.encode_samples, []

    def counted(sources: list[Any], **how: Any) -> Any:
        read.append(sources)
        return encode(sources, **how)

    monkeypatch.setattr(plan_content, "encode_samples", counted)
    plan(images, tmp_path / "other", tmp_path / "run")
    assert len(read) == 2
