"""The embedded dataset is honest: a surrogate's votes find the classes that resemble the target; chance does not."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dp4tl_dist.cli import main
from dp4tl_dist.config import load_config
from dp4tl_dist.data.synthetic import RECIPES, related_classes
from dp4tl_dist.prune.select import random_choice
from dp4tl_dist.run_config import RunConfig

RELATED = set(related_classes().tolist())
NUM_CLASSES = len(RECIPES["source"])
BAR = 0.8


def dp4tl(*argv: object) -> None:
    assert main([str(item) for item in argv]) == 0


def found(groups: "set[int]") -> float:
    """The share of the related classes that a choice keeps."""
    return len(RELATED & groups) / len(RELATED)


@pytest.mark.timeout(300)
def test_lm_keeps_the_related_classes(tmp_path: Path) -> None:
    """The demo's own surrogate, half as long, on its fixed seed, at keep = the related classes' share."""
    demo = load_config(RunConfig, "demo")
    for kind, split in (("source", "train"), ("target", "train")):
        dp4tl("write", "--synthetic", f"{kind}/{split}", "--out", tmp_path / f"{kind}.beton", "--max-side", 0)
    config = {
        "seed": 0,
        "data": {"train": str(tmp_path / "source.beton"), "min_scale": demo.surrogate.min_scale},
        "model": demo.surrogate.model.model_dump(),
        "train": {**demo.surrogate.train.model_dump(), "epochs": demo.surrogate.train.epochs // 2},
        "log": {"tensorboard": False},
        "engine": {"device": "cpu"},
    }
    (tmp_path / "surrogate.json").write_text(json.dumps(config))
    dp4tl("train", "--config", tmp_path / "surrogate.json", "--out", tmp_path / "surrogate")
    dp4tl("vote", "--method", "lm", "--surrogate", tmp_path / "surrogate", "--target", tmp_path / "target.beton",
          "--device", "cpu", "--out", tmp_path / "votes.npz")  # fmt: skip
    dp4tl("prune", "--source", tmp_path / "source.beton", "--votes", tmp_path / "votes.npz",
          "--keep", len(RELATED) / NUM_CLASSES, "--out", tmp_path / "subset.npz")  # fmt: skip
    with np.load(tmp_path / "subset.npz") as subset:
        kept = set(subset["groups"].tolist())
    assert len(kept) == len(RELATED)
    assert found(kept) >= BAR


def test_a_random_choice_fails_the_same_check() -> None:
    shares = [found(set(random_choice(NUM_CLASSES, len(RELATED), seed=seed).tolist())) for seed in range(50)]
    assert max(shares) < BAR
    assert math.isclose(float(np.mean(shares)), len(RELATED) / NUM_CLASSES, abs_tol=0.05)
