"""A few hundred mutated files for every reader, the same ones each time; `run.py` makes the recorded run."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parent))

import fuzz_beton
import fuzz_engine
import torch
from fuzz_mutate import STAND_INS, VALUES, dumped
from fuzz_readers import READERS, STEP, Files, Reader
from run import NAMES

CASES = {"beton": 200, "checkpoint": 100, "report": 40}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Children are forked, and torch's threads would not be in them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_every_reader_has_a_name() -> None:
    assert tuple(READERS) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_mutated_files_are_read_or_refused_with_one_line(name: str, tmp_path: Path) -> None:
    result = fuzz_engine.fuzz(READERS[name], cases=CASES.get(name, 300), seed=4, folder=tmp_path)
    assert result.clean and result.read + result.refused == result.cases, result
    # The report leaves out what it cannot read, and refuses a run's config alone.
    assert result.read > 5 and (result.refused > 5 or name == "report"), (
        result
    )  # mutants that are all alike would show nothing


BAD = {"hang": "import time; time.sleep(60)", "crash": "import ctypes; ctypes.string_at(8)", "other": "1 / 0",
       "memory": "bytearray(3 << 30)", "text": "raise ValueError('two\\nlines')"}  # fmt: skip


@pytest.mark.parametrize("kind", BAD)
def test_the_engine_counts_what_goes_wrong(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 3 of ten goes wrong: it is counted and named, and the other nine are done."""
    monkeypatch.setattr(fuzz_engine, "SECONDS", 0.5)

    def read(folder: Path) -> Iterator[None]:
        if (folder / "x").read_bytes() == b"3":
            exec(BAD[kind])
        yield

    monkeypatch.setattr(fuzz_engine, "case", lambda reader, seeds, seed, index: {"x": b"%d" % index})
    reader = Reader("bad", lambda _: [{"x": b"seed"}], lambda _, files, others: files, read)
    result = fuzz_engine.fuzz(reader, cases=10, seed=0, folder=tmp_path, batch=100)
    counts = {"hang": result.hangs, "crash": result.crashes}
    assert counts.get(kind, result.other) == 1 and not result.clean
    assert result.findings[0]["case"] == 3
    assert result.hangs + result.crashes + result.other == 1 and result.read == 9


def test_guards_stop_reads_past_the_end(tmp_path: Path) -> None:
    """The memory that payloads are decoded from does what it is for."""

    def read(folder: Path) -> Iterator[None]:
        sources, _, _ = fuzz_beton.arena(0)
        offset = sources.place(0, 100, at_end=True)
        length = 101 if (folder / "x").read_bytes() == b"over" else 100
        bytes(sources.memory[offset : offset + length])
        yield

    for content, crashes in ((b"inside", 0), (b"over", 1)):
        reader = Reader("guard", lambda _: [{"x": b"seed"}], lambda *_, content=content: {"x": content}, read)
        assert fuzz_engine.fuzz(reader, cases=1, seed=0, folder=tmp_path).crashes == crashes


# ---------------------------------------------------------------- any JSON at all


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(STAND_INS)
    | st.sampled_from(VALUES),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)
JSON_FILES = {
    "train-config": "x.json", "run-config": "x.json", "record": "stages/x.json", "checkpoint": f"{STEP}/meta.json",
    "beton": "x.beton.json",
}  # fmt: skip


@pytest.fixture(scope="module", params=sorted(JSON_FILES))
def reader_and_seed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Reader, Files, Path]:
    reader, folder = READERS[request.param], tmp_path_factory.mktemp("json")
    (folder / "seeds").mkdir()
    return reader, next(s for s in reader.seeds(folder / "seeds") if JSON_FILES[reader.name] in s), folder / "case"


@settings(max_examples=40, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_json_is_read_or_refused(reader_and_seed: tuple[Reader, Files, Path], data: st.DataObject) -> None:
    reader, seed, folder = reader_and_seed
    name = JSON_FILES[reader.name]
    content = data.draw(JSON)
    known = json.loads(seed[name])
    if data.draw(st.booleans()):  # the real thing, with one other value
        content = {**known, data.draw(st.sampled_from(sorted(known))): content}
    folder.mkdir(exist_ok=True)
    outcomes = list(fuzz_engine.run_case(reader, {**seed, name: dumped(content)}, folder))
    assert outcomes[-1] in ("read", "refused")
