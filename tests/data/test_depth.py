"""Pixels of every mode and depth to 8-bit RGB."""

import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.data.depth import to_rgb
from dp4tl_dist.data.encode import encode_samples
from dp4tl_dist.data.write import write_folder
from dp4tl_dist.errors import UserError


def picture(height: int = 40, width: int = 60) -> Any:
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 % 256, columns * 2 % 256, (rows + columns) % 256], -1).astype(np.uint8)


def in_mode(mode: str) -> Image.Image:
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
def test_every_mode_becomes_rgb_of_the_same_look(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"x.{suffix}"
    image = in_mode(mode)
    image.save(path)
    (result,) = encode_samples([path], max_side=0, quality=95)
    stored = Image.open(io.BytesIO(result.payload))
    assert stored.mode == ("L" if (mode, suffix) == ("L", "jpg") else "RGB") and stored.size == image.size
    grey = np.asarray(Image.fromarray(picture()).convert("L")).astype(int)
    tolerance = 130 if mode == "1" else 25
    assert np.abs(np.asarray(stored.convert("L")).astype(int) - grey).mean() < tolerance
    if mode in ("L", "I;16", "I"):
        assert np.abs(np.asarray(stored.convert("L")).astype(int) - grey).mean() < 4


def test_palette_with_transparency_keeps_its_colours() -> None:
    image = Image.fromarray(picture()).quantize(8)
    image.info["transparency"] = bytes([0, 128, 255])
    assert to_rgb(image).mode == "RGB"


def grey_of(path: Path) -> Any:
    (result,) = encode_samples([path], max_side=0, quality=100)
    assert not isinstance(result, str), result
    return np.asarray(Image.open(io.BytesIO(result.payload)).convert("L")).astype(int)


def ramp(high: float, dtype: str) -> Any:
    """0 to `high`, in steps."""
    return np.linspace(0, high, 64 * 64).reshape(64, 64).astype(dtype)


RANGES = {
    "8 bits in 32": ramp(255, "int32"), "16 bits in 32": ramp(65_535, "int32"), "31 bits": ramp(2**31 - 1, "int32"),
    "8 bits in 32, unsigned": ramp(255, "uint32"), "32 bits, unsigned": ramp(2**32 - 1, "uint32"),
    "16 bits": ramp(65_535, "uint16"), "0 to 1": ramp(1, "float32"), "0 to 255": ramp(255, "float32"),
}  # fmt: skip


@pytest.mark.parametrize("case", RANGES)
def test_deep_tiffs_keep_their_range(tmp_path: Path, case: str) -> None:
    values = RANGES[case]
    signed = values.view(np.int32) if values.dtype == np.uint32 else values
    Image.fromarray(signed).save(tmp_path / "x.tif")
    if values.dtype == np.uint32:  # Pillow writes the bits, and beside them that they have a sign
        data = (tmp_path / "x.tif").read_bytes()
        tags = [struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1)]
        assert data.count(tags[0]) == 1
        (tmp_path / "x.tif").write_bytes(data.replace(*tags))
    assert np.abs(grey_of(tmp_path / "x.tif") - ramp(255, "float64")).max() <= 3


def test_dark_images_of_16_bits_stay_dark(tmp_path: Path) -> None:
    dark = ramp(200, "uint16")
    Image.fromarray(dark).save(tmp_path / "x.png")
    Image.fromarray(dark).save(tmp_path / "x.tif")
    (tmp_path / "x.pgm").write_bytes(b"P5 64 64 65535\n" + dark.astype(">u2").tobytes())
    assert all(grey_of(tmp_path / f"x.{suffix}").max() <= 2 for suffix in ("png", "tif", "pgm"))


@pytest.mark.parametrize("value", [-1.0, 255.5, np.nan, np.inf, 1e30])
def test_floating_point_pixels_without_a_range_are_refused(tmp_path: Path, value: float) -> None:
    Image.fromarray(np.full((4, 4), value, np.float32)).save(tmp_path / "x.tif")
    (result,) = encode_samples([tmp_path / "x.tif"], max_side=0, quality=90)
    assert isinstance(result, str) and "nothing says what white is" in result


@pytest.mark.parametrize(("low", "high"), [(-1000, 1000), (-1, 255), (-5, -1), (-(2**31), 2**31 - 1)])
def test_integers_below_0_are_refused_as_floating_point_ones_are(tmp_path: Path, low: int, high: int) -> None:
    (tmp_path / "images" / "a").mkdir(parents=True)
    Image.fromarray(ramp(255, "uint8")).save(tmp_path / "images" / "a" / "good.png")
    path = tmp_path / "images" / "a" / "signed.tif"
    Image.fromarray(np.linspace(low, high, 64 * 64).reshape(64, 64).astype(np.int32)).save(path)
    (result,) = encode_samples([path], max_side=0, quality=90)
    assert result == f"integer pixels from {low} to {high}: nothing says what black is, 0 would"
    with pytest.raises(UserError, match=f"signed.tif.*integer pixels from {low} to"):
        write_folder(tmp_path / "images", tmp_path / "x.beton")
    report = write_folder(tmp_path / "images", tmp_path / "x.beton", skip_bad=True)
    assert report.num_samples == 1 and report.skipped == [(str(path), result)]


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"],
)
def test_every_mode_of_pillow_becomes_rgb(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_transparency_is_dropped_and_colours_stay() -> None:
    """What lies under transparent pixels is what classifiers' loaders see."""
    colours = np.array([[[200, 10, 10], [10, 200, 10]], [[10, 10, 200], [90, 90, 90]]], np.uint8)
    whole = Image.fromarray(np.dstack([colours, np.array([[0, 255], [128, 0]], np.uint8)]))
    assert np.array_equal(np.asarray(to_rgb(whole)), colours)
    palette = Image.fromarray(colours).quantize(4)
    palette.info["transparency"] = bytes([0, 0, 255, 255])
    assert np.abs(np.asarray(to_rgb(palette)).astype(int) - colours).max() <= 8
    grey = Image.fromarray(np.array([[0, 77], [200, 255]], np.uint8)).convert("LA")
    grey.putalpha(0)
    assert np.array_equal(np.asarray(to_rgb(grey))[..., 0], [[0, 77], [200, 255]])
