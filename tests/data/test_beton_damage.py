"""Files that lie: every count, offset and size of a beton may be wrong, and the answer is one line."""

import os
import tracemalloc

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dp4tl_dist.data.beton import BetonWriter, fingerprint, open_beton, sidecar
from dp4tl_dist.data.beton_format import ALLOCATION, FIELD, HEADER, RAW, metadata_dtype
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import write_json

CLASSES = ["ant", "bee", "cat"]


def write(path):
    """Ten payloads of 1000 bytes; what they hold plays no part here."""
    with BetonWriter(path, capacity=10) as writer:
        for i in range(10):
            writer.add(bytes([i] * 1000), height=24, width=32, label=i % 3, identifier=100 + i)
        writer.finish(CLASSES, {"seed": 0})
    return path


def patched(path, offset, content):
    raw = bytearray(path.read_bytes())
    raw[offset : offset + len(content)] = content
    path.write_bytes(raw)
    return path


def header_of(path, **change):
    header = np.frombuffer(path.read_bytes()[: HEADER.itemsize], HEADER).copy()
    for name, value in change.items():
        header[name] = value
    return patched(path, 0, header.tobytes())


def metadata_of(path, row, column, value):
    kind = metadata_dtype([2, 1, 1])
    start = HEADER.itemsize + 3 * FIELD.itemsize + row * kind.itemsize
    metadata = np.frombuffer(path.read_bytes()[start : start + kind.itemsize], kind).copy()
    if column in metadata["f0"].dtype.names:
        metadata["f0"][column] = value
    else:
        metadata[column] = value
    return patched(path, start, metadata.tobytes())


def allocation_of(path, row, **change):
    start = path.stat().st_size - (10 - row) * ALLOCATION.itemsize
    entry = np.frombuffer(path.read_bytes()[start : start + ALLOCATION.itemsize], ALLOCATION).copy()
    for name, value in change.items():
        entry[name] = value
    return patched(path, start, entry.tobytes())


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda p: header_of(p, version=1), "version 2"),
        (lambda p: header_of(p, num_samples=0), "no samples"),
        (lambda p: header_of(p, num_samples=2**63), "do not fit"),
        (lambda p: header_of(p, num_samples=9), "bytes"),
        (lambda p: header_of(p, page_size=3 << 20), "page size"),
        (lambda p: header_of(p, page_size=4096), "page size"),
        (lambda p: header_of(p, num_fields=65535), "65535 fields"),
        (lambda p: header_of(p, allocation=2**64 - 1), "bytes"),
        (lambda p: header_of(p, allocation=0), "do not fit"),
        (lambda p: patched(p, HEADER.itemsize, b"\x06"), "types"),
        (lambda p: patched(p, HEADER.itemsize, b"\x01"), "one image"),
        (lambda p: metadata_of(p, 1, "pointer", 5), "disagree"),
        (lambda p: metadata_of(p, 1, "mode", 2), "modes"),
        (lambda p: metadata_of(p, 1, "mode", RAW), "sides"),
        (lambda p: metadata_of(p, 1, "width", 0), "sides"),
        (lambda p: metadata_of(p, 1, "f1", -2), "labels"),
        (lambda p: metadata_of(p, 1, "f1", 2**62), "labels"),
        (lambda p: metadata_of(p, 1, "f2", 100), "identifiers"),
        (lambda p: metadata_of(p, 1, "f2", -4), "identifiers"),
        (lambda p: allocation_of(p, 1, size=2**64 - 1), "outside"),
        (lambda p: allocation_of(p, 1, size=0), "outside"),
        (lambda p: allocation_of(p, 9, size=1 << 20), "cross"),
        (lambda p: allocation_of(p, 1, pointer=2**64 - 1), "outside"),
        (lambda p: allocation_of(p, 1, pointer=64), "outside"),
        (lambda p: allocation_of(p, 1, sample=0), "every sample once"),
        (lambda p: p.write_bytes(b""), "0 bytes"),
        (lambda p: p.write_bytes(b"\x89PNG" * 5000), "not a beton"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes"),
        (lambda p: p.unlink(), "cannot read"),
        (lambda p: (p.unlink(), p.mkdir()), "is a folder"),
        (lambda p: write_json(sidecar(p), {"classes": "ab"}), "no class names"),
        (lambda p: write_json(sidecar(p), [1]), "no class names"),
        (lambda p: write_json(sidecar(p), {"classes": CLASSES, "fingerprint": "0"}), "another beton"),
        (lambda p: write_json(sidecar(p), {"classes": ["a"], "fingerprint": fingerprint(p)}), "names 1 classes"),
        (lambda p: sidecar(p).write_text("{"), "not valid JSON"),
    ],
)
def test_damage_is_named_in_one_line(tmp_path, damage, words):
    path = write(tmp_path / "x.beton")
    damage(path)
    with pytest.raises(UserError, match=words) as caught:
        open_beton(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A valid file without its sidecar; holes make it large, so mutants are made in place."""
    path = write(tmp_path_factory.mktemp("mutants") / "x.beton")
    sidecar(path).unlink()
    size = path.stat().st_size
    head = HEADER.itemsize + 3 * FIELD.itemsize + 10 * metadata_dtype([2, 1, 1]).itemsize
    return path, size, [*range(64), *range(head - 320, head), *range(size - 10 * ALLOCATION.itemsize, size)]


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None)
@given(data=st.data())
def test_mutants_are_refused_or_stay_inside_the_file(tables, data):
    path, size, places = tables
    changes = data.draw(st.dictionaries(st.sampled_from(places), st.integers(0, 255), max_size=6))
    cut = data.draw(st.one_of(st.none(), st.integers(0, size)))
    original = path.read_bytes()
    tracemalloc.start()
    try:
        with open(path, "r+b") as handle:
            for place, value in changes.items():
                os.pwrite(handle.fileno(), bytes([value]), place)
            if cut is not None:
                handle.truncate(cut)
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        try:
            beton = open_beton(path)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert (beton.pointers + beton.sizes <= size).all() and beton.labels.min() >= -1
            assert all(len(beton.payload(i)) == beton.sizes[i] for i in range(beton.num_samples))
        assert tracemalloc.get_traced_memory()[1] - before < 32 << 20
    finally:
        tracemalloc.stop()
        path.write_bytes(original)
