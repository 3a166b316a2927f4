"""The results of a tiny run of each verb: they change only together with the verb's number in `revisions.RESULTS`.

The inputs of every verb but `write` are a run folder of 0.1 (fixtures/run-0.1.tar.xz), so a change in one verb does not
show in another. Counts, orders, draws and bytes are held exactly: they are the same on every processor. What follows
from sums of floats is held with a tolerance, which is wider than processors differ and narrower than what another
resize, view or recipe does.

A test here failed, and the change was meant? Raise the number of each verb that it names, then

    python tests/test_revisions.py

measures anew, and writes the values of those verbs (it refuses where a number was not raised).
"""

import contextlib
import hashlib
import io
import json
import sys
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import load_npz, read_json, save_npz
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.revisions import FORMATS, RESULTS

FIXTURES = Path(__file__).parent / "fixtures"
HELD = FIXTURES / "results.json"
TOLERANCE = 2e-3
"""Relative to the value, or to 1 where it is smaller."""
Values = dict[str, Any]
VIEW = "--resolution", "24", "--workers", "1", "--device", "cpu"
SMALL = {
    "model": {"arch": "resnet_tiny"},
    "train": {"epochs": 2, "peak_epoch": 1, "batch_size": 8, "lr": 0.005, "resolution": 24, "val_resolution": 24},
    "engine": {"device": "cpu"},
}


def unpacked(place: Path) -> Path:
    """The run folder of 0.1, in `place`."""
    with tarfile.open(FIXTURES / "run-0.1.tar.xz") as archive:
        archive.extractall(place, filter="data")
    return place / "run"


def dp4tl(*argv: object) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        assert main([str(item) for item in argv]) == 0, argv


def configured(place: Path, **tables: Any) -> Path:
    path = place / "config.json"
    path.write_text(json.dumps(tables))
    return path


def rounded(values: Any) -> list[float]:
    return [float(f"{value:.6g}") for value in np.ravel(np.asarray(values, np.float64))]


def content(path: Path) -> str:
    """A digest of all that a beton holds of its samples, in their order."""
    beton, digest = open_beton(path), hashlib.blake2b(digest_size=16)
    for column in (beton.labels, beton.identifiers, beton.heights, beton.widths, beton.modes):
        digest.update(np.ascontiguousarray(column, np.int64).tobytes())
    for index in range(beton.num_samples):
        digest.update(beton.payload(index))
    return digest.hexdigest()


# ---------------------------------------------------------------- what each verb makes


def write(run: Path, place: Path) -> Values:
    for label, mode in enumerate(("RGB", "L", "RGBA")):
        (place / "images" / f"class{label}").mkdir(parents=True)
        for i, (side, name) in enumerate([(40, "a.png"), (90, "b.png"), (30, "c.jpg")]):
            pixels = np.random.default_rng([label, i]).integers(0, 256, (side // 4, side // 5, 4), np.uint8)
            image = Image.fromarray(pixels, "RGBA").resize((side, side - 7), Image.Resampling.BICUBIC)
            image.convert("RGB" if name.endswith("jpg") else mode).save(place / "images" / f"class{label}" / name)
    dp4tl("write", "--images", place / "images", "--out", place / "o.beton", "--max-side", 64, "--workers", 1)
    return {"content": content(place / "o.beton")}


def train(run: Path, place: Path) -> Values:
    data = {"train": str(run / "data/source-train.beton"), "val": str(run / "data/source-train.beton")}
    config = configured(place, data=data, log={"order": True, "tensorboard": False, "every": 1}, **SMALL)
    dp4tl("train", "--config", config, "--out", place / "model")
    lines = read_jsonl(place / "model" / "metrics.jsonl")
    epochs = [line for line in lines if line["kind"] == "epoch"]
    return {
        "order": [line["identifiers"] for line in read_jsonl(place / "model" / "order.jsonl")],
        "losses": rounded([line["loss"] for line in lines if line["kind"] == "step"]),
        "rates": rounded([line["lr"] for line in lines if line["kind"] == "step"]),
        "validation": rounded([line["val_loss"] for line in epochs]),
    }


def cluster(run: Path, place: Path) -> Values:
    given = ("--surrogate", run / "surrogate", "--source", run / "data/source-train.beton", "--clusters", 3)
    dp4tl("cluster", *given, "--out", place / "c.npz", *VIEW)
    found, _ = load_npz(place / "c.npz", "clusters")
    return {"assignment": found["assignment"].tolist(), "start": found["start"].tolist(),
            "distances": rounded(found["distances"]), "inertia": rounded(found["inertia"])}  # fmt: skip


def vote(run: Path, place: Path) -> Values:
    values: Values = {}
    given = ("--surrogate", run / "surrogate", "--target", run / "data/small-train.beton")
    for method, more in (("lm", ()), ("fm", ("--source", run / "data/source-train.beton"))):
        dp4tl("vote", "--method", method, *given, *more, "--out", place / f"{method}.npz", *VIEW)
        found, _ = load_npz(place / f"{method}.npz", "votes")
        values |= {f"{method} votes": found["votes"].tolist(), f"{method} affinity": rounded(found["affinity"])}
    return values


def score(run: Path, place: Path) -> Values:
    values: Values = {}
    given = ("--surrogate", run / "surrogate", "--source", run / "data/source-train.beton")
    for method in ("el2n", "grand", "moderate", "herding", "k-centre", "retrieval"):
        target = ("--target", run / "data/small-train.beton") if method == "retrieval" else ()
        dp4tl("score", "--method", method, *given, *target, "--out", place / f"{method}.npz", *VIEW)
        values[method] = rounded(load_npz(place / f"{method}.npz", "scores")[0]["scores"])
    return values


def prune(run: Path, place: Path) -> Values:
    votes, moderate = run / "votes/vote-lm-small.npz", run / "scores/score-moderate.npz"
    ways: dict[str, tuple[object, ...]] = {
        "votes": ("--votes", votes, "--keep", 0.5), "auto": ("--votes", votes, "--keep", "auto"),
        "coverage": ("--votes", votes, "--coverage", 0.4), "reverse": ("--votes", votes, "--keep", 0.25, "--reverse"),
        "clusters": ("--votes", run / "votes/vote-fm-small.npz", "--keep", 0.34),
        "scores": ("--scores", moderate, "--keep", 0.3), "classes": ("--random", "classes", "--keep", 0.5),
        "samples": ("--random", "samples", "--keep", 0.3), "balanced": ("--random", "balanced", "--keep", 0.4),
        "within": ("--votes", votes, "--keep", 0.5, "--within-class", f"{moderate}:0.5"),
    }  # fmt: skip
    values = {}
    for name, given in ways.items():
        out = place / f"{name}.npz"
        dp4tl("prune", "--source", run / "data/source-train.beton", *given, "--out", out)
        values[name] = load_npz(out, "subset")[0]["indices"].tolist()
    return values


def compact(run: Path, place: Path) -> Values:
    given = ("--source", run / "data/source-train.beton", "--subset", run / "subsets/lm@0.5-small.npz")
    dp4tl("compact", *given, "--seed", 3, "--out", place / "o.beton")
    return {"content": content(place / "o.beton")}


def transfer(run: Path, place: Path) -> Values:
    values: Values = {}
    given = ("--checkpoint", run / "surrogate", "--train", run / "data/small-train.beton",
             "--test", run / "data/small-test.beton")  # fmt: skip
    tables = {"train": {**SMALL["train"], "batch_size": 4}, "engine": SMALL["engine"], "log": {"tensorboard": False}}
    for mode, more in (("lp", ()), ("ff", ())):
        out = place / f"{mode}.json"
        dp4tl("transfer", *given, "--mode", mode, "--config", configured(place, **tables), "--out", out, *more)
        result = read_json(out)
        lines = read_jsonl(place / f"{mode}.json.run" / "metrics.jsonl")
        values[f"{mode} counts"] = [result[key] for key in ("num_train", "num_val", "num_test")]
        values[f"{mode} losses"] = rounded([line["loss"] for line in lines if line["kind"] == "epoch"])
        values[f"{mode} test"] = rounded([result["loss"]])
    return values


def influence(run: Path, place: Path) -> Values:
    files = {"source": str(run / "data/source-train.beton"), "target": str(run / "data/small-train.beton")}
    probe = {"epochs": 1, "batch_size": 2, "resolution": 24, "val_resolution": 24}
    config = configured(place, **files, masks=6, lp=probe, **SMALL)
    dp4tl("influence", "--config", config, "--out", place / "i.npz")
    found, _ = load_npz(place / "i.npz", "influence")
    store = place / "i.npz.run"
    return {"masks": found["masks"].astype(int).tolist(), "rows": len(list((store / "rows").iterdir()))}


MEASURES: dict[str, Callable[[Path, Path], Values]] = {
    "write": write, "train": train, "cluster": cluster, "vote": vote, "score": score, "prune": prune,
    "compact": compact, "transfer": transfer, "influence": influence,
}  # fmt: skip


def differing(held: Values, found: Values) -> list[str]:
    """What of a verb's values is not as it was."""
    return [key for key in sorted(held.keys() | found.keys()) if not alike(held.get(key), found.get(key))]


def alike(held: Any, found: Any) -> bool:
    if isinstance(held, list) and any(isinstance(value, float) for value in held):
        return isinstance(found, list) and found == pytest.approx(held, rel=TOLERANCE, abs=TOLERANCE)
    return bool(held == found)


# ---------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpacked(tmp_path_factory.mktemp("old"))


def test_every_verb_that_makes_files_is_held() -> None:
    held = read_json(HELD)
    assert MEASURES.keys() == RESULTS.keys() == held["numbers"].keys() == held["values"].keys()


@pytest.mark.parametrize("verb", MEASURES)
def test_results_change_with_their_number_alone(verb: str, run: Path, tmp_path: Path) -> None:
    held = read_json(HELD)
    changed = differing(held["values"][verb], MEASURES[verb](run, tmp_path))
    assert not changed, f"the results of {verb} changed ({', '.join(changed)}): see the head of this file"
    assert held["numbers"][verb] == RESULTS[verb], "a number was raised: see the head of this file"


@pytest.mark.parametrize("kind", ["votes", "subset", "scores", "clusters"])
def test_a_file_of_a_later_format_is_refused(tmp_path: Path, kind: str) -> None:
    save_npz(tmp_path / "a.npz", {"x": np.arange(2)}, {"kind": kind, "format": FORMATS[kind] + 1})
    with pytest.raises(UserError, match="later dp4tl"):
        load_npz(tmp_path / "a.npz", kind)


def refresh() -> int:
    """Measure all, and write what changed under a raised number."""
    held = read_json(HELD) if HELD.exists() else {"numbers": {}, "values": {}}
    with tempfile.TemporaryDirectory() as scratch:
        run = unpacked(Path(scratch))
        for verb, measure in MEASURES.items():
            place = Path(scratch) / verb
            place.mkdir()
            found, raised = measure(run, place), held["numbers"].get(verb) != RESULTS[verb]
            changed = differing(held["values"].get(verb, {}), found)
            if changed and not raised:
                print(f"{verb}: {', '.join(changed)} changed, and its number is {RESULTS[verb]} as before: raise it")
                return 1
            if raised:
                held["numbers"][verb], held["values"][verb] = RESULTS[verb], found
    lines = [f' "{verb}": {json.dumps(values)}' for verb, values in held["values"].items()]
    HELD.write_text(f'{{"numbers": {json.dumps(held["numbers"])},\n"values": {{\n' + ",\n".join(lines) + "\n}}\n")
    return 0


if __name__ == "__main__":
    sys.exit(refresh())
