"""One walk for `write` and the run's key: what is met, what is not entered, and what changes the digest."""

import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from dp4tl_dist.data.walk import HIDDEN, MET_BEFORE, SPECIAL, SYSTEM, Tree, listing_digest, scan
from dp4tl_dist.errors import UserError


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two classes of three files, one of them in a folder below, and a folder elsewhere."""
    for name in ("in/ant/0", "in/ant/1", "in/ant/deep/2", "in/bee/0", "in/bee/1", "in/bee/deep/2", "away/far/3"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    return tmp_path / "in"


def names(tree: Tree) -> dict[str, list[str]]:
    return {
        name: [str(found.path).rpartition(f"/{name}/")[2] for found in files] for name, files in tree.folders.items()
    }


WHOLE = ["0.png", "1.png", "deep/2.png"]


def test_a_folder(images: Path) -> None:
    tree = scan(images)
    assert names(tree) == {"ant": WHOLE, "bee": WHOLE} and not tree.loose and not tree.left_out
    assert all(found.status and found.status.st_size == len(found.path.read_text()) for found in tree.folders["ant"])


@pytest.mark.parametrize("target", [".", "..", "../..", "deep", "deep/..", "../ant"])
def test_a_loop_of_links_is_met_once(images: Path, target: str) -> None:
    """Within a class, up out of it, and above the whole folder, in every class: never more files, and it ends."""
    for name in ("ant", "bee"):
        (images / name / "loop").symlink_to(target)
        (images / name / "deep" / "loop").symlink_to(images / name / target)
    tree = scan(images)
    assert all(len(files) <= (6 if target == "../ant" else 3) for files in tree.folders.values())
    for files in tree.folders.values():
        assert len({os.path.realpath(found.path) for found in files}) == len(files)
    assert tree.left_out[MET_BEFORE] >= 2


def test_a_class_that_is_a_link_to_the_whole_is_no_class(images: Path) -> None:
    (images / "all").symlink_to(images)
    assert list(scan(images).folders) == ["ant", "bee"] and scan(images).left_out == {MET_BEFORE: 1}


def test_ladders_of_links_end(images: Path) -> None:
    """Two links at each of 20 steps: a million ways, and 21 folders."""
    for i in range(20):
        (images.parent / f"step{i}").mkdir()
        for side in ("left", "right"):
            (images.parent / f"step{i}" / side).symlink_to(images.parent / (f"step{i + 1}" if i < 19 else "away"))
    (images / "ant" / "ladder").symlink_to(images.parent / "step0")
    assert len(scan(images).folders["ant"]) == 4


def test_the_same_folder_in_two_classes_counts_in_both(images: Path) -> None:
    for name in ("ant", "bee"):
        (images / name / "more").symlink_to(images.parent / "away")
    (images / "cat").symlink_to(images.parent / "away")
    (images / "dog").symlink_to(images.parent / "away")
    found = names(scan(images))
    assert found["ant"] == found["bee"] == ["0.png", "1.png", "deep/2.png", "more/far/3.png"]
    assert found["cat"] == found["dog"] == ["far/3.png"] and not scan(images).left_out


def test_what_is_no_file_is_never_opened(images: Path) -> None:
    os.mkfifo(images / "ant" / "pipe.png")
    (images / "ant" / "zero.png").symlink_to("/dev/zero")
    (images / "bee" / "pipe.png").symlink_to(images / "ant" / "pipe.png")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(images / "ant" / "socket.png"))
        tree = scan(images)
    assert names(tree) == {"ant": WHOLE, "bee": WHOLE} and tree.left_out == {SPECIAL: 4}


def test_clutter_is_left_out_by_reason(images: Path) -> None:
    for name in ("@eaDir", ".cache", "__MACOSX"):
        shutil.copytree(images / "ant" / "deep", images / "ant" / name)
        shutil.copytree(images / "ant" / "deep", images / name)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._0.png"):
        (images / "bee" / name).write_text("clutter")
    before = listing_digest(images)
    tree = scan(images)
    assert names(tree) == {"ant": WHOLE, "bee": WHOLE} and tree.left_out == {SYSTEM: 6, HIDDEN: 4}
    (images / "bee" / "Thumbs.db").write_text("looked at again")
    assert listing_digest(images) == before


def test_a_name_that_leads_nowhere_is_told(images: Path) -> None:
    (images / "ant" / "9.png").symlink_to("gone.png")
    (images / "ant" / "self.png").symlink_to("self.png")
    broken = [found for found in scan(images).folders["ant"] if found.status is None]
    assert [(found.path.name, found.fault) for found in broken] == [
        ("9.png", "a broken link"), ("self.png", "Too many levels of symbolic links"),
    ]  # fmt: skip
    listing_digest(images)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path_factory: pytest.TempPathFactory, images: Path) -> None:
    deep = images / "ant" / "deep"
    for folder in (images, images / "ant"):
        folder.chmod(0o755)
    deep.chmod(0)
    parents = [parent for parent in images.parents if parent.stat().st_mode & 0o5 != 0o5 and parent != Path("/")]
    modes = [parent.stat().st_mode for parent in parents]
    own = os.geteuid()
    try:
        for parent in parents:
            parent.chmod(0o755)
        if own == 0:
            os.seteuid(65534)  # root reads everything
        for read in (scan, listing_digest):
            with pytest.raises(UserError, match="deep .Permission denied.: change its permissions"):
                read(images)
    finally:
        os.seteuid(own)
        for parent, mode in zip(parents, modes, strict=True):
            parent.chmod(mode & 0o7777)
        deep.chmod(0o755)


# ---------------------------------------------------------------- digest


def rewrite(path: Path) -> None:
    """Other content of the same size, and the old times put back."""
    status = path.stat()
    path.write_text(path.read_text()[::-1])
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(first: Path, second: Path) -> None:
    between = first.with_name("between")
    first.rename(between)
    second.rename(first)
    between.rename(second)


def link_to_other(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.parents[3] / "away" / "far" / "3.png")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file more": lambda f: (f / "ant" / "new.png").write_text("x"),
    "a file less": lambda f: (f / "ant" / "0.png").unlink(),
    "a file in a folder below": lambda f: (f / "ant" / "deep" / "new.png").write_text("x"),
    "a longer file": lambda f: (f / "bee" / "deep" / "2.png").write_text("longer than before"),
    "an edit in place": lambda f: (f / "ant" / "0.png").write_text("tna/0"),
    "an edit in place, times put back": lambda f: rewrite(f / "ant" / "0.png"),
    "an edit behind a link, times put back": lambda f: rewrite(f.parent / "away" / "far" / "3.png"),
    "two files change places": lambda f: swap(f / "ant" / "0.png", f / "bee" / "0.png"),
    "a file behind a link is gone": lambda f: (f.parent / "away" / "far" / "3.png").unlink(),
    "a file behind a link comes": lambda f: (f.parent / "away" / "far" / "4.png").write_text("x"),
    "a file becomes a link": lambda f: link_to_other(f / "ant" / "deep" / "2.png"),
    "another name": lambda f: (f / "ant" / "0.png").rename(f / "ant" / "00.png"),
    "another class name": lambda f: (f / "ant").rename(f / "wasp"),
    "an empty class": lambda f: (f / "empty").mkdir(),
    "a file with no suffix": lambda f: (f / "bee" / "x").write_text("x"),
    "a loose file": lambda f: (f / "loose.png").write_text("x"),
    "a broken link comes": lambda f: (f / "bee" / "x.png").symlink_to("gone"),
    "a link goes elsewhere": lambda f: ((f / "cat").unlink(), (f / "cat").symlink_to(f / "bee" / "deep")),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_the_digest_follows_every_change(images: Path, change: str) -> None:
    (images / "ant" / "far").symlink_to(images.parent / "away")
    (images / "cat").symlink_to(images.parent / "away" / "far")
    before = listing_digest(images)
    assert listing_digest(images) == before
    CHANGES[change](images)
    assert listing_digest(images) != before


def test_the_digest_does_not_depend_on_where_the_folder_lies(images: Path) -> None:
    before = listing_digest(images)
    images.rename(images.with_name("moved"))
    assert listing_digest(images.with_name("moved")) == before


def test_names_of_any_bytes(images: Path) -> None:
    place = os.fsencode(images) + b"/caf\xe9"
    os.mkdir(place)  # noqa: PTH102 (a path of bytes)
    with open(place + b"/\xff\xfe.png", "w") as handle:
        handle.write("x")
    before = listing_digest(images)
    assert os.fsencode(list(scan(images).folders)[-1]) == b"caf\xe9"
    os.rename(place, os.fsencode(images) + b"/caf\xe8")  # noqa: PTH104
    assert listing_digest(images) != before
