"""Checkpoints: weights, states and meta, with the digests made right again as who means ill would do."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from fuzz_formats import mutate_safetensors, mutate_state
from fuzz_mutate import mutate_json
from torch import nn

from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, make_meta
from dp4tl_dist.models import build_model
from dp4tl_dist.train import checkpoint

Files = dict[str, bytes]
STEP = "checkpoints/step_000000007"


def seeds(folder: Path) -> list[Files]:
    torch.manual_seed(0)
    model = build_model("resnet_tiny", 3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(3, 2))], lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["params"][0].grad = torch.ones(3, 2)
    optimizer.step()
    own = {"cpu_rng": torch.get_rng_state(), "buffers": {"a": torch.arange(4)}, "losses": [0.5, 1.5]}
    config = {"model": {"arch": "resnet_tiny"}, "train": {"resolution": 32, "val_resolution": 32, "val_ratio": 0.875}}
    meta = make_meta("checkpoint", config=config, seed=0) | {"classes": ["a", "b", "c"], "step": 7, "complete": True}
    state = {"optimizer": optimizer.state_dict(), "ranks": [own]}
    found = []
    for dtype, val in ((torch.float32, {"top1": 0.5}), (torch.bfloat16, {"top1": 0, "loss": 2.5})):
        weights = {name: t.to(dtype) if t.is_floating_point() else t for name, t in model.state_dict().items()}
        meta["val"] = val
        checkpoint.save(folder / STEP, weights=weights, state=state, meta=meta)
        found.append({f"{STEP}/{item.name}": item.read_bytes() for item in sorted((folder / STEP).iterdir())})
    return found


def mutate(rng: Random, files: Files, others: list[Files]) -> Files:
    """One of the three files; mostly with the digests made right again, as who means ill would do."""
    name = rng.choice(sorted(files))
    change = {".json": mutate_json, ".pt": mutate_state, ".safetensors": mutate_safetensors}[Path(name).suffix]
    changed = {**files, name: change(rng, files[name], [other[name] for other in others])}
    changed["changed"] = Path(name).suffix.encode()
    if rng.random() < 0.8:
        changed["resign"] = b""
    return changed


def resign(step: Path) -> None:
    """Make the digests of a checkpoint right again, where its meta can be read."""
    with contextlib.suppress(ValueError, RecursionError):
        meta = json.loads((step / "meta.json").read_bytes())
        if isinstance(meta, dict):
            meta["digests"] = {name: digest_file(step / name) for name in checkpoint.FILES}
            meta["digest"] = checkpoint.digest_meta(meta)
            (step / "meta.json").write_text(json.dumps(meta))


def read(folder: Path) -> Iterator[None]:
    step = folder / STEP
    if (folder / "resign").exists():
        resign(step)
    changed = (folder / "changed").read_text() if (folder / "changed").exists() else ""
    # What a change cannot have touched is left out: reading all of it takes three times as long.
    parts: dict[Callable[[], Any], str] = {
        lambda: checkpoint.resolve(step): ".pt .json",
        lambda: checkpoint.best(folder): ".json",
        lambda: checkpoint.load_model(folder): ".json .safetensors",
        lambda: _check_state(checkpoint.load_state(step)): ".pt",
        lambda: _check_weights(checkpoint.load_weights(step)): ".safetensors",
    }
    errors: list[UserError] = []
    for part in (part for part, suffixes in parts.items() if changed in suffixes):
        try:
            part()
        except UserError as error:
            errors.append(error)
        yield
    if errors:
        raise errors[0]


def _check_weights(weights: dict[str, torch.Tensor]) -> None:
    """Touch every byte of every tensor: one that lies about its size would read elsewhere."""
    for tensor in weights.values():
        tensor.view(-1).clone()


def _check_state(state: Any) -> None:
    """As `_check_weights`, for every tensor of a nest of lists and tables."""
    assert isinstance(state, dict)
    stack: list[Any] = [state]
    for _ in range(1000):
        if not stack:
            return
        item = stack.pop()
        if isinstance(item, torch.Tensor) and item.layout == torch.strided and item.numel() < 1 << 20:
            if not item.is_meta:
                item.clone().contiguous().view(-1).tolist()
        elif isinstance(item, dict | list | tuple):
            stack.extend(item.values() if isinstance(item, dict) else item)
