"""Inputs that are no plain files, and configs of any shape: refused at once in one line, or read in bounded time."""

import json
import os
import shutil
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from data_factory import make_beton
from hypothesis import given, settings
from hypothesis import strategies as st

from dp4tl_dist.cli import main
from dp4tl_dist.config_file import apply_overrides, find_config, read_toml
from dp4tl_dist.errors import UserError
from dp4tl_dist.inputs import MAX_PARTS, parse_toml, read_text, tomllib
from dp4tl_dist.models import build_model
from dp4tl_dist.train import checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A beton, a config of a training, and a checkpoint."""
    place = tmp_path_factory.mktemp("inputs")
    make_beton(place / "a.beton")
    (place / "train.toml").write_text(f'[data]\ntrain = "{place}/a.beton"\n[model]\narch = "resnet_tiny"\n')
    meta = {
        "kind": "checkpoint",
        "config": {"model": {"arch": "resnet_tiny"}},
        "classes": list("abcd"),
        "complete": True,
    }
    weights = build_model("resnet_tiny", 4).state_dict()
    checkpoint.save(place / "checkpoint", weights=weights, state={"step": torch.zeros(1)}, meta=meta)
    return place


def fifo(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def at_a_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()  # a socket's path is short
        os.chdir(path.parent)
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def folder(path: Path) -> None:
    path.mkdir()


READERS: dict[str, Callable[[Path, Path], list[object]]] = {
    "x.beton": lambda odd, place: ["info", odd],
    "x.npz": lambda odd, place: ["info", odd],
    "x.json": lambda odd, place: ["info", odd],
    "x.toml": lambda odd, place: ["train", "--config", odd, "--out", place / "out"],
    "y.json": lambda odd, place: ["run", "--config", odd, "--out", place / "out"],
    "z.toml": lambda odd, place: ["sweep", "--config", odd, "--out", place / "out"],
    "list.txt": lambda odd, place: ["prune", "--source", place / "a.beton", "--list", odd, "--out", place / "out.npz"],
    "v.npz": lambda odd, place: [
        "prune", "--source", place / "a.beton", "--votes", odd, "--keep", "0.5", "--out", place / "out.npz"
    ],
    "s.npz": lambda odd, place: [
        "train", "--config", place / "train.toml", "--subset", odd, "--out", place / "out"
    ],
    "d.beton": lambda odd, place: [
        "prune", "--source", odd, "--random", "classes", "--keep", "1", "--out", place / "out.npz"
    ],
    "w.beton": lambda odd, place: [
        "train", "--config", place / "train.toml", "--set", f"data.train={odd}", "--out", place / "out"
    ],
    **{
        name: lambda odd, place: [
            "vote", "--method", "lm", "--surrogate", odd.parent, "--target", place / "a.beton", "--device", "cpu",
            "--out", place / "votes.npz",
        ]
        for name in ("weights.safetensors", "state.pt", "meta.json")
    },
}  # fmt: skip


@pytest.fixture
def _no_hang() -> Iterator[None]:
    """CPU time, which other processes do not change; what waits for ever meets pytest's own limit."""
    began = time.process_time()
    yield
    assert time.process_time() - began < 10  # a second


@pytest.mark.timeout(20)
@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("make", [fifo, device, at_a_socket, folder])
@pytest.mark.parametrize("name", READERS)
def test_only_plain_files_are_read(
    name: str, make: Callable[[Path], None], place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / name
    if name in ("weights.safetensors", "state.pt", "meta.json"):
        odd = tmp_path / "odd" / name
        shutil.copytree(place / "checkpoint", odd.parent)
        odd.unlink()
    make(odd)
    assert main([str(item) for item in READERS[name](odd, place)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(odd) in line or str(odd.parent) in line
    assert list(place.glob("out*")) == []


@pytest.mark.timeout(20)
@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("make", [fifo, device, at_a_socket, folder])
@pytest.mark.parametrize("verb", ["train", "run", "sweep", "influence"])
def test_a_config_in_the_folder_itself_that_is_no_file_is_no_unknown_preset(
    verb: str,
    make: Callable[[Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "mine")
    assert main([verb, "--config", "mine", "--out", "out"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "mine is a" in line and "and a file is needed here: check --config" in line
    assert not Path("out").exists()


def test_a_folder_does_not_stand_in_a_presets_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("demo").mkdir()
    assert find_config("demo").is_file()


# ---------------------------------------------------------------- texts


def test_a_byte_order_mark_is_no_letter(tmp_path: Path, place: Path) -> None:
    """Editors on Windows write one before the text."""
    config, listed, described = tmp_path / "a.toml", tmp_path / "a.txt", tmp_path / "a.json"
    config.write_text("a = 1\r\n", encoding="utf-8-sig")
    described.write_text(json.dumps({"a": 1}), encoding="utf-8-sig")
    assert read_toml(config) == read_toml(described) == {"a": 1}
    listed.write_text("class 2\r\n", encoding="utf-8-sig")
    line = ["prune", "--source", place / "a.beton", "--list", listed, "--out", tmp_path / "a.npz"]
    assert main([str(item) for item in line]) == 0 and main(["info", str(described)]) == 0
    assert read_text(listed, limit=100) == "class 2\r\n"
    with pytest.raises(OSError, match="larger than 3 bytes"):
        read_text(listed, limit=3)


N = 40_000
SHAPES = {
    "a key of many parts": ".".join("a" * N) + " = 1",
    "quoted parts": '"a".' * N + "a = 1",
    "a table of many parts": "[" + ".".join("a" * N) + "]",
    "many long tables": "".join(f"[{'a.' * 200}b{i}]\n" for i in range(2000)),
    "nested arrays": "a = " + "[" * N,
    "nested arrays, closed": "a = " + "[" * N + "]" * N,
    "nested tables": "a = " + "{a=" * N,
    "an array of tables": "a = [" + "{}," * N + "]",
    "many keys": "".join(f"k{i} = 1\n" for i in range(N)),
    "many tables": "".join(f"[t{i}]\n" for i in range(N)),
    "many arrays of tables": "[[t]]\n" * N,
    "long dotted keys": "".join(f"{'a.' * 40}k{i} = 1\n" for i in range(5000)),
    "open strings": 'a = """' + '"' * N,
    "escaped quotes": 'a = "' + '\\"' * N,
    "open literal": "a = '" * N,
    "open multi-line literals": "a = '''" + "x\n" * N,
    "comments": "#" * N + "\n" + "# '''\n" * N,
    "a long number": "a = " + "1" * N,
    "a long hexadecimal number": "a = 0x" + "f" * N,
    "a long float": "a = 1." + "0" * N + "e1",
    "a long array": "a = [" + "1, " * N + "]",
    "a long string": 'a = "' + "x.[{=" * N + '"',
    "odd dates": "a = " + "1979-05-27 " * N,
    "carriage returns": "\r" * N,
}  # fmt: skip


@pytest.mark.timeout(30)
@pytest.mark.usefixtures("_no_hang")
@pytest.mark.parametrize("shape", SHAPES)
def test_toml_of_any_shape_takes_bounded_time_and_memory(shape: str, tmp_path: Path) -> None:
    text = (SHAPES[shape] * (1 + (1 << 20) // len(SHAPES[shape])))[: 1 << 20]  # as long as a config may be
    for content in (SHAPES[shape], text):
        (tmp_path / "a.toml").write_text(content)
        began = time.process_time()
        tracemalloc.start()
        try:
            read_toml(tmp_path / "a.toml")
        except UserError as error:
            assert "is not valid TOML" in str(error) or "cannot read the config" in str(error)
        finally:
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
        assert time.process_time() - began < 6 and peak < 64 << 20, (shape, time.process_time() - began, peak)


PIECES = ('"""', "'''", "a = ", "[a.b]\n", 'x = "a.b.c"\n', "k = [1.5, {a = 1}]\n")
LETTERS = st.sampled_from([*"ab.=[]{},'\"#\n\\ 1-_", *PIECES])


@settings(max_examples=300, deadline=None)
@given(st.lists(LETTERS, max_size=60).map("".join))
def test_the_scan_changes_nothing_of_what_toml_says(text: str) -> None:
    """Small texts are never refused for their shape, and read as Python reads them."""
    try:
        expected = tomllib.loads(text)
    except (ValueError, RecursionError):
        with pytest.raises((ValueError, RecursionError)):
            parse_toml(text)
        return
    try:
        assert parse_toml(text) == expected
    except ValueError as error:
        assert "and a config has at most" in str(error) and (text.count(".") >= 16 or text.count("[") > 16)


BEFORE = (
    *('"""a"""', '"""a""""', '"""a"""""', '""""""', '"""""""', '""""""""', '"""\\""""', '"""\\\\""""', '"""\n"\n"""'),
    *("'''a'''", "'''a''''", "'''a'''''", "''''''", "'''''''", "''''''''", "'''\\'''", "'''\n'\n'''", "'''\"\"\"'''"),
    *('"""\'\'\'"""', '"""# """', '"""\\\r\n"""', "'\\'", "'\"'", "'#'", '"\'"', '"\\""', '"\\\\"', '"#"', '""', "''"),
    *("1 # '\n", '1 # """\n', "1 # \\\n", "{a.b = '''\n'''}", '"\\u0022"'),
)


@pytest.mark.parametrize("text", BEFORE)
def test_nothing_hides_the_parts_of_a_key(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is bounded is counted, whatever value stands before it: the parser is never given more."""
    assert tomllib.loads(f"x = [ {text}, {{a.a = 1}} ]")["x"][1] == {"a": {"a": 1}}, "it is a value"
    refuses_many_parts(text, monkeypatch)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.sampled_from([*"\"'\\#\n a", '"""', "'''"]), max_size=12).map("".join))
def test_no_value_of_any_quotes_hides_them(text: str) -> None:
    try:
        assert len(tomllib.loads(f"x = [ {text}, {{a.a = 1}} ]")["x"]) == 2
    except (ValueError, AssertionError):
        return
    with pytest.MonkeyPatch.context() as patch:
        refuses_many_parts(text, patch)


def refuses_many_parts(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tomllib, "loads", lambda text: pytest.fail("the parser was given it"))
    for many in (f"x = [ {text}, {{{'a.' * MAX_PARTS}a = 1}} ]", f"x = [ {text} ]\n[{'a.' * MAX_PARTS}a]"):
        with pytest.raises(ValueError, match=f"{MAX_PARTS + 1} parts of a key"):
            parse_toml(many)


def test_dots_in_strings_and_numbers_are_no_parts() -> None:
    text = (
        f'a = "{"x." * 500}"\nb = [{"1.5, " * 500}]\nc = """{"y." * 500}\n[{{="""\nd = \'{"z." * 99}\'  # {"." * 99}\n'
    )
    assert len(parse_toml(text)["b"]) == 500


def test_overrides_of_any_shape() -> None:
    for override in (f"{'a.' * 5000}a=1", f"a={'[' * 5000}", f"a={'{a=' * 5000}"):
        try:
            assert isinstance(apply_overrides({}, [override])["a"], str)
        except UserError as error:
            assert "is not of the form" in str(error)


LONG = "a" * 5000


@pytest.mark.parametrize(
    "line",
    [
        ["info", LONG],
        ["prune", "--source", LONG, "--random", "classes", "--keep", "0.5", "--out", "o.npz"],
        ["train", "--config", f"{LONG}.toml", "--out", "o"],
        ["write", "--images", LONG, "--out", "o.beton"],
        ["run", "--config", "demo", "--out", LONG, "--dry-run"],
    ],
    ids=lambda line: line[0],
)
def test_paths_longer_than_the_system_takes(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line) == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert "File name too long" in told and len(told) < 2100
