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


def run_folder(stage: Stage) -> Path:
    """Where a training or transfer stage writes its metrics."""
    return stage.output.with_name(stage.output.name + ".run") if stage.argv[0] == "transfer" else stage.output


def meta_of(stage: Stage) -> Any:
    """The meta that the stage's output carries; None where there is no output yet."""
    verb, path = stage.argv[0], stage.output
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
