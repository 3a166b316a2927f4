import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton, sidecar
from dp4tl_dist.data.rows import beside, load_rows
from dp4tl_dist.data.write import Sample, WriteOptions, folder_samples, write_folder, write_samples
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import save_npz


def picture(height=40, width=60, shift=0):
    rows, columns = np.mgrid[:height, :width]
    return np.stack([rows * 3 % 256, (columns * 2 + shift) % 256, (rows + columns) % 256], -1).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Three classes, 4, 5 and 6 images, PNG so that pixels are known; some clutter that is not images."""
    images = tmp_path / "images"
    for label, name in enumerate(["zebra", "ant", "bée"]):
        (images / name).mkdir(parents=True)
        for i in range(4 + label):
            Image.fromarray(picture(shift=40 * label + 5 * i)).save(images / name / f"{i}.png")
    (images / "ant" / "notes.txt").write_text("no image")
    (images / ".hidden").mkdir()
    (images / "ant" / ".hidden.png").write_text("no image")
    (images / "README").write_text("no image")
    return images


def decoded(beton, index):
    return np.asarray(Image.open(io.BytesIO(beton.payload(index)))).astype(int)


def test_folder_becomes_a_shuffled_beton(tmp_path, folder):
    out, calls = tmp_path / "out" / "x.beton", []
    report = write_folder(folder, out, progress=lambda done, total: calls.append((done, total)))
    beton = open_beton(out)
    assert (report.num_samples, report.num_classes, report.skipped) == (15, 3, [])
    assert beton.classes == ("ant", "bée", "zebra")
    assert np.bincount(beton.labels).tolist() == [5, 6, 4]
    assert beton.identifiers.tolist() == list(range(15))
    assert (np.diff(beton.labels) != 0).sum() > 2, "the file should not be sorted by class"
    assert calls[-1] == (15, 15)
    # Every image is there once, under its own label.
    wanted = [(s.label, np.asarray(Image.open(s.source)).astype(int)) for s in folder_samples(folder)[0]]
    for i in range(15):
        distances = [np.abs(decoded(beton, i) - pixels).mean() for _, pixels in wanted]
        label, _ = wanted.pop(int(np.argmin(distances)))
        assert min(distances) < 6 and label == beton.labels[i]
    content = json.loads(sidecar(out).read_text())
    assert content["meta"]["config"]["origin"] == str(folder) and content["meta"]["seed"] == 0


def test_the_file_depends_on_the_seed_and_not_on_the_processes(tmp_path, folder):
    files = {}
    for name, workers, seed in [("a", 1, 0), ("b", 2, 0), ("c", 0, 0), ("d", 1, 1)]:
        write_folder(folder, tmp_path / name, num_workers=workers, seed=seed)
        files[name] = (tmp_path / name).read_bytes()
    assert files["a"] == files["b"] == files["c"] != files["d"]


def test_pixels_and_callables_are_samples_too(tmp_path):
    samples = [
        Sample(picture(), 0),
        Sample(Image.fromarray(picture()), 1),
        Sample(partial(picture, 20, 30), 2),
        Sample(picture()[:, :, 0], 0),
    ]
    report = write_samples(samples, ["a", "b", "c"], tmp_path / "x", options=WriteOptions(num_workers=2))
    beton = open_beton(tmp_path / "x")
    assert report.num_samples == 4 and beton.heights[beton.labels == 2] == 20
    with pytest.raises(UserError, match="float64"):
        write_samples([Sample(np.zeros((4, 4, 3)), 0)], ["a"], tmp_path / "y")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no images"):
        write_samples([], ["a"], tmp_path / "y")


# ---------------------------------------------------------------- bad images


@pytest.fixture
def damaged(folder):
    """Four files of the folder are replaced by unreadable ones."""
    good = (folder / "ant" / "0.png").read_bytes()
    buffer = io.BytesIO()
    Image.fromarray(picture(300, 300)).save(buffer, "JPEG")
    (folder / "ant" / "1.png").write_bytes(good[: len(good) // 2])
    (folder / "ant" / "2.png").write_bytes(b"")
    (folder / "bée" / "3.png").write_text("<html>not found</html>")
    (folder / "zebra" / "cut.jpg").write_bytes(buffer.getvalue()[:-2000])
    Image.fromarray(np.full((4, 4), -1, np.float32)).save(folder / "zebra" / "f.tif")
    return folder


@pytest.mark.parametrize("workers", [1, 2])
def test_unreadable_images_stop_the_write_and_are_counted(tmp_path, damaged, workers):
    out = tmp_path / "x.beton"
    with pytest.raises(UserError, match="5 of 17 images cannot be read, first") as caught:
        write_folder(damaged, out, num_workers=workers)
    assert str(damaged / "ant" / "1.png") in str(caught.value) and "--skip-bad" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if "beton" in p.name]


def test_unreadable_images_are_skipped_when_asked(tmp_path, damaged):
    out = tmp_path / "x.beton"
    report = write_folder(damaged, out, skip_bad=True)
    names = [str(Path(path).relative_to(damaged)) for path, _ in report.skipped]
    assert names == ["ant/1.png", "ant/2.png", "bée/3.png", "zebra/cut.jpg", "zebra/f.tif"]
    assert all(reason for _, reason in report.skipped)
    beton = open_beton(out)
    assert report.num_samples == beton.num_samples == 12 and beton.identifiers.tolist() == list(range(12))
    assert [path for path, _ in json.loads(sidecar(out).read_text())["meta"]["skipped"]] == [
        p for p, _ in report.skipped
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_whatever_is_an_image_is_written_and_the_rest_counted(tmp_path, folder, workers, capsys):
    """Through the command line: suffixes, links, clutter, pipes, a loop, and a name that leads nowhere."""
    from dp4tl_dist.cli import main

    image = Image.fromarray(picture())
    for name in ("a.jfif", "b.jpe", "c.avif", "d.jp2", "e.tga", "F.PNG", "g.JPG"):
        image.save(folder / "ant" / name, {"a.jfif": "JPEG", "b.jpe": "JPEG"}.get(name))
    for name in ("none", "x.unknown"):
        image.save(folder / "ant" / name, "PNG")
    (folder / "ant" / "linked.png").symlink_to(folder / "zebra" / "0.png")
    for name in ("labels.json", "notes.md", ".DS_Store", "Thumbs.db"):
        (folder / "zebra" / name).write_text("{}")
    (folder / "zebra" / "@eaDir").mkdir()
    image.save(folder / "zebra" / "@eaDir" / "thumb.jpg")
    os.mkfifo(folder / "zebra" / "pipe.png")
    (folder / "zebra" / "up").symlink_to("..")
    argv = ["write", "--images", str(folder), "--out", str(tmp_path / "x.beton"), "--workers", str(workers)]
    assert main(argv) == 0
    assert open_beton(tmp_path / "x.beton").num_samples == 15 + 7 + 2 + 1
    told = capsys.readouterr().out.splitlines()[-1]
    # The fixture's own clutter: README, notes.txt, .hidden and .hidden.png.
    counts = {
        "not images (without suffix)": 1, "not images (.txt)": 1, "not images (.json)": 1, "not images (.md)": 1,
        "hidden": 3, "of the system (@eaDir, Thumbs.db, ...)": 2, "pipes, sockets or devices": 1,
        "folders met before by another link": 1,
    }  # fmt: skip
    assert told.startswith("left out: ") and all(f"{count} {reason}" in told for reason, count in counts.items())
    assert json.loads(sidecar(tmp_path / "x.beton").read_text())["meta"]["left_out"] == counts
    assert main(["info", str(tmp_path / "x.beton")]) == 0
    assert "pipes, sockets or devices: 1" in capsys.readouterr().out
    (folder / "bée" / "broken.png").symlink_to("gone")
    assert main([*argv, "--force"]) == 2
    assert "1 of 26 images cannot be read, first" in (line := capsys.readouterr().err) and "a broken link" in line
    assert main([*argv, "--force", "--skip-bad"]) == 0
    content = json.loads(sidecar(tmp_path / "x.beton").read_text())
    assert content["meta"]["skipped"] == [[str(folder / "bée" / "broken.png"), "a broken link"]]
    (folder / "cat").symlink_to("gone")
    assert main([*argv, "--force", "--skip-bad"]) == 2
    assert "cat is a broken link: mend it or remove it" in capsys.readouterr().err


def test_names_of_any_bytes_are_written_and_told(tmp_path, folder, capsys):
    from dp4tl_dist.cli import main

    place = os.fsencode(folder) + b"/caf\xe9"
    os.mkdir(place)  # noqa: PTH102 (a path of bytes)
    (folder / "ant" / "0.png").rename(os.fsdecode(place + b"/\xff.png"))
    with open(place + b"/\xfe.png", "wb"):
        pass
    argv = ["write", "--images", str(folder), "--out", str(tmp_path / "x.beton")]
    assert main(argv) == 2 and main([*argv, "--skip-bad"]) == 0
    assert os.fsencode(open_beton(tmp_path / "x.beton").classes[2]) == b"caf\xe9"
    assert main(["info", str(tmp_path / "x.beton")]) == 0
    assert json.loads(sidecar(tmp_path / "x.beton").read_text())["meta"]["skipped"][0][0].endswith("\udcfe.png")


def test_a_folder_of_nothing_readable_is_an_error_also_when_skipping(tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of 1"):
        write_folder(tmp_path / "in", tmp_path / "x", skip_bad=True)


# ---------------------------------------------------------------- bad folders, options and outputs


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: f.rename(f.with_name("away")), "is not a folder"),
        (lambda f: [p.rename(f.parent / p.name) for p in list(f.iterdir())], "no class folders"),
        (lambda f: (f / "empty").mkdir(), "empty holds no images"),
        (lambda f: (f / "ant" / "0.png").rename(f / "0.png"), "not in a class folder"),
    ],
)
def test_bad_folders(tmp_path, folder, spoil, words):
    spoil(folder)
    with pytest.raises(UserError, match=words):
        write_folder(folder, tmp_path / "x.beton")
    assert not (tmp_path / "x.beton").exists()


@pytest.mark.parametrize(
    "change", [{"max_side": -1}, {"max_side": 3}, {"quality": 0}, {"quality": 101}, {"seed": -1}, {"num_workers": -1}]
)
def test_bad_options(tmp_path, folder, change):
    with pytest.raises(UserError, match=next(iter(change))):
        write_folder(folder, tmp_path / "x.beton", **change)


def test_an_existing_output_is_kept_unless_forced(tmp_path, folder):
    out = tmp_path / "x.beton"
    out.write_text("precious")
    with pytest.raises(UserError, match="--force"):
        write_folder(folder, out)
    assert out.read_text() == "precious"
    write_folder(folder, out, force=True)
    assert open_beton(out).num_samples == 15


FOREIGN = {"json": b'{"mine": 1}', "rows": b"x,y\n1,2\n"}


@pytest.mark.parametrize("suffix", FOREIGN)
@pytest.mark.parametrize("content", ["as named", "empty", "other kind", "folder"])
def test_what_lies_in_the_place_of_a_betons_companion_is_kept_unless_forced(tmp_path, folder, suffix, content, capsys):
    out = tmp_path / "x.beton"
    path = tmp_path / f"x.beton.{suffix}"
    if content == "folder":
        path.mkdir()
    elif content == "other kind":
        save_npz(path, {"votes": np.arange(3)}, {"kind": "votes"})
    else:
        path.write_bytes(FOREIGN[suffix] if content == "as named" else b"")
    before = path.is_dir() or path.read_bytes()
    with pytest.raises(UserError, match=rf"x\.beton\.{suffix} (exists|is a folder)"):
        write_folder(folder, out)
    assert main(["write", "--images", str(folder), "--out", str(out)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert [item for item in tmp_path.iterdir() if item.suffix != ""] == [path]
    assert (path.is_dir() or path.read_bytes()) == before
    if content != "folder":
        write_folder(folder, out, force=True)
        assert load_rows(open_beton(out)) is not None


@pytest.mark.parametrize("left", [("rows",), ("json",), ("rows", "json")])
def test_what_a_killed_write_left_is_replaced_by_the_next(tmp_path, folder, left):
    """The beton comes last: until then its companions are there alone, of this write or of one with another seed."""
    out = tmp_path / "x.beton"
    write_folder(folder, out, seed=1)
    for path in (out, *(item for item in beside(out) if item.suffix[1:] not in left)):
        path.unlink()
    write_folder(folder, out)
    assert load_rows(open_beton(out)) is not None


def test_an_output_folder_that_cannot_be_made(tmp_path, folder):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the folder"):
        write_folder(folder, tmp_path / "file" / "x.beton")


def test_a_full_disk_leaves_nothing(tmp_path, folder, monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_folder(folder, tmp_path / "out" / "x.beton")
    assert list((tmp_path / "out").iterdir()) == []


def die(number):
    os.kill(os.getpid(), signal.SIGKILL)


def wait_long(note):
    note.write_text(str(os.getpid()))
    time.sleep(100)


def test_workers_end_with_a_killed_parent(tmp_path):
    script = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from dp4tl_dist.data.write import Sample, WriteOptions, write_samples\n"
        "from test_write import wait_long\n"
        "if __name__ == '__main__':\n"
        "    samples = [Sample(partial(wait_long, Path(sys.argv[1]) / 'pid'), 0)]\n"
        "    write_samples(samples, ['a'], Path(sys.argv[1]) / 'x', options=WriteOptions(num_workers=2))\n"
    )
    (tmp_path / "main.py").write_text(script)
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py"), str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}
    )
    pid = tmp_path / "pid"
    wait_for(lambda: pid.exists() and pid.read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: not alive(int(pid.read_text())))


def alive(pid):
    """Whether the process runs; one that nobody has waited for yet has ended too."""
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_dead_worker_fails_the_write_and_leaves_nothing(tmp_path):
    samples = [Sample(picture(), 0)] * 40 + [Sample(partial(die, 1), 0)]
    (tmp_path / "out").mkdir()
    with pytest.raises(RuntimeError, match="an encoding process died"):
        write_samples(samples, ["a"], tmp_path / "out" / "x", options=WriteOptions(num_workers=2))
    assert list((tmp_path / "out").iterdir()) == []
