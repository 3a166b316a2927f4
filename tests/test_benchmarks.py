"""Each benchmark runs in its smallest form and prints JSON that says what it ought to."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight small images of two classes."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(8):
        path = folder / f"class{i % 2}" / f"{i}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(generator.integers(256, size=(40, 48, 3), dtype=np.uint8)).save(path)
    return folder


def start(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    script = root / "benchmarks" / command[0]
    return subprocess.run([sys.executable, str(script), *command[1:]], capture_output=True, text=True, cwd=root)


def result(root: Path, *command: str) -> dict[str, Any]:
    done = start(root, *command, "--runs", "2", "--warmup", "0", "--json")
    assert done.returncode == 0, done.stderr
    content: dict[str, Any] = json.loads(done.stdout)
    return content


def check(content: dict[str, Any], *, cases: list[list[str]]) -> None:
    assert [[row["name"] for row in found["rows"]] for found in content["comparisons"]] == cases
    for row in [row for found in content["comparisons"] for row in found["rows"]]:
        assert len(row["seconds"]) == 2 and 0 < row["min"] <= row["median"] <= row["max"]
        assert row["items_per_second"] == pytest.approx(row["items"] / row["median"])
        assert row["ratio_of_medians"] > 0 and row["median_of_pairwise_ratios"] > 0
    for found in content["comparisons"]:
        assert found["rows"][0]["ratio_of_medians"] == found["rows"][0]["median_of_pairwise_ratios"] == 1
    assert content["machine"]["cores"] > 0 and len(content["machine"]["load_at_end"]) == 3
    assert {"python", "numpy", "torch"} <= set(content["versions"])
    assert content["command"].startswith(f"python benchmarks/{content['name'].partition('-')[0]}.py ")
    assert len(content["source_hash"]) == 32 and set(content["git"]) == {"commit", "dirty"}


def test_order(root: Path):
    content = result(root, "order.py", "--samples", "3000", "--batch-size", "64", "--without", "ffcv")
    check(content, cases=[["dp4tl", "torch randperm"], ["dp4tl", "torch", "ffcv-like"], ["dp4tl"], ["dp4tl"]])


def test_votes(root: Path):
    sizes = ["--classes=10", "--dim=8", "--lm-targets=300", "--fm-targets=300", "--source=300", "--prune-samples=500"]
    content = result(root, "votes.py", *sizes, "--published-targets", "2", "--ranks", "2", "--threads", "1")
    three = ["dp4tl 2 ranks", "published", "plain"]
    check(content, cases=[three, three, three, ["dp4tl"]])


def test_selection_scale(root: Path):
    sizes = ["--samples=3000", "--targets=300", "--classes=20", "--dim=8"]
    content = result(root, "selection_scale.py", *sizes)
    rows = {row["name"]: row for row in content["comparisons"][0]["rows"]}
    stages = ("write", "open", "LM votes", "FM class means", "FM votes", "k-means step", "EL2N scores", "order")
    assert {*stages, "prune by votes", "compact"} <= set(rows)
    assert all(len(row["seconds"]) == 2 and row["min"] > 0 for row in rows.values())
    assert all(row["facts"]["peak MiB"] >= row["facts"]["of which new"] >= 0 for row in rows.values())
    assert rows["prune by votes"]["items"] == 3000 and rows["compact"]["items"] == 1200


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_train_step(root: Path):
    """Five processes that import torch."""
    one = ["--points", "resnet_tiny@32x4", "--variants", "dp4tl", "reference", "--steps", "1", "--device", "cpu"]
    content = result(root, "train_step.py", *one, "--engines", "ddp", "--ranks", "2")
    check(content, cases=[["dp4tl", "reference"], ["ddp"]])
    for row in [row for found in content["comparisons"] for row in found["rows"]]:
        assert row["items"] == 4 and row["facts"]["memory MiB"] > 0 and row["facts"]["TFLOP/s"] > 0
    assert content["skipped"] == {}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_engines(root: Path):
    content = result(root, "engines.py", "--point", "resnet_tiny@32x4", "--steps", "1", "--device", "cpu")
    check(content, cases=[["ddp", "zero0", "zero1", "zero2", "zero3"], ["plain", "fgsm", "pgd1", "pgd2", "pgd3"]])
    assert all("per attack step, x plain" in row["facts"] for row in content["comparisons"][1]["rows"][1:])


def test_train_step_refuses_what_it_does_not_know(root: Path):
    done = start(root, "train_step.py", "--points", "resnet18@large")
    assert done.returncode == 2 and "ARCH@SIDExBATCH" in done.stderr


def test_speedup(root: Path, images: Path):
    few = {"batch_size": 2, "epochs": 1, "resolution": 16, "peak_epoch": 0.5, "val_resolution": 16}
    sets = [f"--set={table}.train.{key}={value}" for table in ("pretrain", "surrogate", "reference")
            for key, value in few.items()]  # fmt: skip
    data = ["--source", str(images), "--target", str(images), "--set=pretrain.model.arch=resnet_tiny"]
    content = result(root, "speedup.py", *data, *sets, "--ratios", "50", "--device", "cpu")
    dense, half = content["ratios"]
    assert (dense["ratio"], dense["samples"]) == (0, 8) and (half["ratio"], half["samples"]) == (50, 4)
    assert dense["speed_up"] == 1 and dense["surrogate_s"] == dense["voting_s"] == 0
    assert half["total_s"] == half["surrogate_s"] + half["voting_s"] + half["pretrain_s"]
    assert half["speed_up"] == dense["pretrain_s"] / half["total_s"] and half["agreement"] in (0, 1)
    assert half["pretrain"]["n"] == 2 and half["epoch"]["n"] == 2
    assert half["reference_s"] > 0 and content["surrogates"]["reference"]["samples"] == 8


def test_compact(root: Path, images: Path):
    content = result(root, "compact.py", "--images", str(images), "--samples", "20")
    check(content, cases=[["compact", "write", "copy"]])


def test_checksums(root: Path, images: Path):
    sizes = ["--samples", "20", "--batch-size", "10", "--resolution", "32"]
    content = result(root, "checksums.py", "--images", str(images), *sizes)
    check(content, cases=[["without rows", "with rows"]] * 2)


OTHERS = ["torchvision", "dali", "streaming"]
LOADER = ["--samples", "16", "--batch-size", "4", "--resolution", "16", "--threads", "1"]


@pytest.mark.parametrize("part", ["epoch", "first"])
def test_loader(root: Path, images: Path, part: str):
    without = ["--without", "ffcv", *OTHERS]
    content = result(root, "loader.py", part, "--images", str(images), *LOADER, "--data", "compacted", *without)
    check(content, cases=[["dp4tl"]])


def test_loader_of_both_caches_and_the_share_of_waiting(root: Path, images: Path):
    more = ["--data", "subset", "--cache", "os", "process", "--step-ms", "5", "--without", *OTHERS, "ffcv"]
    content = result(root, "loader.py", "epoch", "--images", str(images), *LOADER, *more)
    check(content, cases=[["dp4tl", "dp4tl process-cache"]])
    assert all(0 < row["facts"]["data wait"] < 1 for row in content["comparisons"][0]["rows"])


@pytest.mark.slow
def test_loader_cold(root: Path, images: Path):
    """A process for each run."""
    more = ["--keep", "0.25", "--ways", "os", "process", "--runs", "1", "--warmup", "0", "--json"]
    done = start(root, "loader.py", "cold", "--images", str(images), *LOADER, *more)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["comparisons"]
    facts = {row["name"]: row["facts"] for row in found["rows"]}
    assert list(facts) == ["subset os", "subset process", "compacted os", "compacted process"]
    assert facts["subset process"]["asked / needed"] > facts["subset os"]["asked / needed"]  # whole pages, and none
    assert all(row["disk / needed"] >= 0 for row in facts.values())


@pytest.mark.slow
def test_loader_with_its_peers(root: Path, images: Path):
    """Stock FFCV compiles for several seconds."""
    content = result(root, "loader.py", "epoch", "--images", str(images), *LOADER, "--data", "subset")
    here = [peer for peer in ("dali",) if peer not in content["skipped"]]  # installed by hand alone
    check(content, cases=[["dp4tl", "ffcv", "torchvision", *here]])


@pytest.mark.parametrize("script", [["loader.py", "epoch"], ["compact.py"]], ids=lambda script: script[0])
def test_missing_images_are_one_line(root: Path, tmp_path: Path, script: list[str]):
    done = start(root, *script, "--images", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1 and "--images" in done.stderr


def test_gpu_script_keeps_to_its_budget(root: Path, tmp_path: Path):
    script, out = root / "benchmarks" / "gpu.sh", tmp_path / "results of a GPU"
    environ = {**os.environ, "BUDGET": "0"}
    done = subprocess.run([str(script), str(out)], capture_output=True, text=True, env=environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (out / "summary.txt").read_text().splitlines()
    assert lines[0].startswith("torch ") and done.stdout.endswith(f"results: {out}\n")
    assert [line.split()[0] for line in lines if "skipped" in line][:2] == ["doctor", "tests"]
    assert not list(out.glob("doctor*"))


def test_a_worker_that_dies_ends_the_benchmark(root: Path):
    code = "import harness; harness.Workers([['-c', 'raise SystemExit(3)']])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root / "benchmarks")
    assert done.returncode == 1 and "ended early" in done.stderr
