"""With --force, too, no verb replaces what is no file: a device, a FIFO, a socket, or a link that leads to one."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from test_keep_inputs import COMPACT, PRUNE, SCORE, SOURCE, TRAIN, TRANSFER, VOTE, place
from test_outputs import refused
from test_records import made, small
from test_records import place as pretended

from dp4tl_dist import pipeline
from dp4tl_dist.atomic import atomic_file, atomic_folder
from dp4tl_dist.cli import main
from dp4tl_dist.errors import UserError
from dp4tl_dist.train.claim import claimed

__all__ = ["place", "pretended"]  # the fixtures

CLUSTER = ("cluster", "--surrogate", "run/surrogate", "--source", SOURCE, "--clusters", "2")
INFLUENCE = ("influence", "--config", "influence.json")
WRITE = ("write", "--synthetic", "source/train")
VERBS = (WRITE, PRUNE, VOTE, CLUSTER, SCORE, COMPACT, TRANSFER, INFLUENCE, TRAIN, ("run", "--config", "demo"))
BESIDE = [
    *((argv, f"odd{suffix}") for argv in (WRITE, COMPACT) for suffix in (".json", ".rows")),
    *((argv, "odd.run") for argv in (TRANSFER, INFLUENCE)),
    (CLUSTER, "odd.features"), (PRUNE, "odd.val.npz"),
    *((TRAIN, f"odd/{name}") for name in ("checkpoints", "metrics.jsonl", "config.json", "owner.json")),
]  # fmt: skip


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    """One of our own, with the numbers of /dev/null: that one itself is nothing to try it on."""
    try:
        os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("making a device takes root")


def at_a_socket(path: Path) -> None:
    here = Path.cwd()  # a socket's path is short
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def link(path: Path) -> None:
    fifo(path.with_name("real"))
    path.symlink_to(path.with_name("real"))


def state(folder: Path) -> dict[str, int]:
    """The kind of all that a folder holds."""
    return {str(path.relative_to(folder)): stat.S_IFMT(path.lstat().st_mode) for path in folder.rglob("*")}


def is_kept(folder: Path, argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that refuses the output; what was in its folder is there as it was."""
    before = state(folder)
    assert main(list(argv)) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 1 and state(folder) == before
    return told[0]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [fifo, device, at_a_socket, link])
@pytest.mark.parametrize("argv", VERBS, ids=lambda argv: argv[0])
def test_an_output_that_is_no_file_is_kept(
    place: Path,
    argv: tuple[str, ...],
    make: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    odd = tmp_path / "odd"
    make(odd)
    told = is_kept(tmp_path, (*argv, "--out", str(odd), *(["--force"] if argv[0] != "run" else [])), capsys)
    assert str(odd) in told
    if argv[0] not in ("train", "run"):
        kind = {fifo: "is a FIFO", device: "is a device", at_a_socket: "is a socket"}.get(
            make, "is a link that leads to a FIFO"
        )
        assert f"{odd} {kind}, and only a file is replaced here" in told
        told = is_kept(tmp_path, (*argv, "--out", str(odd)), capsys)
        assert kind in told, "without --force, too, it is no advice to add that"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("argv", "name"), BESIDE, ids=[f"{argv[0]} {name}" for argv, name in BESIDE])
def test_what_is_replaced_beside_an_output_is_kept_too(
    place: Path,
    argv: tuple[str, ...],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    fifo(tmp_path / name)
    assert f"{tmp_path / name} is a FIFO, and only" in is_kept(
        tmp_path, (*argv, "--out", str(tmp_path / "odd"), "--force"), capsys
    )


def test_a_folder_in_a_files_place_is_told_before_the_work(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    assert "is a folder, and only a file" in is_kept(tmp_path, (*PRUNE, "--out", str(tmp_path), "--force"), capsys)


@pytest.mark.timeout(60)
def test_a_runs_page_and_outputs_that_are_no_files_are_kept(
    pretended: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made()
    subset = Path("out/subsets/lm@0.5-t.npz")
    subset.unlink()
    fifo(subset)
    assert f"{subset} is a FIFO" in refused()
    assert stat.S_ISFIFO(subset.lstat().st_mode)
    subset.unlink()
    page = Path("out/report.html")
    page.unlink(missing_ok=True)
    fifo(page)
    assert f"{page} is a FIFO" in is_kept(Path("out"), ("report", "out"), capsys)
    pipeline.run(small(), out=Path("out"))  # mends the subset, and leaves the page to `report`


def test_whatever_writes_by_a_rename_keeps_what_is_no_file(tmp_path: Path) -> None:
    fifo(tmp_path / "odd")
    (tmp_path / "file").touch()
    for name, writer, wanted in (("odd", atomic_file, "a file"), ("odd", atomic_folder, "a folder"),
                                 ("file", atomic_folder, "a folder")):  # fmt: skip
        with pytest.raises(UserError, match=f"only {wanted} is replaced"), writer(tmp_path / name):
            raise AssertionError
    with pytest.raises(UserError, match="is a file"), claimed(tmp_path / "file", force=True):
        raise AssertionError
    assert sorted(state(tmp_path)) == ["file", "odd"]
