import json
import tracemalloc

import numpy as np
import pytest

from dp4tl_dist.data import compact as module
from dp4tl_dist.data.beton import RAW, BetonWriter, describe, open_beton, sidecar
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.subset import Subset, samples_of_groups, save_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, make_meta


def write_source(path, count=60, scale=1):
    """Raw images of many sizes, identifiers that are not positions."""
    draw = np.random.default_rng(count)
    with BetonWriter(path, capacity=count) as writer:
        for i in range(count):
            height, width = int(draw.integers(1, 30)) * scale, int(draw.integers(1, 30)) * scale
            payload = draw.bytes(height * width * 3)
            writer.add(payload, height=height, width=width, label=i % 5, identifier=1000 + 7 * i, mode=RAW)
        writer.finish(list("abcde"), {})
    return open_beton(path)


def keep_classes(path, beton, classes):
    indices = samples_of_groups(beton.labels, np.array(classes))
    meta = make_meta("subset", inputs={"source": beton.fingerprint})
    save_subset(path, Subset(indices, np.array(classes), 1 - len(classes) / 5, "list", meta))
    return indices


@pytest.mark.parametrize("run_bytes", [1, 5000, 64 << 20])
def test_payloads_and_identifiers_survive(tmp_path, monkeypatch, run_bytes):
    monkeypatch.setattr(module, "RUN_BYTES", run_bytes)
    source = write_source(tmp_path / "s.beton")
    indices = keep_classes(tmp_path / "x.npz", source, [1, 4])
    assert compact(source.path, tmp_path / "x.npz", tmp_path / "p.beton") == len(indices) == 24
    result = open_beton(tmp_path / "p.beton")
    assert sorted(result.identifiers) == source.identifiers[indices].tolist()
    assert result.identifiers.tolist() != sorted(result.identifiers), "it should be shuffled"
    assert result.classes == source.classes
    for i, identifier in enumerate(result.identifiers):
        j = int(np.flatnonzero(source.identifiers == identifier)[0])
        assert result.payload(i) == source.payload(j)
        for name in ("labels", "heights", "widths", "modes", "sizes"):
            assert getattr(result, name)[i] == getattr(source, name)[j]
    meta = json.loads(sidecar(result.path).read_text())["meta"]
    assert meta["inputs"] == {"source": source.fingerprint, "subset": digest_file(tmp_path / "x.npz")}
    told = describe(result)  # the classes that were left out keep their numbers
    assert (told["num_classes"], told["classes_with_samples"], told["samples_per_class"]["min"]) == (5, 2, 0)


def test_same_seed_same_bytes(tmp_path, monkeypatch):
    source = write_source(tmp_path / "s.beton")
    keep_classes(tmp_path / "x.npz", source, [0, 2])
    for name, seed, run_bytes in [("a", 0, 1 << 20), ("b", 0, 3000), ("c", 1, 1 << 20)]:
        monkeypatch.setattr(module, "RUN_BYTES", run_bytes)
        compact(source.path, tmp_path / "x.npz", tmp_path / name, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()


def test_a_compacted_file_compacts_again(tmp_path):
    source = write_source(tmp_path / "s.beton")
    keep_classes(tmp_path / "x.npz", source, [0, 1, 2])
    compact(source.path, tmp_path / "x.npz", tmp_path / "p.beton")
    first = open_beton(tmp_path / "p.beton")
    keep_classes(tmp_path / "y.npz", first, [2])
    compact(first.path, tmp_path / "y.npz", tmp_path / "q.beton")
    assert sorted(open_beton(tmp_path / "q.beton").identifiers) == source.identifiers[source.labels == 2].tolist()


def test_wrong_inputs_leave_nothing(tmp_path):
    source, other = write_source(tmp_path / "s.beton"), write_source(tmp_path / "o.beton", count=61)
    keep_classes(tmp_path / "x.npz", other, [1])
    with pytest.raises(UserError, match="another source"):
        compact(source.path, tmp_path / "x.npz", tmp_path / "p.beton")
    with pytest.raises(UserError, match="seed -1"):
        compact(other.path, tmp_path / "x.npz", tmp_path / "p.beton", seed=-1)
    assert not (tmp_path / "p.beton").exists() and not sidecar(tmp_path / "p.beton").exists()
    with pytest.raises(UserError, match="--force"):
        compact(other.path, tmp_path / "x.npz", source.path)
    with pytest.raises(UserError, match="is an input as well"):
        compact(other.path, tmp_path / "x.npz", other.path, force=True)
    assert open_beton(other.path).num_samples == 61
    (tmp_path / "p.beton.rows").write_text("mine")
    with pytest.raises(UserError, match=r"p\.beton\.rows exists, belongs to no beton"):
        compact(other.path, tmp_path / "x.npz", tmp_path / "p.beton")
    assert (tmp_path / "p.beton.rows").read_text() == "mine"


def test_memory_is_bounded(tmp_path, monkeypatch):
    from dp4tl_dist.data import beton_writer

    source = write_source(tmp_path / "s.beton", count=200, scale=20)
    assert source.sizes.sum() > 40 << 20
    keep_classes(tmp_path / "x.npz", source, [0, 1, 2, 3, 4])
    monkeypatch.setattr(module, "RUN_BYTES", 4 << 20)
    monkeypatch.setattr(beton_writer, "SMALL_FILE", 4 << 20)
    tracemalloc.start()
    try:
        compact(source.path, tmp_path / "x.npz", tmp_path / "p.beton")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
