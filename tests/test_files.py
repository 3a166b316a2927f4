"""Artefacts are complete or absent, whatever ends the writer, and only what is sound is read."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dp4tl_dist.atomic import NODE, atomic_file, atomic_folder
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import (
    check_fingerprint,
    check_output,
    digest_file,
    folder_lock,
    load_npz,
    make_meta,
    read_json,
    require_array,
    save_npz,
    write_json,
)

META = {"kind": "votes", "inputs": {}}
ARRAYS = {"votes": np.arange(50), "affinity": np.linspace(0, 1, 50)}


def names(folder: Path) -> list[str]:
    return sorted(item.name for item in folder.iterdir())


def one_line(caught: Any, *parts: object) -> None:
    """The error is a single line that holds each part."""
    text = str(caught.value)
    assert "\n" not in text
    for part in parts:
        assert str(part) in text


def in_background(code: str, *args: object) -> "subprocess.Popen[str]":
    """A Python process that has printed "ready"."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


# ---------------------------------------------------------------- atomic writes


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failure_leaves_the_old_file_or_none(tmp_path: Path, before: str | None) -> None:
    path = tmp_path / "a.txt"
    if before is not None:
        path.write_text(before)
    with pytest.raises(ZeroDivisionError), atomic_file(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ([] if before is None else ["a.txt"])
    assert before is None or path.read_text() == before
    with atomic_file(path) as temporary:
        temporary.write_text("new")
    assert names(tmp_path) == ["a.txt"] and path.read_text() == "new"


@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_the_old_folder_or_none(tmp_path: Path, before: bool) -> None:
    path = tmp_path / "deep" / "folder"
    if before:
        path.mkdir(parents=True)
        (path / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic_folder(path) as temporary:
        (temporary / "half").touch()
        raise ZeroDivisionError
    assert names(path.parent) == (["folder"] if before else [])
    assert not before or names(path) == ["old"]
    with atomic_folder(path) as temporary:
        (temporary / "new").touch()
    assert names(path) == ["new"] and names(path.parent) == ["folder"]


@pytest.mark.parametrize("kind", ["atomic_file", "atomic_folder"])
def test_sigkill_leaves_only_a_hidden_temporary(tmp_path: Path, kind: str) -> None:
    code = (
        "import sys, time, pathlib, dp4tl_dist.atomic as files\n"
        f"with files.{kind}(pathlib.Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'x' if temporary.is_dir() else temporary).write_text('half')\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = in_background(code, tmp_path / "out")
    process.kill()
    process.wait()
    (left,) = names(tmp_path)
    assert left.startswith(".out.") and left.endswith(".tmp")
    check_output(tmp_path / "out", force=False)
    assert names(tmp_path) == []


def test_what_a_living_writer_or_another_machines_holds_is_left(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "out") as held, atomic_folder(tmp_path / "folder") as folder:
        other = tmp_path / f".out.{int(NODE, 16) ^ 1:08x}00000000.tmp"
        other.touch()
        for name in ("out", "folder"):
            check_output(tmp_path / name, force=True)
        with atomic_file(tmp_path / "out") as second:
            second.write_text("second")
        held.write_text("first")
        assert held.exists() and folder.is_dir() and other.exists()
        os.utime(other, (0, 0))
        check_output(tmp_path / "out", force=True)
        assert not other.exists()
    assert (tmp_path / "out").read_text() == "first" and names(tmp_path) == ["folder", "out"]


@pytest.mark.parametrize("ended_by", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stopped_write_leaves_nothing_once_it_runs_again(tmp_path: Path, ended_by: signal.Signals) -> None:
    line = [sys.executable, "-m", "dp4tl_dist", "write", "--synthetic", "source/train", "--workers", "1", "--out",
            str(tmp_path / "o.beton")]  # fmt: skip
    for number in (ended_by, signal.SIGTERM):
        process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        before = set(tmp_path.glob(".o.beton.*.tmp"))
        while process.poll() is None and not set(tmp_path.glob(".o.beton.*.tmp")) - before:
            time.sleep(0.01)
        process.send_signal(number)
        _, told = process.communicate(timeout=200)
        if number != signal.SIGKILL:
            assert names(tmp_path) == []
            assert process.returncode == (75 if number == signal.SIGTERM else 130) and len(told.splitlines()) == 1


def test_check_output_refuses_what_exists_without_force(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "a.npz"
    check_output(path, force=False)
    assert names(path.parent) == []
    path.touch()
    with pytest.raises(UserError) as caught:
        check_output(path, force=False)
    one_line(caught, path, "--force")
    check_output(path, force=True)
    assert path.exists()


def test_check_output_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "out", tmp_path / "file" / "deep" / "out"):
        with pytest.raises(UserError) as caught:
            check_output(path, force=False)
        one_line(caught, path.parent, "--out")


def mounted(place: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; skips where that is not allowed."""
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system takes root")
    try:
        yield place
    finally:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for a few kilobytes."""
    yield from mounted(tmp_path / "small", "size=64k")


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody may write in. Permissions do not bind root; a read-only file system does."""
    if os.geteuid() == 0:
        yield from mounted(tmp_path / "closed", "ro,size=64k")
    else:
        (tmp_path / "closed").mkdir(mode=0o500)
        yield tmp_path / "closed"


def test_a_read_only_folder(read_only: Path) -> None:
    for path in (read_only / "out", read_only / "deep" / "out"):
        with pytest.raises(UserError) as caught:
            check_output(path, force=False)
        one_line(caught, path.parent, "--out")
    with pytest.raises(UserError) as caught, atomic_file(read_only / "out") as temporary:
        temporary.touch()
    one_line(caught, read_only / "out")
    with pytest.raises(UserError) as caught, folder_lock(read_only):
        pass
    one_line(caught, read_only)


def test_a_full_disk_is_told_and_leaves_nothing(full_disk: Path) -> None:
    write_json(full_disk / "kept.json", {"a": 1})
    with pytest.raises(UserError) as caught:
        save_npz(full_disk / "big.npz", {"votes": np.zeros(100_000)}, META)
    one_line(caught, full_disk / "big.npz", os.strerror(errno.ENOSPC))
    with pytest.raises(UserError):
        write_json(full_disk / "kept.json", ["x" * 1000] * 1000)
    with pytest.raises((UserError, OSError)), atomic_folder(full_disk / "folder") as temporary:
        (temporary / "x").write_bytes(bytes(1 << 20))
    assert names(full_disk) == ["kept.json"]
    assert read_json(full_disk / "kept.json") == {"a": 1}


# ---------------------------------------------------------------- locks


def test_a_second_holder_is_refused_and_sigkill_frees(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    code = (
        "import sys, time, pathlib\n"
        "from dp4tl_dist.files import folder_lock\n"
        "with folder_lock(pathlib.Path(sys.argv[1])):\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(60)\n"
    )
    process = in_background(code, folder)
    try:
        with pytest.raises(UserError) as caught, folder_lock(folder):
            pass
        one_line(caught, folder, "in use")
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    with folder_lock(folder), pytest.raises(UserError), folder_lock(folder):
        pass
    with folder_lock(folder):
        pass


def test_a_folder_that_cannot_be_locked(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught, folder_lock(tmp_path / "file"):
        pass
    one_line(caught, tmp_path / "file")


# ---------------------------------------------------------------- JSON and meta


@pytest.mark.parametrize("content", [b"{", b'{"a": }', b"\xff\xfe", b"[" * 200_000, b""])
def test_malformed_json(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_json(tmp_path / "a.json")
    one_line(caught, tmp_path / "a.json")


def test_json_round_trip_and_absence(tmp_path: Path) -> None:
    content = {"b": [1, 2.5, None], "a": {"é": "ü"}}
    write_json(tmp_path / "new" / "a.json", content)
    assert read_json(tmp_path / "new" / "a.json") == content
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(UserError) as caught:
            read_json(path)
        one_line(caught, path)


def test_meta_names_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/dp4tl", "vote", "--out", "a b.npz"])
    meta = make_meta("votes", config={"a": 1}, seed=3, inputs={"source": "f00"})
    assert meta["kind"] == "votes" and meta["inputs"] == {"source": "f00"} and meta["seed"] == 3
    assert meta["command"] == "dp4tl vote --out 'a b.npz'" and meta["version"]
    assert meta["hardware"]["processor"] and meta["hardware"]["cores"] == os.cpu_count()
    assert meta["hardware"]["gpus"] == []  # nothing here has begun to use one
    json.dumps(meta)


def test_fingerprints(tmp_path: Path) -> None:
    check_fingerprint("source", "1", "1", expected_from=tmp_path, actual_from=tmp_path)
    for expected in ("2", None):
        with pytest.raises(UserError) as caught:
            check_fingerprint("source", expected, "1", expected_from=tmp_path / "v.npz", actual_from=tmp_path / "s")
        one_line(caught, tmp_path / "v.npz", tmp_path / "s")


# ---------------------------------------------------------------- npz


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    digests = set()
    for name in ("a.npz", "b.npz"):
        save_npz(tmp_path / name, ARRAYS, META)
        digests.add(digest_file(tmp_path / name))
        time.sleep(2.1 if name == "a.npz" else 0)  # zip counts time in steps of two seconds
    assert len(digests) == 1
    arrays, meta = load_npz(tmp_path / "a.npz", "votes")
    assert meta == META and arrays.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(arrays[name], array)


def test_truncated_anywhere(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", ARRAYS, META)
    whole = (tmp_path / "a.npz").read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        (tmp_path / "b.npz").write_bytes(whole[:length])
        with pytest.raises(UserError) as caught:
            load_npz(tmp_path / "b.npz", "votes")
        one_line(caught, tmp_path / "b.npz")


def test_damaged_content(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", ARRAYS, META)
    whole = bytearray((tmp_path / "a.npz").read_bytes())
    at = bytes(whole).index(ARRAYS["affinity"].tobytes()) + 5
    whole[at] ^= 1
    (tmp_path / "a.npz").write_bytes(whole)
    with pytest.raises(UserError, match="not a readable votes"):
        load_npz(tmp_path / "a.npz", "votes")


def test_pickles_are_refused(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    np.savez(tmp_path / "a.npz", votes=np.array([Trap()], dtype=object), meta=np.array(json.dumps(META)))
    np.savez(tmp_path / "b.npz", votes=np.arange(3), meta=np.array([Trap()], dtype=object))
    for name in ("a.npz", "b.npz"):
        with pytest.raises(UserError) as caught:
            load_npz(tmp_path / name, "votes")
        one_line(caught, tmp_path / name)
    assert not (tmp_path / "sprung").exists()


def test_a_lie_about_sizes_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("votes.npy", bytes(50_000_000))
    assert (tmp_path / "a.npz").stat().st_size < 100_000
    with pytest.raises(UserError, match="claims 50000000 bytes"):
        load_npz(tmp_path / "a.npz", "votes")
    header = b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<f8', 'fortran_order': False, 'shape': (1099511627776,), }"
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("votes.npy", header.ljust(128, b" ") + bytes(64))
        archive.writestr("meta.npy", b"")
    with pytest.raises(UserError, match="not a readable"):
        load_npz(tmp_path / "b.npz", "votes")


def test_another_kind_no_meta_no_file(tmp_path: Path) -> None:
    save_npz(tmp_path / "a.npz", ARRAYS, META)
    with pytest.raises(UserError, match=r"is a 'votes' file, and a 'subset' file is needed"):
        load_npz(tmp_path / "a.npz", "subset")
    np.savez(tmp_path / "b.npz", votes=np.arange(3))
    np.savez(tmp_path / "c.npz", votes=np.arange(3), meta=np.array("[1]"))
    (tmp_path / "d.npz").write_bytes(b"no zip at all")
    for name in ("b.npz", "c.npz", "d.npz", "none.npz"):
        with pytest.raises(UserError) as caught:
            load_npz(tmp_path / name, "votes")
        one_line(caught, tmp_path / name)


def test_require_array(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert require_array(path, ARRAYS, "votes", dtype="int64", ndim=1) is ARRAYS["votes"]
    for name, dtype, ndim in (("nothing", "int64", 1), ("votes", "float64", 1), ("votes", "int64", 2)):
        with pytest.raises(UserError) as caught:
            require_array(path, ARRAYS, name, dtype=dtype, ndim=ndim)
        one_line(caught, path, name)
