"""The path without labels, as one run of the demo's own config, shortened: clusters, votes, subset, MoCo, probe."""

import json
from pathlib import Path

import numpy as np
import pytest

from dp4tl_dist.cli import main
from dp4tl_dist.config import TrainConfig, load_config
from dp4tl_dist.prune.clusters_file import load_clusters
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.train.checkpoint import read_meta, resolve

SHORT = ("surrogate.train.epochs=1", "pretrain.train.epochs=1", "transfer.lp.epochs=2", "transfer.lp.peak_epoch=0",
         "clusters.count=12", 'arms=["fm@0.5"]', "engine.device=cpu", "seeds=[0]")  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo_without_labels(tmp_path: Path) -> None:
    out = tmp_path / "run"
    argv = ["run", "--config", "demo-ssl", "--out", str(out)]
    assert main([*argv, *(part for override in SHORT for part in ("--set", override))]) == 0
    clusters = load_clusters(out / "clusters" / "cluster.npz")
    with np.load(out / "subsets" / "fm@0.5-objects.npz") as subset:
        groups, indices = subset["groups"], subset["indices"]
    assert len(groups) == 6 and clusters.num_clusters == 12
    assert indices.tolist() == np.flatnonzero(np.isin(clusters.assignment, groups)).tolist()
    (row,) = json.loads((out / "results.json").read_text())
    assert row["samples"] == [len(indices)] and 0 < row["accuracy"]["lp"]["mean"] <= 100
    meta = read_meta(resolve(out / "pretrain" / "fm@0.5-objects-s0"))
    assert meta["num_samples"] == len(indices) and meta["config"]["task"]["kind"] == "moco"
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "Kept: the clusters with the most votes" in page and "12 source clusters" in page


def test_presets_are_the_published_recipe() -> None:
    config = load_config(TrainConfig, "moco-resnet101")
    moco, optim = config.task.moco, config.train
    assert (moco.queue, moco.momentum, moco.temperature, moco.dim) == (65_536, 0.999, 0.2, 128)
    assert (optim.epochs, optim.batch_size, optim.lr, optim.schedule) == (200, 256, 0.03, "cosine")
    demo = load_config(RunConfig, "demo-ssl")
    assert demo.surrogate.task.kind == demo.pretrain.task.kind == "moco" and demo.clusters.count
