"""A run of three epochs to be interrupted, and what may not depend on interruptions."""

from pathlib import Path
from typing import Any

from data_factory import make_beton

from dp4tl_dist.log import read_jsonl
from dp4tl_dist.train import checkpoint

TIMES = ("images_per_s", "data_wait", "seconds")
CONFIG = """
seed = 3
[data]
train = "{root}/train.beton"
val = "{root}/val.beton"
num_workers = 1
[model]
arch = "resnet_tiny"
[train]
epochs = 3
batch_size = {batch_size}
lr = 0.05
peak_epoch = 1
start_resolution = 8
resolution = 16
ramp_start = 0
ramp_end = 2
resolution_step = 8
val_resolution = 16
[engine]
device = "cpu"
timeout_s = 30
[log]
every = 4
tensorboard = false
order = true
[checkpoint]
every_minutes = 0
"""


def make_run(root: Path, *, batch_size: int) -> Path:
    """Betons of 124 and 20 samples, and a config.toml, in `root`, which is returned. A batch of 8
    leaves out an epoch's last 4."""
    make_beton(root / "train.beton", num_classes=4, per_class=31)
    make_beton(root / "val.beton", split="val", num_classes=4, per_class=5)
    (root / "config.toml").write_text(CONFIG.format(root=root, batch_size=batch_size))
    return root


def reached(out: Path) -> int:
    lines = read_jsonl(out / "order.jsonl")
    return lines[-1]["step"] if lines else 0


def facts(out: Path) -> tuple[bytes, list[dict[str, Any]], str]:
    """What may not depend on interruptions: final weights, metrics without times, order."""
    last = checkpoint.newest(out)
    assert last is not None and checkpoint.read_meta(last)["complete"]
    lines = [
        {key: value for key, value in line.items() if key not in TIMES} for line in read_jsonl(out / "metrics.jsonl")
    ]
    return (last / "weights.safetensors").read_bytes(), lines, (out / "order.jsonl").read_text()
