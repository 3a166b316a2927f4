"""The run that `drill.py` disturbs: its inputs, how far it is, and what it ends with."""

import io
import json
import os
from pathlib import Path
from typing import Any

import harness  # noqa: F401 (this checkout's package, not an installed one)
from PIL import Image

from dp4tl_dist.data.beton import BetonWriter
from dp4tl_dist.data.synthetic import draw
from dp4tl_dist.log import read_jsonl
from dp4tl_dist.train import checkpoint

TIMES = ("images_per_s", "data_wait", "seconds")
STEPS_PER_EPOCH = 30


def write_inputs(folder: Path, *, epochs: int, ranks: int) -> Path:
    """Two tiny betons and the config of a run over them."""
    batch = 4 * ranks
    for name, per_class in (("train", STEPS_PER_EPOCH * batch // 4 + 1), ("val", 4)):
        with BetonWriter(folder / f"{name}.beton", capacity=4 * per_class) as writer:
            for i in range(4 * per_class):
                payload, pixels = io.BytesIO(), draw("source", "train", i % 4, i // 4)
                Image.fromarray(pixels).save(payload, "JPEG", quality=90)
                height, width = pixels.shape[:2]
                writer.add(payload.getvalue(), height=height, width=width, label=i % 4, identifier=i)
            writer.finish(["a", "b", "c", "d"], {})
    config = {
        "data": {"train": str(folder / "train.beton"), "val": str(folder / "val.beton"), "num_workers": 1},
        "model": {"arch": "resnet_tiny"},
        "train": {"epochs": epochs, "batch_size": batch, "peak_epoch": 1, "lr": 0.05, "resolution": 32,
                  "val_resolution": 32},
        "engine": {"device": "cpu", "timeout_s": 30},
        "log": {"every": 5, "tensorboard": False, "order": True},
        "checkpoint": {"every_minutes": 0.3 / 60},
    }  # fmt: skip
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


def last_step(out: Path) -> int:
    """The last step that order.jsonl tells of."""
    try:
        with open(out / "order.jsonl", "rb") as handle:
            handle.seek(max(0, handle.seek(0, os.SEEK_END) - 4096))
            lines = handle.read().split(b"\n")
        return int(json.loads(lines[-2])["step"])
    except (OSError, IndexError, ValueError):
        return 0


def file_number(out: Path) -> int:
    """Which file order.jsonl is; 0 while there is none."""
    path = out / "order.jsonl"
    return path.stat().st_ino if path.exists() else 0


def saved_step(out: Path) -> int:
    whole = [folder for folder in checkpoint.checkpoints(out) if checkpoint.is_whole(folder)]
    return int(whole[-1].name.partition("_")[2]) if whole else 0


def facts(out: Path) -> dict[str, Any]:
    """What may not depend on interruptions."""
    last = checkpoint.newest(out)
    assert last is not None
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if line["kind"] != "resume"]
    return {
        "weights": (last / "weights.safetensors").read_bytes(),
        "metrics": [{key: value for key, value in line.items() if key not in TIMES} for line in lines],
        "order": read_jsonl(out / "order.jsonl"),
    }
