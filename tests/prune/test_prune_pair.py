"""`prune --apply-to`: two subsets that belong together, whatever ends their writer."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dp4tl_dist.data.beton import Beton
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.errors import UserError
from dp4tl_dist.prune.make import prune


class Cut(BaseException):
    """The process ends here."""


def test_an_old_subset_never_lies_beside_a_new_one(
    source: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ended before any change of the file system: the main subset is whole, and its partner is its own, or absent."""
    out, val, count, at = tmp_path / "x.npz", tmp_path / "x.val.npz", 0, -1

    def wrapped(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Cut
            return real(*args, **more)

        return call

    def made(keep: float) -> None:
        prune(source=source.path, random="classes", keep=keep, out=out, apply_to=source.path, force=True)

    made(0.5)
    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (os, "fsync")):
        monkeypatch.setattr(owner, name, wrapped(getattr(owner, name)))
    cuts, keep = 0, 0.5
    for at in range(1, 40):
        keep, count = 1.2 - keep, 0  # 0.7 and 0.5, in turn
        try:
            made(keep)
        except Cut:
            cuts += 1
        pair = [load_subset(path, beton=source).groups.tolist() for path in (out, val) if path.exists()]
        assert len(pair[0]) in (5, 7) and out.exists() and (len(pair) == 1 or pair[0] == pair[1]), f"at {at}"
        if cuts < at:
            break
    assert cuts > 4 and len(pair) == 2 and [item.name for item in tmp_path.iterdir() if item.suffix == ".tmp"] == []


def test_a_full_disk_leaves_both_old_subsets(source: Beton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "x.npz"
    prune(source=source.path, random="classes", keep=0.5, out=out, apply_to=source.path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        prune(source=source.path, random="classes", keep=0.7, out=out, apply_to=source.path, force=True)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_validation_sets_subset_of_before_is_told(
    source: Beton, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prune(source=source.path, random="classes", keep=0.5, out=tmp_path / "x.npz", apply_to=source.path)
    assert "of an earlier" not in capsys.readouterr().err
    prune(source=source.path, random="classes", keep=0.7, out=tmp_path / "x.npz", force=True)
    assert f"{tmp_path / 'x.val.npz'} is of an earlier" in capsys.readouterr().err
