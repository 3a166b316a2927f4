"""`dp4tl info`: what any artefact is. Reads headers and meta, and with --verify every byte."""

from pathlib import Path
from typing import Any

import numpy as np

from dp4tl_dist.data.beton import describe as describe_beton
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.verify import verify as verify_beton
from dp4tl_dist.errors import UserError, printable
from dp4tl_dist.files import load_npz, read_json
from dp4tl_dist.log import on_terminal, progress
from dp4tl_dist.prune.clusters_file import load_clusters
from dp4tl_dist.prune.votes_file import load_votes

NPZ_KINDS = ("votes", "subset", "scores", "clusters", "losses")
SHOWN_CLASSES = 8
MAX_INDENT = 40


def describe(path: Path) -> dict[str, Any]:
    """Kind, sizes and provenance of a beton, an .npz, a checkpoint, a run folder or a result, as plain JSON types."""
    if not path.exists():
        raise UserError(f"{path} is not there: pass a file or folder that dp4tl made")
    if path.is_dir():
        return _describe_folder(path)
    if path.suffix == ".npz":
        return _describe_npz(path)
    if path.suffix == ".json":
        content = read_json(path)
        return {"path": str(path), **content} if isinstance(content, dict) else {"path": str(path), "content": content}
    return describe_beton(open_beton(path))


def verify(path: Path) -> list[str]:
    """What is damaged in a beton, a checkpoint or a run folder of `dp4tl train`, a line each. Reads every byte.

    Files of other kinds are read whole whenever they are described.
    """
    if path.is_dir():
        from dp4tl_dist.train.checkpoint import checkpoints, is_whole  # imports torch

        folders = checkpoints(path) if (path / "checkpoints").is_dir() else [path]
        return [
            f"{folder} is damaged: its files differ from its meta.json" for folder in folders if not is_whole(folder)
        ]
    if not path.exists() or path.suffix in (".npz", ".json"):
        return []
    with progress("verify", shown=on_terminal()) as advance:
        return verify_beton(path, advance)


def _describe_folder(path: Path) -> dict[str, Any]:
    if (path / "meta.json").is_file():
        return {"path": str(path), **_table(path / "meta.json")}
    metas = sorted((path / "checkpoints").glob("step_*/meta.json"))
    if metas:
        return {"path": str(path), "checkpoint": str(metas[-1].parent), **_table(metas[-1])}
    if (path / "stages").is_dir():
        records = {item.stem: _table(item).get("status") for item in sorted((path / "stages").glob("*.json"))}
        return {"path": str(path), "kind": "run", "stages": records}
    raise UserError(f"{path} holds nothing that dp4tl made: pass a beton, an .npz, a checkpoint or a run folder")


def _table(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a table of keys and values: it was damaged, or dp4tl did not make it")
    return content


def _describe_npz(path: Path) -> dict[str, Any]:
    errors = []
    for kind in NPZ_KINDS:
        try:
            arrays, meta = load_npz(path, kind)
        except UserError as error:
            errors.append(str(error))
            continue
        shapes = {name: f"{array.dtype}{list(array.shape)}" for name, array in arrays.items()}
        content = {"path": str(path), **meta, "arrays": shapes}
        if kind == "votes":
            found = load_votes(path)
            content["num_voters"] = len(found.predictions)
            content["groups_with_votes"] = int(np.count_nonzero(found.votes.sum(axis=0)))
        if kind == "clusters":
            sizes = load_clusters(path).sizes
            content["samples_per_cluster"] = {"min": int(sizes.min()), "max": int(sizes.max())}
        return content
    raise UserError(errors[0])


def render(content: dict[str, Any], indent: int = 0) -> str:
    """The description as indented lines; long lists and deep tables are cut."""
    lines = []
    for key, value in content.items():
        key = printable(key)  # what a stranger's file holds may be no name for a terminal
        if isinstance(value, dict) and indent < MAX_INDENT:
            lines.append(f"{' ' * indent}{key}:")
            lines.append(render(value, indent + 2)) if value else None
        elif isinstance(value, list) and len(value) > SHOWN_CLASSES:
            shown = printable(", ".join(str(item) for item in value[:SHOWN_CLASSES]))
            lines.append(f"{' ' * indent}{key}: {shown}, ... ({len(value)} in all)")
        else:
            text = ", ".join(str(item) for item in value) if isinstance(value, list) else value
            lines.append(f"{' ' * indent}{key}: {printable(str(text))}")
    return "\n".join(line for line in lines if line)
