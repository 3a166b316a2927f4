"""The `[slurm]` table: whatever its strings hold, a batch script gets the options that were asked for, one a line."""

import importlib.util
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.slurm_config import SlurmConfig
from dp4tl_dist.stages import Graph

ROOT = Path(__file__).parents[1]
BASE = {"source": {"train": "synthetic:source/train"}, "arms": ["dense"],
        "targets": {"pets": {"train": "synthetic:target/train", "test": "synthetic:target/test"}}}  # fmt: skip
NAMES = {"partition": "partition", "account": "account", "qos": "qos", "constraint": "constraint", "memory": "mem"}
STRINGS = st.one_of(
    st.text(min_size=1, max_size=20),
    st.text("\n\r\x00\x0b\x85\u2028 #-=ab'\"\\$`;", min_size=1, max_size=20),
    st.sampled_from(["x\ntouch PWN\n#", "a b", "a' --wrap='b", "a\n#SBATCH --array=0-9", "x # y", "$(touch PWN)"]),
)


@cache
def submission() -> Any:
    """launch/submit.py, which is a script, as a module."""
    spec = importlib.util.spec_from_file_location("submit", ROOT / "launch" / "submit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(slurm: SlurmConfig) -> str:
    """The batch script of one stage."""
    graph = Graph(RunConfig(**BASE, slurm=slurm.model_dump()), Path("/runs/a"))  # type: ignore[arg-type]
    what = submission().Submission(graph, Path("/runs/a/config.json"), "code", None)
    return str(what.executor(next(iter(graph.stages.values())), "").text())


@settings(deadline=None)
@given(given_values=st.dictionaries(st.sampled_from(sorted(NAMES)), STRINGS),
       extras=st.dictionaries(st.one_of(STRINGS, st.from_regex(r"[a-z]{1,3}-[a-z]{1,3}", fullmatch=True)),
                              st.one_of(STRINGS, st.just(True), st.integers(0, 9)), max_size=3))  # fmt: skip
def test_strings_stay_in_their_option(given_values: dict[str, str], extras: dict[str, Any]) -> None:
    try:
        slurm = SlurmConfig(**given_values, extras=extras)  # type: ignore[arg-type]
    except ValidationError as error:
        assert "holds a line end" in str(error) or "extras: " in str(error)
        return
    plain, found = text(SlurmConfig()).split("\n"), text(slurm).split("\n")
    assert [line for line in plain if line not in found] == []
    told = {}
    for line in found:
        if line not in plain:
            mark, option = shlex.split(line)
            assert mark == "#SBATCH" and option.startswith("--")
            name, _, value = option.removeprefix("--").partition("=")
            told[name] = value
    mine = {NAMES[key]: value for key, value in given_values.items()} | extras
    assert told == {key: "" if value is True else str(value) for key, value in mine.items()}


@pytest.mark.parametrize(
    "key", ["", "comment\ntouch PWN", "mail type", "-x", "x-", "Comment", "a=b", "é", "array", "wrap"]
)
def test_odd_extras_are_refused(key: str) -> None:
    with pytest.raises(ValidationError, match="extras: "):
        SlurmConfig(extras={key: "x"})
    with pytest.raises(ValidationError, match="extras: "):
        SlurmConfig(stages={"write": {"extras": {key: "x"}}})  # type: ignore[dict-item]
