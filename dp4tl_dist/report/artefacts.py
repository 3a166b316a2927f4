"""Where a stage leaves what it made, and what that says of itself."""

from pathlib import Path
from typing import Any

from dp4tl_dist.data.beton import sidecar
from dp4tl_dist.files import load_npz, read_json
from dp4tl_dist.stages import Stage, Trial

KINDS = {"vote": "votes", "score": "scores", "cluster": "clusters", "influence": "influence"}
"""What the files of verbs are that do not write subsets."""


def stages_of(trial: Trial, part: str) -> list[str]:
    """The names of the stages whose time is that of one of PARTS."""
    if part == "surrogate":
        return [stage for stage in trial.selection if stage.startswith("surrogate")]
    if part == "voting":
        return [stage for stage in trial.selection if not stage.startswith("surrogate")]
    return [trial.pretrain] if part == "pretraining" else list(trial.transfers.values())


def place_of(stage: Stage, *, done: bool) -> Path:
    """Where the stage's output is, or would be: of one that is not done, what it makes at the moment."""
    working = stage.unfinished(stage.output)
    return stage.output if done or not stage.beside.is_dir() else working


def run_folder(stage: Stage, *, done: bool) -> Path:
    """Where a training or transfer stage writes its metrics."""
    path = place_of(stage, done=done)
    return path.with_name(path.name + ".run") if stage.argv[0] == "transfer" else path


def meta_of(stage: Stage, *, done: bool) -> Any:
    """The meta that the stage's output carries; None where there is no output yet."""
    verb, path = stage.argv[0], place_of(stage, done=done)
    if verb == "train":
        metas = sorted((path / "checkpoints").glob("step_*/meta.json"))
        return read_json(metas[-1]) if metas else None
    if not path.exists():
        return None
    if verb == "transfer":
        return read_json(path)
    if path.suffix == ".npz":
        return load_npz(path, KINDS.get(verb, "subset"))[1]
    return read_json(sidecar(path))["meta"]
