"""stdout and stderr that are closed, full or broken: what was asked for is done, or one line tells why not."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from data_factory import make_beton

from dp4tl_dist.children import python

FULL = Path("/dev/full")


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_beton(tmp_path_factory.mktemp("streams") / "a.beton")


def shell(text: str, beton: Path, folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run `text` in a shell, where $dp4tl is the command, $beton an input and $out a name for an output."""
    dp4tl = " ".join(python("dp4tl_dist"))
    environ = {**os.environ, "beton": str(beton), "out": str(folder / "out.npz")}
    line = ["bash", "-c", text.replace("$dp4tl", dp4tl)]
    return subprocess.run(line, env=environ, capture_output=True, text=True, cwd=folder, timeout=120)


PRUNE = "$dp4tl prune --source $beton --random classes --keep 0.5 --out $out"


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("text", "code", "errors"),
    [
        (f"{PRUNE} >/dev/full", 0, ["warning: stdout could not be written (No space left on device)"]),
        (f"{PRUNE} >&-", 0, []),
        (f"{PRUNE} <&- >&- 2>&-", 0, []),
        (f"{PRUNE} 2>/dev/full >/dev/full", 0, []),
        (f"{PRUNE} | true; exit ${{PIPESTATUS[0]}}", 0, []),
        ("$dp4tl info $beton | true; exit ${PIPESTATUS[0]}", 0, []),
        ("$dp4tl info $beton --json >&-", 0, []),
        ("$dp4tl info $beton >/dev/full", 2, ["dp4tl: error: stdout could not be written (No space left on device)"]),
        ("$dp4tl info nothing 2>/dev/full", 2, []),
        ("$dp4tl info nothing >&- 2>&-", 2, []),
        ("$dp4tl --help >/dev/full", 0, []),
    ],
)  # fmt: skip
def test_a_verb_ends_as_it_would(text: str, code: int, errors: list[str], beton: Path, tmp_path: Path) -> None:
    done = shell(text, beton, tmp_path)
    assert done.returncode == code, done.stderr
    told = done.stderr.splitlines()
    assert len(told) == len(errors) and all(line.startswith(start) for line, start in zip(told, errors, strict=True))
    if "--out" in text:
        again = shell("$dp4tl info $out --json", beton, tmp_path)
        assert again.returncode == 0 and '"subset"' in again.stdout


def test_a_reader_that_sets_the_pipe_not_to_block(beton: Path, tmp_path: Path) -> None:
    """As Node.js does: a full pipe is waited for."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    filled = 0
    while True:
        try:
            filled += os.write(writer, b"x" * 4096)
        except BlockingIOError:
            break
    process = subprocess.Popen([*python("dp4tl_dist"), "info", str(beton), "--json"], stdout=writer)
    os.close(writer)
    with open(reader, "rb") as stream:
        told = stream.read()[filled:]
    assert process.wait(30) == 0 and told.startswith(b"{") and told.endswith(b"}\n")
    assert signal.SIGPIPE


def test_files_do_not_get_the_descriptors_of_closed_streams(tmp_path: Path) -> None:
    """What a library writes to descriptor 1 would end up in whichever file was opened next."""
    program = (
        "from dp4tl_dist import streams; streams.keep(); import os\n"
        f"file = open({str(tmp_path / 'artefact')!r}, 'wb'); os.write(1, b'noise'); print('more'); file.close()"
    )
    done = subprocess.run(["bash", "-c", 'exec "$0" "$@" <&- >&- 2>&-', *python("x")[:1], "-c", program])
    assert done.returncode == 0 and (tmp_path / "artefact").read_bytes() == b""
