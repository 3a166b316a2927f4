"""The record that each stage leaves in RUN_DIR/stages, and what it is held against: whether a stage is done.

`dp4tl run` and the jobs of launch/submit.py keep the same records, so that each goes on where the other stopped.
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from dp4tl_dist import __version__
from dp4tl_dist.data.beton import fingerprint as beton_fingerprint
from dp4tl_dist.data.folder import check_broken, read_folder
from dp4tl_dist.data.walk import listing_digest
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, read_json, write_json
from dp4tl_dist.revisions import revision
from dp4tl_dist.stages import Graph, Stage


def plan(graph: Graph) -> list[tuple[Stage, str]]:
    """Each stage with what `run` would do: "skip", "run" or "resume"; what follows from a changed stage runs, too."""
    result: list[tuple[Stage, str]] = []
    dirty: set[Path] = set()
    for stage in graph.stages.values():
        if any(path in dirty for path in stage.inputs):
            why = "run"
        else:
            record, key = read_record(graph, stage), stage_key(graph, stage)
            resumes = record.get("key") == key and record.get("status") == "running"
            why = "skip" if is_done(stage, record, key) else "resume" if resumes else "run"
        if why != "skip" and stage.argv[0] == "write":
            check_images(stage)
        if why != "skip":
            dirty |= {stage.output, *stage.also}
        result.append((stage, why))
    return result


def check_images(stage: Stage) -> None:
    """Raise UserError for what makes `write` refuse a folder before it reads an image: its form, and broken links."""
    for images in stage.inputs:
        if images.is_dir():
            check_broken(read_folder(images), skip_bad="--skip-bad" in stage.argv)


def prepare(graph: Graph, stage: Stage, record: dict[str, Any], key: str) -> dict[str, Any]:
    """Make way for the stage and record that it runs. Returns its record, with what an interrupted try had spent."""
    resumes = record.get("key") == key and record.get("status") == "running"
    if not resumes:
        record = {"name": stage.name, "key": key, "seconds": 0.0}
        shutil.rmtree(stage.output.with_name(stage.output.name + ".run"), ignore_errors=True)
    for old in (stage.output, *stage.also):
        # A run folder is continued; a file that the last attempt made before it was cut off would be in the way.
        if not old.is_dir():
            old.unlink(missing_ok=True)
        elif not resumes:
            shutil.rmtree(old)
    if stage.config is not None:
        write_json(graph.config_path(stage.name), stage.config)
    stage.output.parent.mkdir(parents=True, exist_ok=True)
    record.pop("error", None)
    record = {**record, "status": "running", "argv": list(stage.argv), "version": __version__}
    write_json(record_path(graph, stage), record)
    return record


def finish(graph: Graph, stage: Stage, record: dict[str, Any], *, seconds: float, nproc: int) -> None:
    """Record that the stage is done."""
    done = {"status": "done", "seconds": max(seconds, spent_inside(stage)), "argv": list(stage.argv)}
    write_json(record_path(graph, stage), {**record, **done, "output": output_digest(stage), "nproc": nproc})


def spent_inside(stage: Stage) -> float:
    """The seconds that a training stage counted itself: they outlive a killed `dp4tl run`."""
    return float(newest_meta(stage.output).get("seconds", 0.0)) if stage.argv[0] == "train" else 0.0


def is_done(stage: Stage, record: dict[str, Any], key: str) -> bool:
    """Whether the stage finished under the same key and its outputs are still what they were then."""
    if record.get("status") != "done" or record.get("key") != key:
        return False
    return all(path.exists() for path in (stage.output, *stage.also)) and record.get("output") == output_digest(stage)


def stage_key(graph: Graph, stage: Stage) -> str:
    """A digest of all that the stage's result depends on: command, config, the content of its inputs.

    Paths count by their content alone, so that a run folder can be moved. How often a stage logs or saves, and on how
    many ranks it runs, does not change what it makes.
    """
    contents = {str(path): content_digest(path) for path in stage.inputs}
    out = str(graph.out)

    def unplaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: unplaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [unplaced(item) for item in value]
        if isinstance(value, str) and value not in contents:
            return "RUN" + value[len(out) :] if Path(value).is_relative_to(out) else value
        return contents[value] if isinstance(value, str) else value

    config = {key: value for key, value in (stage.config or {}).items() if key not in ("log", "checkpoint")}
    numbers = revision(stage.argv[0])
    whole = {"argv": stage.argv, "config": config, "inputs": list(contents), "revision": numbers}
    return hashlib.blake2b(json.dumps(unplaced(whole), sort_keys=True).encode(), digest_size=16).hexdigest()


def output_digest(stage: Stage) -> str:
    return " ".join(content_digest(path) for path in (stage.output, *stage.also))


def content_digest(path: Path) -> str:
    """What identifies the content of an input or output; "absent" where there is nothing."""
    if path.suffix == ".beton" and path.is_file():
        try:
            return beton_fingerprint(path)
        except UserError:
            return "damaged"
    if path.is_file():
        return digest_file(path)
    if (path / "checkpoints").is_dir():
        return hashlib.blake2b(json.dumps(newest_meta(path).get("digests")).encode(), digest_size=16).hexdigest()
    if path.is_dir():
        return listing_digest(path)
    return "absent"


def newest_meta(run_folder: Path) -> dict[str, Any]:
    """The meta of a training run's newest checkpoint, {} where there is none. Reads JSON alone, no weights."""
    metas = sorted((run_folder / "checkpoints").glob("step_*/meta.json"))
    found = read_json(metas[-1]) if metas else {}
    return found if isinstance(found, dict) else {}


def record_path(graph: Graph, stage: Stage) -> Path:
    return graph.out / "stages" / f"{stage.name}.json"


def read_record(graph: Graph, stage: Stage) -> dict[str, Any]:
    path = record_path(graph, stage)
    record = read_json(path) if path.exists() else {}
    return record if isinstance(record, dict) else {}
