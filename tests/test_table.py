"""The table of a run shows what its rows hold."""

import json
from pathlib import Path
from typing import Any

import pytest

from dp4tl_dist.table import write_table


def row(arm: str, **more: Any) -> dict[str, Any]:
    accuracy = {"lp": {"mean": 47.125, "std": None, "values": [47.125]}}
    return {"arm": arm, "target": "pets", "seeds": [0], "samples": [10], "pretrain_s": 3.0, "selection_s": 1.0,
            "total_s": 4.0, "speed_up": None, "accuracy": accuracy, **more}  # fmt: skip


@pytest.mark.parametrize("robust", [True, False])
def test_robust_accuracy_has_a_column_where_it_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], robust: bool
) -> None:
    more = {"robust": {"lp": {"mean": 29.25, "std": 1.5, "values": [27.75, 30.75]}}} if robust else {}
    rows = [row("dense", **more), row("lm@0.5", **more)]
    write_table(rows, tmp_path)
    text = (tmp_path / "results.txt").read_text()
    assert ("lp robust %" in text) == robust == (text.count("29.25 +- 1.50") == 2)
    assert text.count("47.12") == 2 and text in capsys.readouterr().out
    assert json.loads((tmp_path / "results.json").read_text()) == rows
