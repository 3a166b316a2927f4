"""Checkpoints: a folder that is complete or absent, found again by the function that named it.

weights.safetensors   parameters and buffers by their plain names (buffers averaged over the ranks)
state.pt              optimizer, each rank's generator states and own buffers; read with weights_only=True
meta.json             everything else, and digests of the two files and of itself; written last
"""

import contextlib
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from dp4tl_dist.atomic import atomic_folder
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, read_json, unfinished_in
from dp4tl_dist.log import warn
from dp4tl_dist.models import build_model, head_name
from dp4tl_dist.revisions import check_format

NAME = re.compile(r"step_(\d{9})")
FILES = ("weights.safetensors", "state.pt")


def checkpoint_path(run: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies in a run folder."""
    return run / "checkpoints" / f"step_{step:09d}"


def save(folder: Path, *, weights: dict[str, Tensor], state: dict[str, Any], meta: dict[str, Any]) -> None:
    """Write one checkpoint, atomically. Called by one rank."""
    with atomic_folder(folder) as temporary:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        # Not by `save_file`, which stops all threads of Python for as long as a slow disk takes.
        (temporary / "weights.safetensors").write_bytes(safetensors_bytes(plain))
        with open(temporary / "state.pt", "wb") as handle:  # torch's own file does not tell that a disk is full
            torch.save(state, handle)
        meta = {**meta, "digests": {name: digest_file(temporary / name) for name in FILES}}
        meta |= {"digest": digest_meta(meta)}
        (temporary / "meta.json").write_text(json.dumps(meta, indent=2, sort_keys=True) + "\n")


def digest_meta(meta: dict[str, Any]) -> str:
    """blake2b of a checkpoint's meta without this digest itself."""
    content = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def read_meta(folder: Path) -> dict[str, Any]:
    """The meta of a checkpoint folder. A folder that is none, or a meta that was changed, is a UserError."""
    meta = read_json(folder / "meta.json") if (folder / "meta.json").is_file() else None
    if not isinstance(meta, dict) or meta.get("kind") != "checkpoint" or not isinstance(meta.get("digests"), dict):
        raise UserError(f"{folder} is not a checkpoint: pass a checkpoint folder or a run folder of `dp4tl train`")
    check_format(folder, "checkpoint", meta)
    try:
        found = digest_meta(meta)
    except (ValueError, RecursionError):  # what can be read and not written again was not written here
        found = ""
    if meta.get("digest", found) != found:
        raise UserError(f"{folder} is damaged (its meta.json was changed): use another checkpoint")
    return meta


def is_whole(folder: Path) -> bool:
    """Whether every file of the checkpoint has the content that its meta promises."""
    try:
        digests = read_meta(folder)["digests"]
        return all(digest_file(folder / name) == digests.get(name) for name in FILES)
    except (UserError, OSError):
        return False


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first, whole or not."""
    folder = run / "checkpoints"
    found = [item for item in folder.iterdir() if NAME.fullmatch(item.name)] if folder.is_dir() else []
    return sorted(found, key=lambda item: item.name)


def newest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, for the run itself to go on from; a torn one is skipped with a warning."""
    for folder in reversed(checkpoints(run)):
        if is_whole(folder):
            return folder
        warn(f"{folder} is torn or damaged: skipped")
    return None


def readable(run: Path) -> dict[Path, dict[str, Any]]:
    """The checkpoints of a run whose meta can be read, oldest first, each with its meta."""
    metas = {}
    for folder in checkpoints(run):
        with contextlib.suppress(UserError):  # `newest` has warned about a torn one
            metas[folder] = read_meta(folder)
    return metas


def prune_old(run: Path, *, keep: int, step: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one by validation accuracy; clear what a crash left.

    A checkpoint past `step`, where the run stands, is a torn one that the run went on from before.
    """
    metas = {folder: meta for folder, meta in readable(run).items() if folder <= checkpoint_path(run, step)}
    kept = {*list(metas)[-keep:], _first_best(metas)}
    for folder in [*(run / "checkpoints").glob(".*.tmp"), *(set(checkpoints(run)) - kept)]:
        shutil.rmtree(folder, ignore_errors=True)


def best(run: Path) -> Path:
    """The checkpoint of a run with the best validation; the first of equals, which every run has saved."""
    found = _first_best(readable(run))
    if found is None:
        raise UserError(f"{run} has no checkpoint with a validation accuracy: train it again")
    return found


def goodness(val: Any) -> tuple[float, float]:
    """What validations are compared by: accuracy, then loss, for small held-out sets tie often. Larger is better."""
    top1, loss = (val.get("top1"), val.get("loss")) if isinstance(val, dict) else (None, None)
    if not isinstance(top1, int | float):
        return -1.0, 0.0
    return float(top1), -float(loss) if isinstance(loss, int | float) else float("-inf")


def _first_best(metas: dict[Path, dict[str, Any]]) -> Path | None:
    scores = {folder: goodness(meta.get("val")) for folder, meta in metas.items()}
    scored = [folder for folder in scores if scores[folder][0] >= 0]
    return max(scored, key=lambda folder: scores[folder], default=None)


def resolve(path: Path, *, allow_incomplete: bool = False) -> Path:
    """The checkpoint that a user means: a checkpoint folder, or a run folder (its newest one).

    One that is damaged is a UserError, and so is one before its training's end unless `allow_incomplete`: whoever goes
    on from the checkpoint before is the run itself, for anyone else it would be another network.
    """
    folder, remedy = path, "use another checkpoint"
    if (path / "checkpoints").is_dir():
        found = checkpoints(path)
        if not found:
            raise UserError(f"{path} has no checkpoint yet: train it first")
        folder, remedy = found[-1], "train it again, which goes on from the checkpoint before"
    elif not path.is_dir():
        raise UserError(f"{path} is not there: it should be a checkpoint folder or a run folder of `dp4tl train`")
    if not is_whole(folder):
        if folder == path:
            read_meta(path)  # which may tell more
        raise UserError(f"{folder} is damaged (its files differ from its meta.json): {remedy}")
    if not allow_incomplete and (stand := standing(read_meta(folder))):
        raise UserError(
            f"{path} is not trained to its end ({stand}): finish its training, or use it as it is with "
            "--allow-incomplete (for model.init in a config: model.allow_incomplete = true)"
        )
    return folder


def standing(meta: dict[str, Any]) -> str:
    """Where a training stood that had not come to its end; "" where it had."""
    return "" if meta.get("complete") is True else f"step {meta.get('step')}"


def used_meta(folder: Path) -> dict[str, Any]:
    """The meta of a checkpoint for what is made from it: whether it came before its training's end is "unfinished"."""
    meta = read_meta(folder)
    stand = standing(meta)
    return {**meta, "unfinished": [*unfinished_in(meta), *([f"{folder} ({stand})"] if stand else [])]}


def load_weights(folder: Path) -> dict[str, Tensor]:
    try:
        return load_file(folder / "weights.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder / 'weights.safetensors'} is not readable ({error})") from error


def load_state(folder: Path) -> dict[str, Any]:
    """Optimizer and generator states. `weights_only` keeps torch from running code out of the file."""
    path = folder / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises many kinds on damaged files, with a page of advice; all mean the same here
        raise UserError(f"{path} is not readable ({type(error).__name__}): use another checkpoint") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__} and no states: use another checkpoint")
    return state


def load_into(model: nn.Module, folder: Path, *, fresh_head: bool = False) -> bool:
    """Fill `model` with a checkpoint's weights; another architecture or number of classes is a UserError.

    A checkpoint of self-supervised training has no head: with `fresh_head` the model's own is left as it is, and the
    result is False.
    """
    weights = fitting_weights(model, folder, fresh_head=fresh_head)
    model.load_state_dict(weights, strict=not fresh_head)
    return weights.keys() == model.state_dict().keys()


def fitting_weights(model: nn.Module, folder: Path, *, fresh_head: bool = False) -> dict[str, Tensor]:
    """A checkpoint's weights, once names and shapes are proved to be those of `model`; see `load_into`."""
    weights, own = load_weights(folder), model.state_dict()
    if fresh_head and own.keys() - weights.keys() == head_keys(model):
        own = {name: tensor for name, tensor in own.items() if name not in head_keys(model)}
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing or unknown:
        first = (missing or unknown)[0]
        raise UserError(
            f"{folder} is of another architecture ({len(missing)} tensors missing, {len(unknown)} unknown: {first}) "
            "than model.arch: use the one it was trained with"
        )
    for name, tensor in own.items():
        if tensor.shape != weights[name].shape:
            raise UserError(
                f"{folder}: {name} has shape {list(weights[name].shape)}, and {list(tensor.shape)} is needed: "
                "another architecture or number of classes"
            )
    return weights


def head_keys(model: nn.Module) -> set[str]:
    """The names of the head's tensors."""
    head = head_name(model)
    return {f"{head}.{name}" for name in model.get_submodule(head).state_dict()}


def load_model(path: Path, *, allow_incomplete: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """The model that a checkpoint (or run folder) holds, on the CPU, and its `used_meta` with "has_head"."""
    folder = resolve(path, allow_incomplete=allow_incomplete)
    meta = used_meta(folder)
    try:
        arch, classes = meta["config"]["model"]["arch"], meta["classes"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}/meta.json lacks {error}: not a checkpoint of a model") from error
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not isinstance(arch, str) or not classes or not named:
        raise UserError(f"{folder}/meta.json names no network or no classes: not a checkpoint of a model")
    model = build_model(arch, len(classes))
    return model, {**meta, "has_head": load_into(model, folder, fresh_head=True)}
