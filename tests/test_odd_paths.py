"""Spaces, quotes, unicode and line ends in paths and class names, through the real command line."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.cli import build_parser, main
from dp4tl_dist.config import validate
from dp4tl_dist.data.beton import open_beton, sidecar
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.plan import check_plan
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph

ODD = ("two  spaces", "quo'te\"s", "é 日本 \U0001f600", "line\nend\x1b[31m", "$HOME `x` *?[0] {a} %s \\n", "-dash=#,;")
CLASSES = ("ant\nbee", "c'a\"t", "dôg \u2028", " wasp [0]")


def run(*argv: object) -> int:
    return main([str(item) for item in argv])


@pytest.mark.parametrize("name", ODD)
def test_odd_paths(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / name
    for label, class_name in enumerate(CLASSES):
        folder = place / "images" / class_name
        folder.mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng([label, i]).integers(0, 255, (24, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{name[:4].strip()} {i}.png")
    source, subset, config = (place / f"{name}.{suffix}" for suffix in ("beton", "npz", "toml"))
    out, listed = place / f"run {name}", place / f"{name}.txt"
    config.write_text(
        f"[data]\ntrain = {json.dumps(str(source), ensure_ascii=False)}\n"
        '[model]\narch = "resnet_tiny"\n[log]\ntensorboard = false\n[engine]\ndevice = "cpu"\n'
        "[train]\nepochs = 1\npeak_epoch = 0.5\nbatch_size = 4\nresolution = 32\nval_resolution = 32\n"
    )
    assert run("write", "--images", place / "images", "--out", source, "--workers", 1) == 0
    assert sorted(open_beton(source).classes) == sorted(CLASSES)
    assert run("prune", "--source", source, "--random", "classes", "--keep", 0.5, "--out", subset) == 0
    assert run("train", "--config", config, "--subset", subset, "--out", out) == 0
    listed.write_text("# two\n0\n3\n")
    assert run("prune", "--source", source, "--list", listed, "--out", place / "listed.npz") == 0
    assert load_subset(place / "listed.npz", beton=open_beton(source)).groups.tolist() == [0, 3]
    capsys.readouterr()
    for path in (source, subset, out):
        assert run("info", path) == 0
        shown = capsys.readouterr().out
        assert shown.replace("\n", "").isprintable() and all(":" in line for line in shown.splitlines())
        assert run("info", path, "--json") == 0
        assert Path(json.loads(capsys.readouterr().out)["path"]) == path
    refused_in_one_line(place, source, config, capsys)


@pytest.mark.slow
def test_odd_paths_of_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """vote, compact, transfer, run and report, in folders of that name."""
    name = f"{ODD[0]} {ODD[1]} {ODD[3]} \x7f"
    place = tmp_path / name
    for split, per_class in (("train", 8), ("test", 4)):
        for label, class_name in enumerate(CLASSES):
            folder = place / split / class_name
            folder.mkdir(parents=True)
            for i in range(per_class):
                pixels = np.random.default_rng([label, i]).integers(0, 255, (24, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    small = {"epochs": 1, "peak_epoch": 0, "batch_size": 4, "resolution": 32, "val_resolution": 32}
    table = {"model": {"arch": "resnet_tiny"}, "train": small}
    config = {
        "source": {"train": str(place / "train")}, "arms": ["lm@0.5", "fm@0.5"], "compact": True, "surrogate": table,
        "pretrain": table, "transfer": {"lp": small}, "engine": {"device": "cpu"}, "log": {"tensorboard": False},
        "targets": {"pets": {"train": str(place / "train"), "test": str(place / "test")}},
    }  # fmt: skip
    (place / f"{name}.json").write_text(json.dumps(config))
    out = place / f"run {name}"
    assert run("run", "--config", place / f"{name}.json", "--out", out) == 0
    result = json.loads(next((out / "transfer").glob("*.json")).read_text())
    assert 0 <= result["top1"] <= 1 and (out / "report.html").stat().st_size > 10_000
    source, target, votes = (
        out / "data" / "source-train.beton",
        out / "data" / "pets-train.beton",
        place / f"{name}.npz",
    )
    assert run("vote", "--method", "lm", "--surrogate", out / "surrogate", "--target", target, "--out", votes) == 0
    subset = place / f"subset {name}.npz"
    assert run("prune", "--source", source, "--votes", votes, "--keep", 0.5, "--out", subset) == 0
    assert run("compact", "--source", source, "--subset", subset, "--out", place / f"small {name}.beton") == 0
    assert run("report", out) == run("info", out) == 0
    capsys.readouterr()
    assert run("vote", "--method", "lm", "--surrogate", place / "no\nne", "--target", target, "--out", votes) == 2
    error = capsys.readouterr().err
    assert error[:-1].isprintable() and error.startswith("dp4tl: error: ")


@pytest.mark.parametrize("name", ["-imgs", "--imgs", "--out", "-1", "-", "--", "- x"])
def test_names_that_look_like_options(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of folders, betons and the run's own: stages are given paths that their command lines take for paths."""
    monkeypatch.chdir(tmp_path)
    for folder in (f"{name}s", f"{name}t"):
        for label in range(2):
            (tmp_path / folder / f"c{label}").mkdir(parents=True)
            for i in range(8):
                Image.new("RGB", (24, 24 + i), (90 * label, 10 * i, 0)).save(Path(folder, f"c{label}", f"{i}.png"))
    beton = tmp_path / f"{name}.beton"
    assert run("write", "--images", tmp_path / f"{name}s", "--out", beton, "--quality", 50, "--workers", 1) == 0
    stage = {"model": {"arch": "resnet_tiny"}, "train": {"batch_size": 4, "resolution": 32}}
    content = {
        "source": {"train": f"{name}s", "val": f"{name}t"}, "engine": {"device": "cpu"}, "surrogate": stage,
        "targets": {"t": {"train": f"{name}t", "test": f"{name}.beton"}}, "pretrain": stage, "compact": True,
        "arms": ["lm@0.5", "retrieval@0.5", "influence@0.5", "random@0.5"],
        "influence": {**stage, "masks": 12, "train": {"batch_size": 4, "resolution": 32, "steps": 1}},
    }  # fmt: skip
    graph = Graph(validate(RunConfig, content, source="test"), Path(f"{name}R"))
    check_plan(graph, ranks=lambda stage: 1)
    parser, places = build_parser(), {path.absolute() for path in (tmp_path / f"{name}s", tmp_path / f"{name}t", beton)}
    for made in graph.stages.values():
        given = vars(parser.parse_args(made.working_argv))
        assert given["out"].absolute().is_relative_to(tmp_path / f"{name}R")
        paths = [path for value in given.values() for path in (value if isinstance(value, list) else [value])]
        for path in [path.absolute() for path in paths if isinstance(path, Path) and path != Path("data")]:
            assert path in places or path.is_relative_to(tmp_path / f"{name}R"), made.argv


def test_other_names_are_handed_on_as_they_are(tmp_path: Path) -> None:
    """Stages are known by their command lines: a run of before is still done."""
    content = {"source": {"train": "a/-b"}, "targets": {"t": {"train": "c.beton", "test": "../d"}}}
    graph = Graph(validate(RunConfig, content, source="test"), Path("run"))
    assert graph.out == Path("run") and graph.targets["t"][0] == Path("c.beton")
    assert [stage.argv[2] for stage in graph.stages.values() if stage.argv[0] == "write"] == ["a/-b", "../d"]


@pytest.mark.parametrize("part", ["-x/train", "--x", "--out", "-"])
def test_a_part_of_the_embedded_dataset_that_looks_like_an_option(
    tmp_path: Path, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["run", "--config", "demo", "--set", f"source.train=synthetic:{part}", "--out", tmp_path / "r", "--dry-run"]
    assert run(*argv) == 2
    assert "write-source-train: the embedded dataset has no part" in capsys.readouterr().err


def refused_in_one_line(place: Path, source: Path, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Errors that name these paths take one printable line, whatever is in the paths."""
    gone, broken = place / "none\n.beton", place / "images" / CLASSES[0] / "broken\n.png"
    broken.write_bytes(b"no image")
    sidecar(source).write_text("[]")
    for argv in (
        ("info", gone),
        ("info", source),
        ("write", "--images", gone, "--out", place / "x.beton"),
        ("write", "--images", place / "images", "--out", place / "x.beton"),
        ("write", "--images", place / "images", "--out", source),
        ("prune", "--source", gone, "--random", "classes", "--keep", 0.5, "--out", place / "x.npz"),
        ("prune", "--source", source, "--random", "classes", "--keep", 0.5, "--out", place / "x.npz"),
        ("train", "--config", gone, "--out", place / "x"),
        ("train", "--config", config, "--set", "seed=a\nb", "--out", place / "x"),
        ("train", "--config", config, "--subset", gone, "--out", place / "x"),
        ("run", "--config", gone, "--out", place / "x"),
        ("odd\nverb",),
    ):
        assert run(*argv) == 2
        error = capsys.readouterr().err
        assert error.endswith("\n") and error[:-1].isprintable() and error.startswith("dp4tl: error: "), error
