"""One image to a payload: sizes, orientation, whatever the metadata, suffix or format."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.data.encode import NO_PIXELS, encode, encode_samples, image_suffixes, is_image


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


# ---------------------------------------------------------------- orientation and other metadata

CORNERS = np.array([[250, 0, 0], [0, 0, 250], [0, 250, 0], [0, 0, 0]])
UPRIGHT = Image.fromarray(np.repeat(np.repeat(CORNERS.reshape(2, 2, 3), 24, 0), 32, 1).astype(np.uint8))
UNDO = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}  # fmt: skip
FORMATS = {"jpg": {"quality": 95}, "png": {}, "webp": {"lossless": True}, "avif": {"quality": 95}, "tif": {}}
TAGS = [
    0x100, 0x101, 0x102, 0x103, 0x106, 0x10E, 0x10F, 0x110, 0x111, 0x115, 0x11A, 0x11B, 0x128, 0x131, 0x132, 0x13B,
    0x213, 0x8298, 0x8769, 0x8825, 0x9286, 0xA005,
]  # fmt: skip
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}
"""Bytes of a value of each of EXIF's types."""


def exif(orientation, tag, kind):
    """An EXIF block of the orientation and one more tag, whose value is nonsense of that type."""
    count = max(1, 4 // SIZES[kind])
    value = bytes(range(1, 1 + SIZES[kind] * count))
    entries = [(0x112, 3, 1, struct.pack("<HH", orientation, 0))]
    entries.append((tag, kind, count, value if len(value) <= 4 else struct.pack("<I", 8 + 2 + 2 * 12 + 4)))
    table = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    tail = value if len(value) > 4 else b""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", 2) + table + bytes(4) + tail


def laid_out(orientation):
    return UPRIGHT.transpose(UNDO[orientation]) if orientation in UNDO else UPRIGHT


def saved(image, suffix, **options):
    Image.init()
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{suffix}"], **FORMATS.get(suffix, {}), **options)
    return buffer.getvalue()


def is_upright(path, *, max_side=0):
    (result,) = encode_samples([path], max_side=max_side, quality=95)
    assert not isinstance(result, str), result
    stored = np.asarray(Image.open(io.BytesIO(result.payload)))
    corners = stored[[2, 2, -3, -3], [2, -3, 2, -3]].astype(int)
    return stored.shape[1] > stored.shape[0] and np.abs(corners - CORNERS).max() < 40


@pytest.mark.parametrize("max_side", [0, 30])
@pytest.mark.parametrize("suffix", FORMATS)
def test_orientation_is_applied(tmp_path, suffix, max_side):
    for orientation in range(1, 9):
        content = Image.Exif()
        content[0x0112] = orientation
        (tmp_path / f"x.{suffix}").write_bytes(saved(laid_out(orientation), suffix, exif=content))
        assert is_upright(tmp_path / f"x.{suffix}", max_side=max_side), orientation


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_no_image_is_lost_for_its_metadata(tmp_path, suffix):
    """Each orientation with each of 22 tags in each of 12 types: nonsense that writers of EXIF refuse."""
    path = tmp_path / f"x.{suffix}"
    plain = {
        orientation: saved(laid_out(orientation), suffix, exif=exif(orientation, 0x10F, 2)) for orientation in UNDO
    }
    for orientation in UNDO if suffix == "jpg" else (6,):
        for tag in TAGS:
            for kind in SIZES:
                block = exif(orientation, tag, kind)
                if suffix == "jpg":  # the block can be put in its place without coding the image again
                    data = plain[orientation]
                    old = data.index(b"Exif") - 4
                    after = old + 2 + int.from_bytes(data[old + 2 : old + 4], "big")
                    data = data[: old + 2] + struct.pack(">H", len(block) + 2) + block + data[after:]
                else:
                    data = saved(laid_out(orientation), suffix, exif=block)
                path.write_bytes(data)
                assert is_upright(path), (orientation, tag, kind)


def test_no_avif_is_lost_for_its_metadata(tmp_path):
    """Turned by a box of its own, with one tag: Pillow writes the tag anew together with the orientation."""
    content = Image.Exif()
    content[0x112], content[0x10F] = 6, "abcd"
    whole = saved(laid_out(6), "avif", exif=content)
    place = next(whole.index(head) + 10 for head in (b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08") if head in whole)
    order = "<" if whole[place - 10 : place - 8] == b"II" else ">"
    for tag in TAGS:
        for kind, size in SIZES.items():
            entry = struct.pack(f"{order}HHI", tag, kind, max(1, 4 // size)) + b"\1\2\3\4"
            (tmp_path / "x.avif").write_bytes(whole[:place] + entry + whole[place + 12 :])
            assert is_upright(tmp_path / "x.avif"), (tag, kind)


def png_chunk(name, body, *, checksum=None):
    found = zlib.crc32(name + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", found)


@pytest.mark.parametrize(
    "chunk",
    [
        png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(9_000_000))),
        png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(bytes(9_000_000))),
        png_chunk(b"iCCP", b"x\0\0not a profile"),
        png_chunk(b"tEXt", b"Comment\0a", checksum=1),
        png_chunk(b"eXIf", b"not a TIFF"),
        png_chunk(b"pHYs", b"short"),
        png_chunk(b"tIME", b""),
    ],
    ids=lambda chunk: chunk[4:8].decode(),
)
def test_no_png_is_lost_for_a_chunk(tmp_path, chunk):
    whole = saved(laid_out(6), "png", exif=exif(6, 0x10F, 2))
    (tmp_path / "x.png").write_bytes(whole[:33] + chunk + whole[33:])
    (result,) = encode_samples([tmp_path / "x.png"], max_side=0, quality=95)
    assert not isinstance(result, str), result
    assert chunk[4:8] == b"eXIf" or is_upright(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["gif", "jpg", "jp2"])
@pytest.mark.parametrize("size", [100, 65_533, 65_534, 200_000])
def test_comments_are_neither_stored_nor_in_the_way(tmp_path, suffix, size):
    options = {"comment": b"x" * min(size, 65_531)} if suffix == "jp2" else {"comment": b"x" * size}
    if suffix == "jpg":  # as many comments as it takes
        parts = [b"x" * min(65_533, size - start) for start in range(0, size, 65_533)]
        comments = b"".join(b"\xff\xfe" + struct.pack(">H", len(part) + 2) + part for part in parts)
        data = saved(UPRIGHT, "jpg")[:2] + comments + saved(UPRIGHT, "jpg")[2:]
    else:
        data = saved(UPRIGHT, suffix, **options)
    (tmp_path / f"x.{suffix}").write_bytes(data)
    for reencode in (False, True):
        (result,) = encode_samples([tmp_path / f"x.{suffix}"], max_side=0, quality=95, reencode=reencode)
        assert not isinstance(result, str), result
        assert b"xxxx" not in result.payload


def test_pillow_passes_nothing_on(tmp_path):
    image = UPRIGHT.copy()
    image.info = {"comment": b"secret" * 20_000, "xmp": b"secret", "exif": b"secret", "icc_profile": b"secret"}
    assert b"secret" not in encode(image, max_side=0, quality=95).payload
    assert image.info["comment"], "the caller's image is as it was"


# ---------------------------------------------------------------- suffixes and formats


def formats_that_pillow_writes_and_reads():
    Image.init()
    suffixes = {}
    for suffix, name in Image.registered_extensions().items():
        if name in Image.SAVE and name in Image.OPEN and name not in NO_PIXELS:
            suffixes.setdefault(name, suffix)
    return suffixes


@pytest.mark.parametrize("name", formats_that_pillow_writes_and_reads())
def test_every_format_that_pillow_reads_is_taken(tmp_path, name):
    suffix = formats_that_pillow_writes_and_reads()[name]
    image = UPRIGHT
    for mode in ("RGB", "L", "1", "P", "RGBA", "F"):
        try:
            buffer = io.BytesIO()
            image = UPRIGHT.resize((64, 64)).convert(mode)
            image.save(buffer, name)
            break
        except (OSError, ValueError, KeyError):
            continue
    for given in (suffix, suffix.upper()):
        path = tmp_path / f"x{given}"
        path.write_bytes(buffer.getvalue())
        assert is_image(path)
        (result,) = encode_samples([path], max_side=0, quality=95)
        assert not isinstance(result, str), result
        wanted = np.asarray(image.convert("RGB")).astype(int)
        found = np.asarray(Image.open(io.BytesIO(result.payload)).convert("RGB").resize((64, 64)))
        assert np.abs(found - wanted).mean() < 40


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp", "ppm", "avif", "jp2", "qoi"])
def test_an_image_is_known_by_its_content_where_the_suffix_says_nothing(tmp_path, suffix):
    for name in ("none", "x.unknown", "n01440764_10026.ILSVRC", "x.jpg_large", "x."):
        (tmp_path / name).write_bytes(saved(UPRIGHT, suffix))
        assert is_image(tmp_path / name) and is_upright(tmp_path / name)


def test_what_is_no_image_is_not_taken_for_one(tmp_path):
    rng = np.random.default_rng(0)
    starts = [b"", b"P", b"P1", b"P3\n", b"P6 is a name\n", b"Python\n", b"BM", b"GIF", b"RIFF", b"II*\0", b"\xff\xd8",
              b"{}", b"<?xml version='1.0'?><svg/>", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\x93NUMPY", b"PK\3\4",
              b"\0\0\1\0"]  # fmt: skip
    for start in starts:
        for size in (0, 10, 3_000):
            (tmp_path / "README").write_bytes(start + rng.integers(32, 127, size, dtype=np.uint8).tobytes())
            assert not is_image(tmp_path / "README"), (start, size)
            (tmp_path / "x.bin").write_bytes(start + rng.bytes(size))
            assert not is_image(tmp_path / "x.bin"), (start, size)


def test_formats_that_other_programs_decode_are_left_alone(tmp_path):
    assert not image_suffixes() & {".eps", ".ps", ".wmf", ".emf", ".mpg", ".h5", ".hdf", ".grib", ".bufr", ".pdf"}
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    assert encode_samples([tmp_path / "x.png"], max_side=0, quality=95) == ["not an image of a known format"]


def test_reasons_are_plain_words(tmp_path):
    large = tmp_path / "large.bmp"
    large.write_bytes(b"BM" + bytes(12) + struct.pack("<IiiHHIIiiII", 40, 40_000, 40_000, 1, 24, 0, 0, 0, 0, 0, 0))
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    reasons = encode_samples(
        [large, tmp_path / "page.jpg", tmp_path / "gone.png", tmp_path, tmp_path / "x.heic"], max_side=0, quality=95
    )
    assert [str(reason)[:20] for reason in reasons] == [
        "Image size (16000000", "not an image of a kn", "No such file or dire", "Is a directory",
        "Pillow reads no .hei",
    ]  # fmt: skip
    assert is_image(tmp_path / "x.heic"), "it is named, not passed over"
    assert all(str(tmp_path) not in str(reason) for reason in reasons)


def test_shrinking_a_large_jpeg_by_way_of_draft_keeps_the_look(tmp_path):
    # Smooth content: the fast path decodes at a fraction of the size, and must still give the same picture.
    big = Image.fromarray(picture(32, 48)).resize((1600, 1200), Image.Resampling.BICUBIC)
    big.save(tmp_path / "x.jpg", quality=95)
    fast = encode(Image.open(tmp_path / "x.jpg"), max_side=100, quality=95)
    exact = np.asarray(big.resize((100, 75), Image.Resampling.LANCZOS)).astype(int)
    assert (fast.width, fast.height) == (100, 75)
    assert np.abs(np.asarray(Image.open(io.BytesIO(fast.payload))).astype(int) - exact).mean() < 4
