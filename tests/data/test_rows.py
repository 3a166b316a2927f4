"""Checksums: whatever is done to a stored sample, whoever reads it says so."""

import io
import json
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import BetonWriter, open_beton, sidecar
from dp4tl_dist.data.compact import compact
from dp4tl_dist.data.crops import BadSampleError
from dp4tl_dist.data.loader import IGNORED, BetonLoader, CentreView
from dp4tl_dist.data.rows import load_rows, read_names, rows_path, warn_unchecked
from dp4tl_dist.data.subset import Subset, save_subset
from dp4tl_dist.data.write import folder_samples, write_samples
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import make_meta
from tests.ranks import run_ranks

COUNT, BAD = 12, 5


def noise_jpeg(seed, *, length=0):
    """A JPEG of 20 kB or so, filled up to `length` with zeros behind its end."""
    target = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (120, 120, 3), np.uint8)
    Image.fromarray(pixels).save(target, "JPEG", quality=90)
    return target.getvalue().ljust(length, b"\0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Samples of one length, so that payloads can change places; named but for one."""
    path = tmp_path_factory.mktemp("rows") / "s.beton"
    with BetonWriter(path, capacity=COUNT) as writer:
        for i in range(COUNT):
            payload, name = noise_jpeg(i, length=25_000), f"c{i % 3}/é\udcff {i}.jpg" if i else ""
            writer.add(payload, height=120, width=120, label=i % 3, identifier=100 + i, name=name)
        writer.finish(list("abc"), {})
    return open_beton(path)


@pytest.fixture
def copied(whole, tmp_path):
    for path in (whole.path, sidecar(whole.path), rows_path(whole.path)):
        shutil.copy(path, tmp_path)
    return open_beton(tmp_path / "s.beton")


def swap_payloads(raw, beton):
    """Sample BAD gets the payload of another label's, and that one its."""
    first, second = (slice(int(p), int(p) + 25_000) for p in beton.pointers[[BAD, BAD + 1]])
    raw[first], raw[second] = raw[second], raw[first]


def zero_page(raw, beton):
    """4 KiB that a disk gave back empty."""
    start = int(beton.pointers[BAD]) + 8_000
    raw[start : start + 4096] = bytes(4096)


def flip(offset):
    def flip_bit(raw, beton):
        raw[int(beton.pointers[BAD]) + offset] ^= 1 << offset % 8

    return flip_bit


DAMAGES = {
    "swapped": swap_payloads, "zeroed": zero_page,
    **{f"flip-{offset}": flip(offset) for offset in (0, 3, 200, 620, 5_000, 12_345, 15_001, 24_999)},
}  # fmt: skip


def damage(beton, kind):
    raw = bytearray(beton.path.read_bytes())
    DAMAGES[kind](raw, beton)
    beton.path.write_bytes(raw)
    assert open_beton(beton.path).fingerprint == beton.fingerprint, "nothing but checksums can tell"


def everything(tmp_path, beton):
    meta = make_meta("subset", inputs={"source": beton.fingerprint})
    save_subset(tmp_path / "x.npz", Subset(np.arange(COUNT), np.arange(3), 0.0, "list", meta))
    return tmp_path / "x.npz"


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_by_every_reader(copied, tmp_path, capsys, kind):
    damage(copied, kind)
    with pytest.raises(BadSampleError, match=rf"position {BAD} \(identifier 105, c2/é.* 5.jpg\)"):
        list(BetonLoader(copied).epoch(np.array_split(np.arange(COUNT), 3), CentreView(32)))
    skipping, seen = BetonLoader(copied, skip_bad=True), {}
    for _ in range(2):  # a second time as well
        for batch in skipping.epoch(np.array_split(np.arange(COUNT), 3), CentreView(32)):
            seen |= dict(zip(batch.identifiers.tolist(), batch.labels.tolist(), strict=True))
        assert seen[105] == IGNORED and seen[104] == 1
    with pytest.raises(UserError, match=r"position \d+ \(identifier 10[56], .* is damaged"):
        compact(copied.path, everything(tmp_path, copied), tmp_path / "p.beton")
    assert not (tmp_path / "p.beton").exists() and not rows_path(tmp_path / "p.beton").exists()
    capsys.readouterr()
    assert main(["info", str(copied.path), "--verify"]) == 2
    said = capsys.readouterr()
    assert said.out.count("the sample at position") == (2 if kind == "swapped" else 1)
    assert "position 5 (identifier 105, c2/é\\udcff 5.jpg)" in said.out and said.err.count("\n") == 1


def test_every_flipped_bit_is_noticed(whole):
    payload, rows = bytearray(whole.payload(BAD)), load_rows(whole)
    assert rows.proves(whole, BAD, bytes(payload))
    for place in np.random.default_rng(0).integers(0, 8 * len(payload), 2_000).tolist():
        payload[place // 8] ^= 1 << place % 8
        rows.forget()
        assert not rows.proves(whole, BAD, bytes(payload))
        payload[place // 8] ^= 1 << place % 8


def test_a_label_changed_in_the_tables_is_named(copied, capsys):
    """The tables have a fingerprint; which sample it is, the checksums tell."""
    raw = bytearray(copied.path.read_bytes())
    row = raw.index((105).to_bytes(8, "little") + b"\0") - 8  # before the identifier stands the label
    assert raw[row] == BAD % 3
    raw[row] = 0
    copied.path.write_bytes(raw)
    with pytest.raises(UserError, match="describes another beton"):
        open_beton(copied.path)
    assert main(["info", str(copied.path), "--verify"]) == 2
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "position 5 (identifier 105" in said[0] and "tables" in said[1]


def meet(world, path):
    """What each rank of a pass over its own part meets."""
    beton = open_beton(path)
    mine = np.arange(COUNT)[world.rank :: world.num_ranks]
    try:
        return len(list(BetonLoader(beton, tells=world.is_main).epoch([mine], CentreView(32))))
    except BadSampleError as error:
        return str(error)


def test_each_rank_checks_what_it_reads(copied):
    damage(copied, "zeroed")
    first, second = run_ranks(meet, 2, copied.path)
    assert first == 1 and "position 5 (identifier 105" in second


def test_a_file_touched_while_it_is_read_is_checked_again(copied):
    loader, batches = BetonLoader(copied), [np.arange(COUNT)]
    list(loader.epoch(batches, CentreView(32)))
    damage(copied, "flip-12345")
    with pytest.raises(BadSampleError, match="position 5"):
        list(loader.epoch(batches, CentreView(32)))


def test_names_and_checksums_go_with_their_samples(whole, tmp_path):
    indices = np.array([0, 3, 5, 8])
    meta = make_meta("subset", inputs={"source": whole.fingerprint})
    save_subset(tmp_path / "x.npz", Subset(indices, np.arange(3), 0.5, "list", meta))
    compact(whole.path, tmp_path / "x.npz", tmp_path / "p.beton")
    kept, names = open_beton(tmp_path / "p.beton"), read_names(whole)
    positions = kept.identifiers - 100
    assert sorted(positions) == indices.tolist()
    assert read_names(kept) == [names[i] for i in positions]
    assert load_rows(kept).crc.tolist() == load_rows(whole).crc[positions].tolist()
    assert main(["info", str(kept.path), "--verify"]) == 0


def test_the_checksum_is_what_its_page_says(whole):
    plain = (BAD % 3).to_bytes(8, "little") + (105).to_bytes(8, "little") + whole.payload(BAD)
    assert load_rows(whole).crc[BAD] == zlib.crc32(plain)


def test_written_folders_name_their_files(tmp_path):
    for name in ("ant/a.png", "ant/deep/b.png", "bee/c.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9)).save(path)
    samples, classes = folder_samples(tmp_path / "images")
    write_samples(samples, classes, tmp_path / "f.beton", root=tmp_path / "images")
    beton = open_beton(tmp_path / "f.beton")
    assert sorted(read_names(beton)) == ["ant/a.png", "ant/deep/b.png", "bee/c.png"]
    assert all(
        (name.split("/")[0] == "bee") == label for name, label in zip(read_names(beton), beton.labels, strict=True)
    )


# ---------------------------------------------------------------- the file itself


def readers(beton, tmp_path):
    """Each way to read samples, as a call."""
    subset = everything(tmp_path, beton)
    yield lambda: BetonLoader(beton)
    yield lambda: compact(beton.path, subset, tmp_path / "p.beton", force=True)


@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_rows_file_is_refused(copied, tmp_path, capsys, share):
    path = rows_path(copied.path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    for read in readers(copied, tmp_path):
        with pytest.raises(UserError, match="rows"):
            read()
    assert main(["info", str(copied.path), "--verify"]) == 2
    assert main(["info", str(copied.path)]) == 0  # which reads no checksums


def test_rows_of_another_beton_are_refused(copied, whole, tmp_path, capsys):
    with BetonWriter(tmp_path / "o.beton", capacity=COUNT) as writer:
        for i in range(COUNT):
            writer.add(noise_jpeg(99 + i), height=120, width=120, label=i % 3, identifier=i)
        writer.finish(list("abc"), {})
    shutil.copy(rows_path(tmp_path / "o.beton"), rows_path(copied.path))
    for read in readers(copied, tmp_path):
        with pytest.raises(UserError, match="another beton"):
            read()
    assert main(["info", str(copied.path), "--verify"]) == 2
    assert "another beton" in capsys.readouterr().err


def test_without_rows_one_line_says_so(copied, tmp_path, capsys):
    rows_path(copied.path).unlink()
    warn_unchecked.cache_clear()
    assert json.loads(_out(capsys, ["info", str(copied.path), "--json"]))["checksums"] is False
    assert not capsys.readouterr().err
    for read in [*readers(copied, tmp_path)] * 2:
        read()
    said = capsys.readouterr().err
    assert said.count("has no checksums") == 1 and said.count("\n") == 1
    assert load_rows(open_beton(tmp_path / "p.beton")) is not None
    assert main(["info", str(copied.path), "--verify"]) == 2
    assert "has no checksums" in capsys.readouterr().err


def test_a_rank_that_does_not_tell_is_silent(copied, capsys):
    rows_path(copied.path).unlink()
    warn_unchecked.cache_clear()
    BetonLoader(copied, tells=False)
    assert not capsys.readouterr().err


def _out(capsys, argv):
    assert main(argv) == 0
    return capsys.readouterr().out
