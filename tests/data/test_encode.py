"""One image to a payload: sizes, modes, orientation."""

import io

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.data.encode import encode, encode_samples, to_rgb


def picture(height=40, width=60, shift=0):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 % 256, (columns * 2 + shift) % 256, (rows + columns) % 256], -1).astype(np.uint8)


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
    [
        *(("RGBA", "png"), ("LA", "png"), ("L", "png"), ("1", "png"), ("P", "png"), ("I;16", "png")),
        *(("L", "jpg"), ("CMYK", "jpg"), ("P", "gif"), ("RGB", "webp"), ("RGB", "bmp")),
        *(("CMYK", "tif"), ("I;16", "tif"), ("I", "tif")),
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
