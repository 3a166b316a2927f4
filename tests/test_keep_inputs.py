"""With --force, too, no verb replaces what it reads: under its own name, through a link, or as a part of it."""

import json
import os
import shutil
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
READ = [
    *((PRUNE, beton) for beton in (SOURCE, TARGET)), *((VOTE, beton) for beton in (SOURCE, TARGET)),
    *((SCORE, beton) for beton in (SOURCE, TARGET)),
    (("cluster", "--surrogate", MODEL, "--source", SOURCE, "--clusters", "2"), SOURCE),
    (COMPACT, SOURCE), *((TRANSFER, beton) for beton in (TARGET, "run/data/small-test.beton")),
    *((("influence", "--config", "influence.json"), beton) for beton in (SOURCE, TARGET)),
]  # fmt: skip
"""Every beton that a verb reads."""
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
    *((COMPACT, out) for out in (SOURCE, SUBSET)),
    *((TRANSFER, out) for out in (TARGET, "run/data/small-test.beton", META)),
    (("influence", "--config", "influence.json"), SOURCE),
    (("influence", "--config", "influence.json"), TARGET),
    (TRAIN, MODEL),
    *((argv, f"{beton}{suffix}") for suffix in (".json", ".rows") for argv, beton in READ),
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
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    if out.endswith(".rows"):  # a run of 0.1 has none; what they say does not matter here
        Path(out).write_bytes(b"rows")
        request.addfinalizer((place / out).unlink)
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


@pytest.mark.parametrize("given", ["run", "checkpoint"])
def test_what_a_link_in_a_checkpoint_leads_to_is_an_input(
    place: Path, given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As caches of models have them: a folder of names, and the files elsewhere."""
    monkeypatch.chdir(place)
    shutil.copytree(MODEL, tmp_path / "model")
    (folder,) = (tmp_path / "model" / "checkpoints").iterdir()
    elsewhere = tmp_path / "blob"
    (folder / "state.pt").rename(elsewhere)
    (folder / "state.pt").symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    surrogate = tmp_path / "model" if given == "run" else folder
    argv = ["vote", "--method", "fm", "--surrogate", surrogate, "--target", TARGET, "--source", SOURCE]
    assert main([*map(str, argv), "--out", str(elsewhere), "--force"]) == 2
    assert "is an input as well" in capsys.readouterr().err and elsewhere.read_bytes() == before


def test_the_classes_of_what_a_link_leads_to_are_an_input(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (tmp_path / "link.beton").symlink_to(place / SOURCE)
    argv = ["prune", "--source", str(tmp_path / "link.beton"), "--random", "classes", "--keep", "0.5"]
    assert main([*argv, "--out", f"{SOURCE}.json", "--force"]) == 2
    assert "is an input as well" in capsys.readouterr().err


def test_what_prune_makes_beside_is_no_input_either(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    (place / "o.val.npz").write_bytes((place / SUBSET).read_bytes())
    argv = ["prune", "--source", SOURCE, "--votes", VOTES, "--like", "o.val.npz", "--apply-to", TARGET]
    assert main([*argv, "--out", "o.npz", "--force"]) == 2
    assert "is an input as well" in capsys.readouterr().err
    (place / "o.val.npz").unlink()
