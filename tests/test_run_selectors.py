"""`dp4tl run` with a joint arm and a hybrid over two targets, through the real command line."""

from pathlib import Path

import numpy as np
import pytest
from data_factory import make_beton

from dp4tl_dist.cli import main
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.losses import NAME
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.files import read_json
from dp4tl_dist.prune.votes_file import load_votes

ARMS = ("lm@0.5", "lm-joint@0.5", "lm-joint+cld:0.5@0.25")
CONFIG = """
arms = {arms}
[source]
train = "{root}/source.beton"
val = "{root}/val.beton"
[targets.big]
train = "{root}/big.beton"
test = "{root}/big-test.beton"
[targets.small]
train = "{root}/small.beton"
test = "{root}/small-test.beton"
weight = 2
[surrogate.model]
arch = "resnet_tiny"
[surrogate.train]
epochs = 3
batch_size = 8
resolution = 16
[pretrain.model]
arch = "resnet_tiny"
[pretrain.train]
epochs = 1
batch_size = 4
resolution = 16
[transfer]
cached = true
[transfer.lp]
epochs = 1
batch_size = 4
[engine]
device = "cpu"
[log]
tensorboard = false
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_joint_and_hybrid_arms(tmp_path: Path) -> None:
    source = open_beton(make_beton(tmp_path / "source.beton", num_classes=6, per_class=8))
    make_beton(tmp_path / "val.beton", split="val", num_classes=6, per_class=2)
    for split, ending in (("train", ""), ("test", "-test")):
        make_beton(tmp_path / f"big{ending}.beton", kind="target", split=split, num_classes=2, per_class=9)
        make_beton(tmp_path / f"small{ending}.beton", kind="target", split=split, num_classes=3, per_class=3)
    (tmp_path / "run.toml").write_text(CONFIG.format(root=tmp_path, arms=list(ARMS)))
    out = tmp_path / "run"
    assert main(["run", "--config", str(tmp_path / "run.toml"), "--out", str(out)]) == 0

    # One subset for both targets, of the classes with the most votes of both, the small one's counting twice.
    joint = load_subset(out / "subsets" / "lm-joint@0.5.npz", beton=source)
    shares = [load_votes(out / "votes" / f"vote-lm-{name}.npz").votes[0] for name in ("big", "small")]
    total = shares[0] / 18 + 2 * shares[1] / 9
    assert sorted(total[joint.groups])[0] >= sorted(np.delete(total, joint.groups))[-1] - 1e-9
    # The hybrid keeps half of the samples of each of the same classes.
    hybrid = load_subset(out / "subsets" / "lm-joint+cld:0.5@0.25.npz", beton=source)
    assert hybrid.groups.tolist() == joint.groups.tolist() and hybrid.method == "lm+cld:0.5"
    assert set(hybrid.indices) < set(joint.indices) and len(hybrid.indices) == len(joint.indices) / 2 == 12
    assert (out / "surrogate" / NAME).is_file()

    # The table has each target's accuracy under the joint subset beside that under its own.
    rows = {(row["arm"], row["target"]): row for row in read_json(out / "results.json")}
    assert rows.keys() == {(arm, target) for arm in ARMS for target in ("big", "small")}
    assert all(0 <= row["accuracy"]["lp"]["mean"] <= 100 for row in rows.values())
    pretrained = sorted(item.name for item in (out / "pretrain").iterdir())
    assert pretrained == ["lm-joint+cld:0.5@0.25-s0", "lm-joint@0.5-s0", "lm@0.5-big-s0", "lm@0.5-small-s0"]
    page = (out / "report.html").read_text()
    assert all(arm in page for arm in ARMS)
