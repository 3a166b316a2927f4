"""JPEGs that fit are kept: the coded image unchanged, no metadata, readable by all. Others are encoded anew."""

import io
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from stock import stock_loader

from dp4tl_dist.data.beton import BetonWriter
from dp4tl_dist.data.coded import decodes, jpeg_without_metadata
from dp4tl_dist.data.encode import encode_samples


def picture(height: int = 48, width: int = 72, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def jpeg(image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, "JPEG", **{"quality": 95, **options})
    return buffer.getvalue()


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(data: bytes, *segments: bytes, at: int = 2) -> bytes:
    return data[:at] + b"".join(segments) + data[at:]


def stored(tmp_path: Path, data: bytes, *, max_side: int = 400, reencode: bool = False) -> bytes | str:
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    (result,) = encode_samples([path], max_side=max_side, quality=90, reencode=reencode)
    if isinstance(result, str):
        return result
    assert (result.width, result.height) == Image.open(io.BytesIO(result.payload)).size
    return result.payload


def pixels(data: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def coded_image(data: bytes) -> bytes:
    """From the quantisation tables to the end, without what stands between."""
    start = data.index(b"\xff\xdb")
    return data[start : data.rindex(b"\xff\xd9") + 2]


def exif(orientation: int) -> bytes:
    content = Image.Exif()
    content[0x0112] = orientation
    content[0x010F] = "a maker"
    return content.tobytes()


RESTARTS = {"restart_marker_rows": 1}
METADATA = [
    segment(0xE1, exif(1)), segment(0xE1, b"Exif\0\0not a TIFF"), segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>"),
    segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(500)), segment(0xE2, b"MPF\0garbage"), segment(0xED, b"Photoshop 3.0\0"),
    segment(0xE0, b"JFXX\0\x10"), segment(0xEF, bytes(65_533)), segment(0xFE, b"a comment " * 6_000),
]  # fmt: skip
KEPT = {
    "4:2:0": jpeg(),
    "4:4:4": jpeg(subsampling=0),
    "4:2:2": jpeg(subsampling=1),
    "4:1:1": jpeg(subsampling="4:1:1"),
    "grey": jpeg(picture().convert("L")),
    "optimised tables": jpeg(optimize=True),
    "restart markers": jpeg(**RESTARTS),
    "one pixel": jpeg(picture(1, 1)),
    "odd sides": jpeg(picture(31, 17)),
    "as large as may be": jpeg(picture(400, 8)),
    "trailing garbage": jpeg() + b"\xff\xd8 garbage \xff\xd9" * 9,
    "a second image": jpeg() + jpeg(picture(seed=1)),
    "fill bytes": jpeg().replace(b"\xff\xdb", b"\xff\xff\xff\xdb"),
    "no JFIF": jpeg()[:2] + jpeg()[20:],
    "Adobe, YCbCr": with_segments(jpeg()[:2] + jpeg()[20:], segment(0xEE, b"Adobe\0\x64\0\0\0\0\x01")),
    "metadata of every kind": with_segments(jpeg(), *METADATA, at=20),
    "metadata before the scan": with_segments(jpeg(), *METADATA, at=jpeg().index(b"\xff\xda")),
    "odd orientations": with_segments(jpeg(), segment(0xE1, exif(9))),
}


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO file")
@pytest.mark.parametrize("case", KEPT)
def test_jpegs_that_fit_are_kept(tmp_path: Path, case: str) -> None:
    data = KEPT[case]
    payload = stored(tmp_path, data)
    assert isinstance(payload, bytes) and len(payload) <= len(data)
    first = jpeg_without_metadata(data)
    assert first and payload == first.payload and first.plain and decodes(first)
    # Every byte of what codes the image is there, in its order, and nothing else but JFIF's and Adobe's segments.
    start = payload.index(b"\xff\xda")
    assert payload[start:] in data and payload.endswith(b"\xff\xd9")
    assert np.array_equal(pixels(payload), pixels(data))
    markers = set(re.findall(rb"\xff([\xe0-\xef\xfe])", payload[:start]))
    assert markers <= ({b"\xee"} if "Adobe" in case else {b"\xe0"})
    assert stored(tmp_path, payload) == payload, "what was kept once is kept as it is"
    anew = stored(tmp_path, data, reencode=True)
    assert isinstance(anew, bytes) and anew != payload and np.abs(pixels(anew) - pixels(data)).mean() < 12


def test_scans_of_one_component_each_are_kept(tmp_path: Path) -> None:
    """Baseline with a scan for each component, and a comment between them."""
    grey = [jpeg(picture(seed=seed).convert("L")) for seed in range(3)]
    tables = b"".join(
        segment_of(data, 0xDB)[:4] + bytes([i]) + segment_of(data, 0xDB)[5:] for i, data in enumerate(grey)
    )
    frame = segment(0xC0, struct.pack(">BHHB", 8, 48, 72, 3) + b"".join(bytes([i + 1, 0x11, i]) for i in range(3)))
    scans = []
    for i, data in enumerate(grey):
        start = data.index(b"\xff\xda")
        huffman = data[data.index(b"\xff\xc4") : start]
        scans.append(huffman + segment(0xDA, bytes([1, i + 1, 0, 0, 63, 0])) + data[start + 10 : -2])
    data = b"\xff\xd8" + tables + frame + segment(0xFE, b"between").join(scans) + b"\xff\xd9"
    payload = stored(tmp_path, data)
    assert isinstance(payload, bytes) and payload == data.replace(segment(0xFE, b"between"), b"")
    assert np.array_equal(pixels(payload), pixels(data))


def segment_of(data: bytes, marker: int) -> bytes:
    start = data.index(bytes([0xFF, marker]))
    return data[start : start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")]


ANEW = {
    "progressive": jpeg(progressive=True),
    "RGB, by Adobe's mark": jpeg(keep_rgb=True),
    "RGB, by its components' names": with_segments(jpeg()[:2] + jpeg()[20:]).replace(
        segment_of(jpeg(), 0xC0), segment_of(jpeg(), 0xC0)[:10] + b"R\x22\0G\x11\1B\x11\1"
    ).replace(b"\xff\xda\0\x0c\3\1\0\2\x11\3\x11", b"\xff\xda\0\x0c\3R\0G\x11B\x11"),
    "CMYK": jpeg(picture().convert("CMYK")),
    "too large": jpeg(picture(401, 8)),
    "lying on its side": with_segments(jpeg(), segment(0xE1, exif(6))),
}  # fmt: skip


@pytest.mark.parametrize("case", ANEW)
def test_other_jpegs_are_encoded_anew(tmp_path: Path, case: str) -> None:
    payload = stored(tmp_path, ANEW[case])
    assert isinstance(payload, bytes)
    read = jpeg_without_metadata(payload)
    assert read and read.plain and decodes(read) and coded_image(payload) != coded_image(ANEW[case])
    assert stored(tmp_path, ANEW[case], reencode=True) == payload
    if case.startswith("RGB"):
        assert np.abs(pixels(payload) - pixels(ANEW[case])).mean() < 12


def test_damaged_jpegs_are_never_kept(tmp_path: Path) -> None:
    """Cut anywhere: an error, as before. A flipped bit: kept where the decoder that trains reads it, else anew."""
    data, rng = jpeg(), np.random.default_rng(0)
    for stop in rng.integers(2, len(data) - 1, 40).tolist():
        assert isinstance(stored(tmp_path, data[:stop]), str)
    outcomes = {"kept": 0, "anew": 0, "refused": 0}
    for place in rng.integers(2, len(data), 200).tolist():
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << int(rng.integers(8))
        payload = stored(tmp_path, bytes(spoiled))
        if isinstance(payload, str):
            outcomes["refused"] += 1
            continue
        read = jpeg_without_metadata(payload)
        assert read and decodes(read)
        outcomes["kept" if payload[-200:] == bytes(spoiled)[-200:] else "anew"] += 1
    assert all(outcomes.values()), outcomes


@pytest.mark.filterwarnings("ignore:Image appears to be a malformed MPO file")
def test_stock_ffcv_reads_what_was_kept(tmp_path: Path) -> None:
    cases = [case for case in KEPT if pixels(KEPT[case]).shape == (48, 72, 3)]
    with BetonWriter(tmp_path / "x.beton", capacity=len(cases)) as writer:
        for i, case in enumerate(cases):
            payload = stored(tmp_path, KEPT[case])
            assert isinstance(payload, bytes)
            writer.add(payload, height=48, width=72, label=0, identifier=i)
        writer.finish(["a"], {})
    batches = stock_loader(tmp_path / "x.beton", True, ["image", "label", "identifier"])
    images = np.concatenate([batch[0] for batch in batches])
    for case, image in zip(cases, images, strict=True):
        assert np.abs(image.astype(int) - pixels(KEPT[case])).max() <= 40, case
        assert np.abs(image.astype(int) - pixels(KEPT[case])).mean() <= 3, case
