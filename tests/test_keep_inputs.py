"""With --force, too, no verb replaces what it reads: under its own name, through a link, or as a part of it."""

import json
import os
from pathlib import Path

import pytest
from test_revisions import unpacked

from dp4tl_dist.cli import main

SOURCE, TARGET, VOTES = "run/data/source-train.beton", "run/data/small-train.beton", "run/votes/vote-lm-small.npz"
SUBSET, SCORES, MODEL = "run/subsets/lm@0.5-small.npz", "run/scores/score-moderate.npz", "run/surrogate"
META = "run/surrogate/checkpoints/step_000000006/meta.json"
PRUNE = ("prune", "--source", SOURCE, "--votes", VOTES, "--keep", "0.5", "--apply-to", TARGET)
VOTE = ("vote", "--method", "fm", "--surrogate", MODEL, "--target", TARGET, "--source", SOURCE)
SCORE = ("score", "--method", "retrieval", "--surrogate", MODEL, "--source", SOURCE, "--target", TARGET)
COMPACT = ("compact", "--source", SOURCE, "--subset", SUBSET)
TRANSFER = ("transfer", "--mode", "lp", "--checkpoint", MODEL, "--train", TARGET, "--test", "run/data/small-test.beton")
TRAIN = ("train", "--config", "train.json")
CASES = [
    (("write", "--images", "images"), "images/a/1.png"),
    *((PRUNE, out) for out in (SOURCE, VOTES, TARGET)),
    (("prune", "--source", SOURCE, "--scores", SCORES, "--keep", "0.5"), SCORES),
    ((*PRUNE[:-2], "--within-class", f"{SCORES}:0.5"), SCORES),
    (("prune", "--source", SOURCE, "--votes", VOTES, "--like", SUBSET), SUBSET),
    (("prune", "--source", SOURCE, "--list", "list.txt"), "list.txt"),
    *((VOTE, out) for out in (SOURCE, TARGET, META)),
    (("vote", "--method", "fm", "--surrogate", MODEL, "--target", TARGET, "--clusters", "run/clusters/cluster.npz"),
     "run/clusters/cluster.npz"),
    *((("cluster", "--surrogate", MODEL, "--source", SOURCE, "--clusters", "2"), out) for out in (SOURCE, META)),
    *((SCORE, out) for out in (SOURCE, TARGET, META)),
    *((COMPACT, out) for out in (SOURCE, SUBSET, f"{SOURCE}.json")),
    *((TRANSFER, out) for out in (TARGET, "run/data/small-test.beton", META)),
    (("influence", "--config", "influence.json"), SOURCE),
    (("influence", "--config", "influence.json"), TARGET),
    (TRAIN, MODEL),
]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("inputs")
    unpacked(place)
    (place / "images" / "a").mkdir(parents=True)
    (place / "images" / "a" / "1.png").write_bytes(b"png")
    (place / "list.txt").write_text("class0\n")
    small = {"model": {"arch": "resnet_tiny"}, "train": {"batch_size": 4, "resolution": 24, "val_resolution": 24},
             "engine": {"device": "cpu"}}  # fmt: skip
    influence = {**small, "source": SOURCE, "target": TARGET, "masks": 6}
    (place / "influence.json").write_text(json.dumps(influence))
    model = {"arch": "resnet_tiny", "init": MODEL}
    (place / "train.json").write_text(json.dumps({**small, "model": model, "data": {"train": SOURCE}}))
    return place


@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
@pytest.mark.parametrize(("argv", "out"), CASES, ids=[f"{argv[0]} {out}" for argv, out in CASES])
def test_an_output_that_is_an_input_is_refused(
    place: Path,
    argv: tuple[str, ...],
    out: str,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != ".lock"}
    given = Path(out)
    if how != "itself":
        given = Path("other" + given.suffix)
        given.unlink(missing_ok=True)
        if how == "hard link":
            inside = given.suffix == ".png" or "checkpoints" in out or Path(out).is_dir()
            if inside:
                return  # another name of a file inside an input folder: replacing it leaves the input whole
            os.link(out, given)
        else:
            given.symlink_to(Path(out).absolute())
    assert main([*argv, "--out", str(given), "--force"]) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(told) == 1 and "is an input as well" in told[0]
    if how != "itself":
        given.unlink()
    after = {path: path.read_bytes() for path in place.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before


def test_what_prune_makes_beside_is_no_input_either(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (place / "o.val.npz").write_bytes((place / SUBSET).read_bytes())
    argv = ["prune", "--source", SOURCE, "--votes", VOTES, "--like", "o.val.npz", "--apply-to", TARGET]
    assert main([*argv, "--out", "o.npz", "--force"]) == 2
    assert "is an input as well" in capsys.readouterr().err
    (place / "o.val.npz").unlink()
