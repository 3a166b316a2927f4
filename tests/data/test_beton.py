"""The file format against stock FFCV in both directions."""

import io

import numpy as np
import pytest
from PIL import Image
from stock import stock_loader

from dp4tl_dist.data import beton_writer
from dp4tl_dist.data.beton import JPEG, RAW, BetonWriter, describe, fingerprint, open_beton
from dp4tl_dist.errors import UserError

CLASSES = ["ant", "bee", "cat"]


def pixels_of(index, height=24, width=32):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 7 + index, columns * 5, rows + columns + 3 * index], -1).astype(np.uint8)


def jpeg_of(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write(path, *, count=10, mode=JPEG, capacity=None, sides=(24, 32)):
    with BetonWriter(path, capacity=capacity or count) as writer:
        for i in range(count):
            pixels = pixels_of(i, *sides)
            payload = jpeg_of(pixels) if mode == JPEG else pixels.tobytes()
            height, width = sides
            writer.add(payload, height=height, width=width, label=i % 3, identifier=100 + i, mode=mode)
        writer.finish(CLASSES, {"seed": 0})
    return path


@pytest.mark.parametrize("os_cache", [True, False])
@pytest.mark.parametrize("mode", [JPEG, RAW])
def test_stock_ffcv_reads_our_files(tmp_path, monkeypatch, os_cache, mode):
    # Payloads of several pages, the last one cut short, and a smaller number of samples than was announced.
    monkeypatch.setattr(beton_writer, "SMALL_FILE", 0)
    monkeypatch.setattr(beton_writer, "PAGE_SIZE", 1 << 21)
    count, sides = (10, (24, 32)) if mode == JPEG else (8, (500, 600))
    path = write(tmp_path / "x.beton", count=count, mode=mode, capacity=count + 5, sides=sides)
    ours = open_beton(path)
    if mode == RAW:
        assert len(np.unique(ours.pages)) == 4
    batches = stock_loader(path, os_cache, ["image", "label", "identifier"])
    images, labels, identifiers = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    assert labels.ravel().tolist() == ours.labels.tolist() == [i % 3 for i in range(count)]
    assert identifiers.ravel().tolist() == ours.identifiers.tolist() == [100 + i for i in range(count)]
    for i, image in enumerate(images):
        pixels = pixels_of(i, *sides)
        if mode == RAW:
            assert np.array_equal(image, pixels)
        else:
            # libjpeg-turbo's fast transform against Pillow's exact one differs by a few grey levels.
            assert np.abs(image.astype(int) - np.asarray(Image.open(io.BytesIO(ours.payload(i))))).max() <= 8


def test_stock_reader_sees_the_same_tables(tmp_path):
    from ffcv.reader import Reader

    path = write(tmp_path / "x.beton")
    stock, ours = Reader(str(path)), open_beton(path)
    assert stock.field_names == ["image", "label", "identifier"] == list(ours.fields)
    assert stock.page_size == ours.page_size and stock.num_samples == ours.num_samples
    assert np.array_equal(stock.metadata["f0"]["data_ptr"], ours.pointers)
    assert np.array_equal(stock.alloc_table["size"], ours.sizes)
    assert (stock.alloc_table["sample_id"] == np.arange(10)).all()


class Drawn:
    def __len__(self):
        return 9

    def __getitem__(self, index):
        return pixels_of(index), int(index) % 3


@pytest.mark.parametrize("mode", ["jpg", "raw"])
@pytest.mark.parametrize("names", [("image", "label"), ("picture", "y")])
def test_files_of_the_stock_writer_read_here(tmp_path, mode, names, monkeypatch):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.writer import DatasetWriter

    path = tmp_path / "stock.beton"
    fields = dict(zip(names, (RGBImageField(write_mode=mode), IntField()), strict=True))
    DatasetWriter(str(path), fields, num_workers=2).from_indexed_dataset(Drawn(), chunksize=2)
    beton = open_beton(path)
    assert beton.fields == names and beton.page_size == 8 << 20
    assert beton.classes == ("0", "1", "2")
    assert beton.identifiers.tolist() == list(range(9))
    assert beton.labels.tolist() == [i % 3 for i in range(9)]
    for i in range(9):
        if mode == "raw":
            assert beton.modes[i] == RAW and beton.payload(i) == pixels_of(i).tobytes()
        else:
            decoded = np.asarray(Image.open(io.BytesIO(beton.payload(i))))
            assert beton.modes[i] == JPEG and decoded.shape == (beton.heights[i], beton.widths[i], 3)


def test_round_trip(tmp_path):
    path = write(tmp_path / "x.beton")
    beton = open_beton(path)
    assert (beton.num_samples, beton.num_classes, beton.classes) == (10, 3, tuple(CLASSES))
    assert beton.labels.dtype == beton.identifiers.dtype == np.int64
    assert beton.heights.tolist() == [24] * 10 and beton.widths.tolist() == [32] * 10
    assert [beton.payload(i) for i in range(10)] == [jpeg_of(pixels_of(i)) for i in range(10)]
    assert fingerprint(path) == beton.fingerprint
    assert not beton.labels.flags.writeable
    told = describe(beton)
    assert told["num_samples"] == 10 and told["height"] == {"min": 24, "mean": 24.0, "max": 24}
    assert told["samples_per_class"] == {"min": 3, "max": 4} and told["meta"] == {"seed": 0}


def test_same_samples_give_the_same_bytes_and_others_another_fingerprint(tmp_path):
    first, second = write(tmp_path / "a.beton"), write(tmp_path / "b.beton")
    assert first.read_bytes() == second.read_bytes()
    assert fingerprint(write(tmp_path / "c.beton", count=9)) != fingerprint(first)


def test_page_sizes(tmp_path, monkeypatch):
    monkeypatch.setattr(beton_writer, "SMALL_FILE", 4 << 20)
    for name, sizes, page_size in [
        ("few", [1000] * 3, 2 << 20),
        ("many", [1 << 20] * 9, 8 << 20),
        ("one large", [1000, 3 << 20], 4 << 20),
    ]:
        path = tmp_path / name
        with BetonWriter(path, capacity=len(sizes)) as writer:
            for i, size in enumerate(sizes):
                writer.add(bytes(size), height=1, width=1, label=0, identifier=i)
            writer.finish(["a"], {})
        beton = open_beton(path)
        assert beton.page_size == page_size and beton.sizes.tolist() == sizes
    with pytest.raises(UserError, match="max_side"), BetonWriter(tmp_path / "x", capacity=9) as writer:
        for i, size in enumerate([5 << 20, 9 << 20]):
            writer.add(bytes(size), height=1, width=1, label=0, identifier=i)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name.startswith((".", "x"))) == []


def test_nothing_is_left_of_an_unfinished_file(tmp_path):
    with pytest.raises(KeyError), BetonWriter(tmp_path / "x.beton", capacity=2) as writer:
        writer.add(b"x", height=1, width=1, label=0, identifier=0)
        raise KeyError
    with pytest.raises(RuntimeError, match="not finished"), BetonWriter(tmp_path / "x.beton", capacity=2):
        pass
    assert list(tmp_path.iterdir()) == []
