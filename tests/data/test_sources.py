"""torchvision's own readers on small folders in each dataset's layout; nothing is downloaded."""

import hashlib
import json
import pickle
import tarfile
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from PIL import Image

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.sources import SOURCES, open_source
from dp4tl_dist.data.write import write_samples
from dp4tl_dist.errors import UserError


def draw(path, shade=100):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), shade, np.uint8)).save(path)
    return path


def text(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def make_dtd(root, monkeypatch):
    names = ["zigzag/zigzag_1.jpg", "banded/banded_2.jpg", "banded/banded_1.jpg"]
    for name in names:
        draw(root / "dtd/dtd/images" / name)
    text(root / "dtd/dtd/labels/train1.txt", "\n".join(names))
    return "train", ["banded_1.jpg", "banded_2.jpg", "zigzag_1.jpg"], [0, 0, 1], ["banded", "zigzag"]


def make_oxfordpets(root, monkeypatch):
    lines = ["pug_2 2 2 1", "great_dane_1 1 2 1"]
    for line in lines:
        draw(root / "oxford-iiit-pet/images" / f"{line.split()[0]}.jpg")
    text(root / "oxford-iiit-pet/annotations/trainval.txt", "\n".join(lines))
    return "trainval", ["great_dane_1.jpg", "pug_2.jpg"], [0, 1], ["Great Dane", "Pug"]


def make_food101(root, monkeypatch):
    for name in ("pie/2", "pie/1", "soup/3"):
        draw(root / "food-101/images" / f"{name}.jpg")
    text(root / "food-101/meta/test.json", json.dumps({"soup": ["soup/3"], "pie": ["pie/2", "pie/1"]}))
    return "test", ["1.jpg", "2.jpg", "3.jpg"], [0, 0, 1], ["pie", "soup"]


def make_sun397(root, monkeypatch):
    for name in ("b/bar/sun_b.jpg", "a/abbey/sun_a.jpg", "c/cave/indoor/sun_c.jpg"):
        draw(root / "SUN397" / name)
    text(root / "SUN397/ClassName.txt", "/a/abbey\n/b/bar\n/c/cave/indoor\n")
    return "all", ["sun_a.jpg", "sun_b.jpg", "sun_c.jpg"], [0, 1, 2], ["abbey", "bar", "cave/indoor"]


def make_flowers102(root, monkeypatch):
    io = pytest.importorskip("scipy.io", reason="torchvision reads these labels with scipy")
    folder = root / "flowers-102"
    for i in (1, 2, 3):
        draw(folder / "jpg" / f"image_{i:05d}.jpg")
    io.savemat(folder / "imagelabels.mat", {"labels": np.array([2, 1, 2])})
    io.savemat(folder / "setid.mat", {"trnid": np.array([3, 1]), "valid": np.array([2, 2]), "tstid": np.array([2, 2])})
    # Its label files are checked against the published ones; ours have other sums.
    known = torchvision.datasets.Flowers102._file_dict
    sums = {key: (known[key][0], md5(folder / known[key][0])) for key in ("label", "setid")}
    monkeypatch.setattr(torchvision.datasets.Flowers102, "_file_dict", {**known, **sums})
    return "train", ["image_00001.jpg", "image_00003.jpg"], [1, 1], None


def make_stanfordcars(root, monkeypatch):
    io = pytest.importorskip("scipy.io", reason="torchvision reads these labels with scipy")
    folder = root / "stanford_cars"
    kind = [("fname", "O"), ("class", "O")]
    for name in ("1.jpg", "2.jpg"):
        draw(folder / "cars_train" / name)
    (folder / "devkit").mkdir()
    io.savemat(folder / "devkit/cars_train_annos.mat", {"annotations": np.array([("2.jpg", 1), ("1.jpg", 2)], kind)})
    io.savemat(folder / "devkit/cars_meta.mat", {"class_names": np.array(["Audi", "BMW"], object)})
    return "train", ["1.jpg", "2.jpg"], [1, 0], ["Audi", "BMW"]


def make_imagenet(root, monkeypatch):
    draw(root / "val/n02/b.JPEG")
    draw(root / "val/n01/a.JPEG")
    torch.save(({"n01": ("crane", "bird"), "n02": ("crane",)}, ["n01", "n02"]), root / "meta.bin")
    return "val", ["a.JPEG", "b.JPEG"], [0, 1], ["n01", "n02"]


@pytest.mark.parametrize("name", ["dtd", "oxfordpets", "food101", "sun397", "flowers102", "stanfordcars", "imagenet"])
def test_paths_labels_and_classes(tmp_path, monkeypatch, name):
    split, files, labels, classes = globals()[f"make_{name}"](tmp_path, monkeypatch)
    samples, found = open_source(name, split, tmp_path)
    assert [sample.source.name for sample in samples] == files
    assert [sample.label for sample in samples] == labels
    assert classes is None or found == classes
    assert name != "flowers102" or (len(found) == 102 and found[0] == "pink primrose")
    report = write_samples(samples, found, tmp_path / "x.beton")
    assert report.num_samples == len(files)


@pytest.mark.parametrize(("name", "key"), [("cifar10", "labels"), ("cifar100", "fine_labels")])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar(tmp_path, monkeypatch, name, key, split):
    kind = getattr(torchvision.datasets, SOURCES[name].name)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    classes = ["cat", "dog"]
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3 * 32 * 32), np.uint8)

    def store(file, content):
        (folder / file).write_bytes(pickle.dumps(content))
        return [file, md5(folder / file)]

    # torchvision checks these files against the published ones; ours have other sums.
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(kind, part, [store(f"{part}.bin", {"data": pixels, key: [0, 1, 1, 0]})])
    file, digest = store("meta.bin", {kind.meta["key"]: classes})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "filename": file, "md5": digest})
    samples, found = open_source(name, split, tmp_path)
    assert found == classes and [sample.label for sample in samples] == [0, 1, 1, 0]
    assert np.array_equal(samples[2].source, pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    write_samples(samples, found, tmp_path / "x.beton")
    assert open_beton(tmp_path / "x.beton").heights.tolist() == [32] * 4


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_missing_data_says_what_is_expected(tmp_path, name):
    split = next(iter(SOURCES[name].splits))
    with pytest.raises(UserError) as caught:
        open_source(name, split, tmp_path)
    message = str(caught.value)
    assert str(tmp_path) in message and SOURCES[name].layout in message and "\n" not in message
    assert ("--download" in message) == SOURCES[name].downloads
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_splits_list_the_known(tmp_path):
    with pytest.raises(UserError, match="cifar10, cifar100, dtd"):
        open_source("mnist", "train", tmp_path)
    with pytest.raises(UserError, match="'val': use one of test, train"):
        open_source("cifar10", "val", tmp_path)


def test_downloads_happen_only_when_asked(tmp_path, monkeypatch):
    def download(self):
        make_dtd(tmp_path, monkeypatch)

    monkeypatch.setattr(torchvision.datasets.DTD, "_download", download)
    with pytest.raises(UserError, match="--download"):
        open_source("dtd", "train", tmp_path)
    assert len(open_source("dtd", "train", tmp_path, download=True)[0]) == 3
    for name in ("imagenet", "stanfordcars"):
        with pytest.raises(UserError, match="cannot be downloaded automatically"):
            open_source(name, "train", tmp_path, download=True)


@pytest.mark.parametrize("error", [URLError("no route"), tarfile.ReadError("cut off"), RuntimeError("not\nfound")])
def test_a_failed_download_is_one_line(tmp_path, monkeypatch, error):
    def download(self):
        raise error

    monkeypatch.setattr(torchvision.datasets.DTD, "_download", download)
    with pytest.raises(UserError, match="cannot be downloaded into") as caught:
        open_source("dtd", "train", tmp_path, download=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["banded", "a/b/c/d"])
def test_damaged_label_files_are_one_line(tmp_path, monkeypatch, damage):
    make_dtd(tmp_path, monkeypatch)
    text(tmp_path / "dtd/dtd/labels/train1.txt", damage)
    with pytest.raises(UserError, match="holds no readable dtd"):
        open_source("dtd", "train", tmp_path)
