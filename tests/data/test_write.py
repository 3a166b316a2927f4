import errno
import io
import json
import os
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.data.beton import open_beton, sidecar
from dp4tl_dist.data.encode import encode, encode_samples, to_rgb
from dp4tl_dist.data.write import Sample, WriteOptions, folder_samples, write_folder, write_samples
from dp4tl_dist.errors import UserError


def picture(height=40, width=60, shift=0):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 % 256, (columns * 2 + shift) % 256, (rows + columns) % 256], -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three classes, 4, 5 and 6 images, PNG so that pixels are known; some clutter that is not images."""
    images = tmp_path / "images"
    for label, name in enumerate(["zebra", "ant", "bée"]):
        (images / name).mkdir(parents=True)
        for i in range(4 + label):
            Image.fromarray(picture(shift=40 * label + 5 * i)).save(images / name / f"{i}.png")
    (images / "ant" / "notes.txt").write_text("no image")
    (images / ".hidden").mkdir()
    (images / "ant" / ".hidden.png").write_text("no image")
    (images / "README").write_text("no image")
    return images


def decoded(beton, index):
    return np.asarray(Image.open(io.BytesIO(beton.payload(index)))).astype(int)


def test_folder_becomes_a_shuffled_beton(tmp_path, folder):
    out, calls = tmp_path / "out" / "x.beton", []
    report = write_folder(folder, out, progress=lambda done, total: calls.append((done, total)))
    beton = open_beton(out)
    assert (report.num_samples, report.num_classes, report.skipped) == (15, 3, [])
    assert beton.classes == ("ant", "bée", "zebra")
    assert np.bincount(beton.labels).tolist() == [5, 6, 4]
    assert beton.identifiers.tolist() == list(range(15))
    assert (np.diff(beton.labels) != 0).sum() > 2, "the file should not be sorted by class"
    assert calls[-1] == (15, 15)
    # Every image is there once, under its own label.
    wanted = [(s.label, np.asarray(Image.open(s.source)).astype(int)) for s in folder_samples(folder)[0]]
    for i in range(15):
        distances = [np.abs(decoded(beton, i) - pixels).mean() for _, pixels in wanted]
        label, _ = wanted.pop(int(np.argmin(distances)))
        assert min(distances) < 6 and label == beton.labels[i]
    content = json.loads(sidecar(out).read_text())
    assert content["meta"]["config"]["origin"] == str(folder) and content["meta"]["seed"] == 0


def test_the_file_depends_on_the_seed_and_not_on_the_processes(tmp_path, folder):
    files = {}
    for name, workers, seed in [("a", 1, 0), ("b", 2, 0), ("c", 0, 0), ("d", 1, 1)]:
        write_folder(folder, tmp_path / name, num_workers=workers, seed=seed)
        files[name] = (tmp_path / name).read_bytes()
    assert files["a"] == files["b"] == files["c"] != files["d"]


def test_pixels_and_callables_are_samples_too(tmp_path):
    samples = [
        Sample(picture(), 0),
        Sample(Image.fromarray(picture()), 1),
        Sample(partial(picture, 20, 30), 2),
        Sample(picture()[:, :, 0], 0),
    ]
    report = write_samples(samples, ["a", "b", "c"], tmp_path / "x", options=WriteOptions(num_workers=2))
    beton = open_beton(tmp_path / "x")
    assert report.num_samples == 4 and beton.heights[beton.labels == 2] == 20
    with pytest.raises(UserError, match="float64"):
        write_samples([Sample(np.zeros((4, 4, 3)), 0)], ["a"], tmp_path / "y")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no images"):
        write_samples([], ["a"], tmp_path / "y")


# ---------------------------------------------------------------- one image


@pytest.mark.parametrize(
    ("size", "max_side", "stored"),
    [
        ((60, 40), 400, (60, 40)),
        ((60, 40), 30, (30, 20)),
        ((40, 60), 30, (20, 30)),
        ((999, 500), 100, (100, 50)),
        ((600, 1), 100, (100, 1)),
        ((600, 40), 0, (600, 40)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_sides(tmp_path, size, max_side, stored, suffix):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(picture(size[1], size[0])).save(path)
    (result,) = encode_samples([path], max_side=max_side, quality=90)
    assert (result.width, result.height) == stored == Image.open(io.BytesIO(result.payload)).size


def in_mode(mode):
    image = Image.fromarray(picture())
    if mode == "I;16":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(np.asarray(image.convert("L")).astype(np.int32) * 257)
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("L", "jpg"), ("1", "png"), ("P", "png"), ("P", "gif"), ("LA", "png"), ("RGBA", "png")]
    + [
        ("CMYK", "jpg"),
        ("CMYK", "tif"),
        ("I;16", "png"),
        ("I;16", "tif"),
        ("I", "tif"),
        ("RGB", "webp"),
        ("RGB", "bmp"),
    ],
)
def test_every_mode_becomes_rgb_of_the_same_look(tmp_path, mode, suffix):
    path = tmp_path / f"x.{suffix}"
    image = in_mode(mode)
    image.save(path)
    (result,) = encode_samples([path], max_side=0, quality=95)
    stored = Image.open(io.BytesIO(result.payload))
    assert stored.mode == "RGB" and stored.size == image.size
    grey = np.asarray(Image.fromarray(picture()).convert("L")).astype(int)
    tolerance = 130 if mode == "1" else 25
    assert np.abs(np.asarray(stored.convert("L")).astype(int) - grey).mean() < tolerance
    if mode in ("L", "I;16", "I"):
        assert np.abs(np.asarray(stored.convert("L")).astype(int) - grey).mean() < 4


def test_palette_with_transparency_keeps_its_colours():
    image = Image.fromarray(picture()).quantize(8)
    image.info["transparency"] = bytes([0, 128, 255])
    assert to_rgb(image).mode == "RGB"


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("max_side", [0, 30])
def test_exif_orientation_is_applied(tmp_path, orientation, max_side):
    upright = Image.fromarray(
        np.repeat(np.repeat([[[250, 0, 0], [0, 0, 250]], [[0, 250, 0], [0, 0, 0]]], 24, 0), 32, 1).astype(np.uint8)
    )
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }  # fmt: skip
    laid = upright.transpose(undo[orientation]) if orientation in undo else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    laid.save(tmp_path / "x.jpg", exif=exif, quality=95)
    (result,) = encode_samples([tmp_path / "x.jpg"], max_side=max_side, quality=95)
    stored = Image.open(io.BytesIO(result.payload))
    assert stored.width > stored.height
    corners = np.asarray(stored)[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    assert np.abs(corners - [[250, 0, 0], [0, 0, 250], [0, 250, 0], [0, 0, 0]]).max() < 40


def test_shrinking_a_large_jpeg_by_way_of_draft_keeps_the_look(tmp_path):
    # Smooth content: the fast path decodes at a fraction of the size, and must still give the same picture.
    big = Image.fromarray(picture(32, 48)).resize((1600, 1200), Image.Resampling.BICUBIC)
    big.save(tmp_path / "x.jpg", quality=95)
    fast = encode(Image.open(tmp_path / "x.jpg"), max_side=100, quality=95)
    exact = np.asarray(big.resize((100, 75), Image.Resampling.LANCZOS)).astype(int)
    assert (fast.width, fast.height) == (100, 75)
    assert np.abs(np.asarray(Image.open(io.BytesIO(fast.payload))).astype(int) - exact).mean() < 4


# ---------------------------------------------------------------- bad images


@pytest.fixture
def damaged(folder):
    """Four files of the folder are replaced by unreadable ones."""
    good = (folder / "ant" / "0.png").read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(picture(300, 300)).save(buffer, "JPEG")
    (folder / "ant" / "1.png").write_bytes(good[: len(good) // 2])
    (folder / "ant" / "2.png").write_bytes(b"")
    (folder / "bée" / "3.png").write_text("<html>not found</html>")
    (folder / "zebra" / "cut.jpg").write_bytes(buffer.getvalue()[:-2000])
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "zebra" / "f.tif")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_images_stop_the_write_and_are_counted(tmp_path, damaged, workers):
    out = tmp_path / "x.beton"
    with pytest.raises(UserError, match="5 of 17 images cannot be read, first") as caught:
        write_folder(damaged, out, num_workers=workers)
    assert str(damaged / "ant" / "1.png") in str(caught.value) and "--skip-bad" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if "beton" in p.name]


def test_unreadable_images_are_skipped_when_asked(tmp_path, damaged):
    out = tmp_path / "x.beton"
    report = write_folder(damaged, out, skip_bad=True)
    names = [str(Path(path).relative_to(damaged)) for path, _ in report.skipped]
    assert names == ["ant/1.png", "ant/2.png", "bée/3.png", "zebra/cut.jpg", "zebra/f.tif"]
    assert all(reason for _, reason in report.skipped)
    beton = open_beton(out)
    assert report.num_samples == beton.num_samples == 12 and beton.identifiers.tolist() == list(range(12))
    assert [path for path, _ in json.loads(sidecar(out).read_text())["meta"]["skipped"]] == [
        p for p, _ in report.skipped
    ]


def test_a_folder_of_nothing_readable_is_an_error_also_when_skipping(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1"):
        write_folder(tmp_path / "in", tmp_path / "x", skip_bad=True)


# ---------------------------------------------------------------- bad folders, options and outputs


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.rename(f.with_name("away")), "is not a folder"),
        (lambda f: [p.rename(f.parent / p.name) for p in list(f.iterdir())], "no class folders"),
        (lambda f: (f / "empty").mkdir(), "empty holds no images"),
        (lambda f: (f / "ant" / "0.png").rename(f / "0.png"), "not in a class folder"),
    ],
)
def test_bad_folders(tmp_path, folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        write_folder(folder, tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists()


@pytest.mark.parametrize(
    "change", [{"max_side": -1}, {"max_side": 3}, {"quality": 0}, {"quality": 101}, {"seed": -1}, {"num_workers": -1}]
)
def test_bad_options(tmp_path, folder, change):
    with pytest.raises(UserError, match=next(iter(change))):
        write_folder(folder, tmp_path / "x.beton", **change)


def test_an_existing_output_is_kept_unless_forced(tmp_path, folder):
    out = tmp_path / "x.beton"
    out.write_text("precious")
    with pytest.raises(UserError, match="--force"):
        write_folder(folder, out)
    assert out.read_text() == "precious"
    write_folder(folder, out, force=True)
    assert open_beton(out).num_samples == 15


def test_an_output_folder_that_cannot_be_made(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        write_folder(folder, tmp_path / "file" / "x.beton")


def test_a_full_disk_leaves_nothing(tmp_path, folder, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_folder(folder, tmp_path / "out" / "x.beton")
    assert list((tmp_path / "out").iterdir()) == []


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_fails_the_write_and_leaves_nothing(tmp_path):
    samples = [Sample(picture(), 0)] * 40 + [Sample(partial(die, 1), 0)]
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="an encoding process died"):
        write_samples(samples, ["a"], tmp_path / "out" / "x", options=WriteOptions(num_workers=2))
    assert list((tmp_path / "out").iterdir()) == []
