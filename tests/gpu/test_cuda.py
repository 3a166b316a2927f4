"""What only a GPU can show: bf16, compiled, channels-last training, pinned copies, NCCL, votes equal to the CPU's."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from dp4tl_dist.children import python
from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.loader import BetonLoader, CentreView, TrainView

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def dp4tl(*argv: object) -> None:
    assert main([str(item) for item in argv]) == 0


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded dataset, and a surrogate trained with every CUDA default: bf16, compile, channels last."""
    root = tmp_path_factory.mktemp("gpu")
    for part in ("source/train", "source/val", "target/train"):
        dp4tl("write", "--synthetic", part, "--out", root / f"{part.replace('/', '-')}.beton", "--max-side", 0)
    config = {
        "data": {"train": str(root / "source-train.beton"), "val": str(root / "source-val.beton"), "min_scale": 0.5},
        "model": {"arch": "resnet_tiny"},
        "train": {"epochs": 6, "batch_size": 64, "lr": 0.2, "resolution": 32, "val_resolution": 32},
        "log": {"tensorboard": False},
        "engine": {"device": "cuda"},
    }
    (root / "train.json").write_text(json.dumps(config))
    dp4tl("train", "--config", root / "train.json", "--out", root / "surrogate")
    return root


def test_training_learns(root: Path) -> None:
    lines = [json.loads(line) for line in (root / "surrogate" / "metrics.jsonl").read_text().splitlines()]
    epochs = [line for line in lines if line["kind"] == "epoch"]
    assert epochs[-1]["val_top1"] > 4 / 40 and epochs[-1]["loss"] < epochs[0]["loss"]


@pytest.mark.parametrize("view", [CentreView(32), TrainView(32, seed=1, epoch=2)])
def test_pixels_arrive_unchanged(root: Path, view: CentreView | TrainView) -> None:
    beton = open_beton(root / "source-train.beton")
    batches = [np.arange(i, i + 256) for i in range(0, 2048, 256)]
    there = [
        tuple(t.cpu() for t in batch)
        for batch in BetonLoader(beton, device="cuda:0", num_workers=2).epoch(batches, view)
    ]
    here = [tuple(t.clone() for t in batch) for batch in BetonLoader(beton).epoch(batches, view)]
    for a, b in zip(there, here, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_votes_agree_with_the_cpu(root: Path) -> None:
    for device in ("cuda", "cpu"):
        dp4tl("vote", "--method", "lm", "--surrogate", root / "surrogate", "--target", root / "target-train.beton",
              "--device", device, "--out", root / f"votes-{device}.npz")  # fmt: skip
    with np.load(root / "votes-cuda.npz") as cuda, np.load(root / "votes-cpu.npz") as cpu:
        # bf16 against fp32: a few images on the border between two classes may change sides.
        assert (cuda["predictions"] == cpu["predictions"]).mean() > 0.9
        assert cuda["votes"].sum() == cpu["votes"].sum()


def test_nccl_ranks(root: Path) -> None:
    """As many ranks as there are GPUs, at most two; one is enough for NCCL to start."""
    ranks = min(2, torch.cuda.device_count())
    command = python("dp4tl_dist.ranks", str(ranks), "train", "--config", str(root / "train.json"), "--set",
                     "train.epochs=2", "--out", str(root / "nccl"))  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
