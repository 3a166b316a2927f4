"""Bad input through the command line: exit code 2, one line naming the place and the remedy, nothing half-written."""

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dp4tl_dist.cli import main

Run = Callable[..., str]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small datasets with the same kinds of classes, a surrogate trained on the first, its votes and a subset."""
    root = tmp_path_factory.mktemp("world")
    for name, num_classes, shade in (("source", 4, 0), ("other", 3, 90)):
        for label in range(num_classes):
            folder = root / f"{name}-images" / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(6):
                pixels = np.random.default_rng([label, i, shade]).integers(0, 255, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels // 2 + shade).save(folder / f"{i}.png")
        done("write", "--images", root / f"{name}-images", "--out", root / f"{name}.beton", "--workers", 1)
    done("train", "--config", tiny(root), "--out", root / "surrogate")
    done("vote", "--method", "lm", "--surrogate", root / "surrogate", "--target", root / "other.beton",
         "--out", root / "votes.npz")  # fmt: skip
    done("prune", "--source", root / "source.beton", "--votes", root / "votes.npz", "--keep", 0.5,
         "--out", root / "subset.npz")  # fmt: skip
    return root


def tiny(root: Path, **overrides: object) -> Path:
    """A config that trains in a second on the first dataset."""
    text = f'[data]\ntrain = {json.dumps(str(root / "source.beton"))}\n[model]\narch = "resnet_tiny"\n'
    text += "[train]\nepochs = 1\npeak_epoch = 0.5\nbatch_size = 8\nresolution = 32\nval_resolution = 32\n"
    text += '[log]\ntensorboard = false\n[engine]\ndevice = "cpu"\n'
    path = root / "tiny.toml"
    path.write_text(text)
    return path


def done(*argv: object) -> None:
    assert main([str(item) for item in argv]) == 0


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command that must be refused, and check that tmp_path holds the same files as before; its one line."""

    def run(*argv: object, names: str = "", untouched: Path | None = None) -> str:
        place = untouched or tmp_path
        before = {path: path.stat().st_size for path in place.rglob("*")}
        capsys.readouterr()
        code = main([str(item) for item in argv])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2, lines
        assert len(lines) == 1 and "Traceback" not in lines[0], lines
        assert str(names) in lines[0], lines[0]
        assert {path: path.stat().st_size for path in place.rglob("*")} == before
        return lines[0]

    return run


# ---------------------------------------------------------------- images


def test_missing_and_empty_folder(refused: Run, tmp_path: Path) -> None:
    refused("write", "--images", tmp_path / "none", "--out", tmp_path / "x.beton", names="none")
    (tmp_path / "empty").mkdir()
    refused("write", "--images", tmp_path / "empty", "--out", tmp_path / "x.beton", names="empty")


def test_class_folder_without_images(refused: Run, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "source-images", tmp_path / "images")
    (tmp_path / "images" / "hollow").mkdir()
    refused("write", "--images", tmp_path / "images", "--out", tmp_path / "x.beton", names="hollow")


def test_unreadable_image(refused: Run, world: Path, tmp_path: Path) -> None:
    shutil.copytree(world / "source-images", tmp_path / "images")
    bad = tmp_path / "images" / "class1" / "3.png"
    bad.write_bytes(bad.read_bytes()[:300])
    line = refused("write", "--images", tmp_path / "images", "--out", tmp_path / "x.beton", names="3.png")
    assert "skip-bad" in line


@pytest.mark.parametrize("option", [("--quality", 0), ("--quality", 101), ("--max-side", -1)])
def test_options_out_of_range(refused: Run, world: Path, tmp_path: Path, option: tuple[str, int]) -> None:
    refused("write", "--images", world / "source-images", "--out", tmp_path / "x.beton", *option, names=str(option[1]))


# ---------------------------------------------------------------- betons


@pytest.mark.parametrize("kind", ["truncated", "foreign", "version", "empty"])
def test_damaged_beton(refused: Run, world: Path, tmp_path: Path, kind: str) -> None:
    content = bytearray((world / "source.beton").read_bytes())
    content[0:2] = b"\x09\x00" if kind == "version" else content[0:2]
    kinds = {"truncated": content[: len(content) // 2], "foreign": b"PK\x03\x04" + bytes(5000), "empty": b""}
    bad = tmp_path / "bad.beton"
    bad.write_bytes(kinds.get(kind, content))
    for argv in (
        ("info", bad),
        ("train", "--config", tiny(world), "--set", f"data.train={bad}", "--out", tmp_path / "run"),
        ("prune", "--source", bad, "--random", "classes", "--keep", 0.5, "--out", tmp_path / "x.npz"),
    ):
        refused(*argv, names="bad.beton")


def test_subset_and_votes_of_another_beton(refused: Run, world: Path, tmp_path: Path) -> None:
    other, subset, votes = world / "other.beton", world / "subset.npz", world / "votes.npz"
    line = refused(
        "prune", "--source", other, "--votes", votes, "--keep", 0.5, "--out", tmp_path / "x.npz", names=votes
    )
    assert "other.beton" in line
    line = refused("compact", "--source", other, "--subset", subset, "--out", tmp_path / "x.beton", names=subset)
    assert "other.beton" in line
    refused("train", "--config", tiny(world), "--set", f"data.train={other}", "--subset", subset,
            "--out", tmp_path / "run", names=subset)  # fmt: skip


# ---------------------------------------------------------------- amounts


@pytest.mark.parametrize("keep", ["0", "1.5", "nan", "-0.1", "inf"])
def test_keep_out_of_range(refused: Run, world: Path, tmp_path: Path, keep: str) -> None:
    refused("prune", "--source", world / "source.beton", "--votes", world / "votes.npz", f"--keep={keep}",
            "--out", tmp_path / "x.npz", names="keep")  # fmt: skip


def test_keep_classes_above_the_count(refused: Run, world: Path, tmp_path: Path) -> None:
    for count in (5, 0, -1):
        refused("prune", "--source", world / "source.beton", "--votes", world / "votes.npz", f"--keep-classes={count}",
                "--out", tmp_path / "x.npz", names="keep-classes")  # fmt: skip


def test_batch_larger_than_the_subset(refused: Run, world: Path, tmp_path: Path) -> None:
    refused("train", "--config", tiny(world), "--subset", world / "subset.npz", "--set", "train.batch_size=20",
            "--out", tmp_path / "run", names="batch_size 20")  # fmt: skip


def test_batch_not_divisible_by_the_ranks(world: Path, tmp_path: Path) -> None:
    """Through launch/torchrun.sh: it ends with the exit code of the rank that failed first, and says nothing more."""
    script = Path(__file__).parents[1] / "launch" / "torchrun.sh"
    command = [
        script,
        "-n",
        "2",
        "train",
        "--config",
        tiny(world),
        "--set",
        "train.batch_size=9",
        "--out",
        tmp_path / "run",
    ]
    done = subprocess.run([str(item) for item in command], capture_output=True, text=True, timeout=200)
    lines = [line for line in done.stderr.splitlines() if line.startswith("dp4tl: ")]
    assert done.returncode == 2 and len(lines) == 1, done.stderr
    assert "batch_size 9 is not divisible by 2 ranks" in lines[0]
    assert done.stderr.splitlines()[-1].startswith("dp4tl: error: train.batch_size 9")
    assert not (tmp_path / "run").exists()


def test_odd_amounts_on_the_command_line(refused: Run, world: Path, tmp_path: Path) -> None:
    source = ("prune", "--source", world / "source.beton", "--out", tmp_path / "x.npz")
    refused(*source, "--votes", world / "votes.npz", "--keep", "half", names="half")
    refused(*source, "--random", "classes", names="keep")
    refused(*source, "--random", "classes", "--coverage", 0.9, names="coverage")
    refused(*source, "--keep", 0.5)
    refused("frobnicate", names="frobnicate")


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("train.epoch=4", "epochs"),
        ("trainer.epochs=4", "train"),
        ("train.lr=-1", "train.lr"),
        ("train.lr=nan", "train.lr"),
        ("model.arch=resnet19", "resnet18"),
        ("train.optimizer=lion", "train.optimizer"),
        ("train", "train"),
        ("seed=-1", "seed"),
        ("train.peak_epoch=7", "peak_epoch"),
    ],
)
def test_bad_config_values(refused: Run, world: Path, tmp_path: Path, override: str, names: str) -> None:
    refused("train", "--config", tiny(world), "--set", override, "--out", tmp_path / "run", names=names)


def test_toml_syntax_and_missing_config(refused: Run, tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train]\nepochs = = 4\n")
    line = refused("train", "--config", tmp_path / "bad.toml", "--out", tmp_path / "run", names="bad.toml")
    assert "line 2" in line
    refused("train", "--config", tmp_path / "none.toml", "--out", tmp_path / "run", names="none.toml")
    refused("run", "--config", "no-such-preset", "--out", tmp_path / "run", names="demo")


def test_cuda_asked_for_and_absent(refused: Run, world: Path, tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused("train", "--config", tiny(world), "--set", "engine.device=cuda", "--out", tmp_path / "run", names="CUDA")


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_of_another_architecture(refused: Run, world: Path, tmp_path: Path) -> None:
    init = f"model.init={json.dumps(str(world / 'surrogate'))}"
    refused("train", "--config", tiny(world), "--set", init, "--set", "model.arch=resnet18",
            "--out", tmp_path / "run", names="architecture")  # fmt: skip
    refused("train", "--config", tiny(world), "--set", init, "--set", f"data.train={world / 'other.beton'}",
            "--out", tmp_path / "run", names="number of classes")  # fmt: skip


def test_what_is_no_checkpoint(refused: Run, world: Path, tmp_path: Path) -> None:
    vote = ("vote", "--method", "lm", "--target", world / "other.beton", "--out", tmp_path / "v.npz", "--surrogate")
    refused(*vote, tmp_path / "none", names="none")
    refused(*vote, world / "source-images", names="source-images")
    broken = tmp_path / "broken"
    shutil.copytree(next((world / "surrogate" / "checkpoints").iterdir()), broken)
    weights = broken / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refused(*vote, broken, names="broken")


# ---------------------------------------------------------------- outputs


def test_existing_output_without_force(refused: Run, world: Path, tmp_path: Path) -> None:
    for command, suffix in (
        (("write", "--images", world / "source-images"), ".beton"),
        (("prune", "--source", world / "source.beton", "--random", "classes", "--keep", 0.5), ".npz"),
        (("compact", "--source", world / "source.beton", "--subset", world / "subset.npz"), ".beton"),
        (("vote", "--method", "lm", "--surrogate", world / "surrogate", "--target", world / "other.beton"), ".npz"),
    ):
        out = tmp_path / f"there{suffix}"
        out.write_text("mine")
        refused(*command, "--out", out, names="--force")
        assert out.read_text() == "mine"
        done(*command, "--out", out, "--force")
        assert out.read_bytes() != b"mine"


def test_run_folder_with_foreign_files(refused: Run, world: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    refused("train", "--config", tiny(world), "--out", tmp_path / "run", names="--force")


def test_a_config_in_the_folder_of_the_run_stays(refused: Run, world: Path, tmp_path: Path) -> None:
    """A run keeps its config under a name that one's own may have."""
    own = tmp_path / "exp" / "config.json"
    own.parent.mkdir()
    source = {"train": str(world / "source.beton")}
    own.write_text(json.dumps({"data": source, "model": {"arch": "resnet_tiny"}, "train": {
        "epochs": 1, "peak_epoch": 0, "batch_size": 8, "resolution": 32, "val_resolution": 32}}))  # fmt: skip
    refused("train", "--config", own, "--out", own.parent, names="--force")
    refused("train", "--config", own, "--out", own.parent, "--force", names=own)
    own.write_text(json.dumps({"source": source, "targets": {"t": {"train": str(world / "other.beton"),
                                                                  "test": str(world / "other.beton")}}}))  # fmt: skip
    refused("run", "--config", own, "--out", own.parent, "--dry-run", names=own)


def test_output_folder_that_cannot_be_written(refused: Run, world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    place = tmp_path / "file" / "below"
    refused("write", "--images", world / "source-images", "--out", place / "x.beton", names="file")
    refused("train", "--config", tiny(world), "--out", place, names="file")
    refused("prune", "--source", world / "source.beton", "--random", "classes", "--keep", 0.5,
            "--out", place / "x.npz", names="file")  # fmt: skip
