"""The record that each stage leaves in RUN_DIR/stages, and what it is held against: whether a stage is done.

`dp4tl run` and the jobs of launch/submit.py keep the same records, so that each goes on where the other stopped.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from dp4tl_dist import __version__
from dp4tl_dist.contents import content_digest, newest_meta
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, read_json, write_json
from dp4tl_dist.log import warn
from dp4tl_dist.outputs import forget_tries, has_try, open_beside, refuse_foreign, refuse_links, take_place, tidy
from dp4tl_dist.revisions import FORMATS, revision
from dp4tl_dist.stages import Graph, Stage

DAMAGED = "damaged"
UNREADABLE: dict[str, Any] = {"status": DAMAGED, "finished": {"status": DAMAGED}}
"""In place of a record that cannot be read. The stage counts as not done, and what is in its place as the run's own:
it is replaced, though not before its replacement is complete."""


def plan(graph: Graph) -> list[tuple[Stage, str]]:
    """Each stage with what `run` would do: "skip", "run", "replace" what is there, or "resume" an unfinished try.

    What follows from a changed stage runs, too. UserError where an output is in a place that is not this run's.
    """
    result: list[tuple[Stage, str]] = []
    dirty: set[Path] = set()
    check_folder(graph)
    for stage in graph.stages.values():
        known = not any(path in dirty for path in stage.inputs)
        key = stage_key(graph, stage) if known else ""
        if known and is_done(stage, finished(read_record(graph, stage)), key):
            result.append((stage, "skip"))
            continue
        refuse_links(stage)
        there = any(path.exists() for path in stage.outputs)
        result.append((stage, "resume" if known and has_try(stage, key) else "replace" if there else "run"))
        dirty |= set(stage.outputs)
    return result


OWN = (
    "config.json",
    "results.json",
    "results.txt",
    "report.html",
    "sweep.csv",
    "sweep.json",
    "sweep.jsonl",
    "sweep.txt",
)
"""What a run writes into its folder, beside what its stages make."""


def open_folder(graph: Graph) -> None:
    """Make the folder of records, which says that this is a run's, and then write the run's config."""
    (graph.out / "stages").mkdir(parents=True, exist_ok=True)
    write_json(graph.out / "config.json", graph.config.model_dump(mode="json"))


def check_folder(graph: Graph) -> None:
    """Refuse a run folder of another format of records, and what is in the place of the run's own files and outputs
    though it did not make it: UserError."""
    foreign = [] if (graph.out / "stages").is_dir() else [name for name in OWN if os.path.lexists(graph.out / name)]
    if foreign:
        raise UserError(
            f"{graph.out / foreign[0]} was not made by a run (there is no {graph.out / 'stages'}), and would be "
            "replaced: move it away, or choose another --out"
        )
    for stage in graph.stages.values():
        record = read_record(graph, stage)
        found = record.get("format", 0)
        if found != FORMATS["record"] and record.get("status") not in (None, DAMAGED):
            made = "dp4tl 0.1" if found == 0 else "another dp4tl"
            raise UserError(
                f"{graph.out} is a run of {made}: it can be read and reported, and not gone on with: choose another "
                "--out (finished betons can be named as its source and targets)"
            )
        refuse_other(stage, record)


def refuse_other(stage: Stage, record: dict[str, Any]) -> None:
    """UserError where something is in the place of a stage that never finished."""
    if not finished(record):
        refuse_foreign(stage)


def finished(record: dict[str, Any]) -> dict[str, Any]:
    """The record of the outputs that are in their place, or are being moved there; {} where there are none."""
    found = record if record.get("status") == "done" else record.get("swap") or record.get("finished")
    return found if isinstance(found, dict) else {}


def prepare(graph: Graph, stage: Stage, record: dict[str, Any], key: str) -> dict[str, Any]:
    """Make a place beside the stage's output, and record that it runs. Returns its record, with what an interrupted
    try had spent, and with that of the outputs that are there until then."""
    path = record_path(graph, stage)
    if record.get("status") == DAMAGED:
        warn(f"{path} is damaged: {stage.name} counts as not done, and is made again")
    refuse_links(stage)
    refuse_other(stage, record)
    resumes = record.get("key") == key and record.get("status") != "done" and has_try(stage, key)
    open_beside(stage, key)
    if stage.config is not None:
        write_json(graph.config_path(stage.name), stage.config)
    begun = {
        "name": stage.name, "key": key, "seconds": record.get("seconds", 0.0) if resumes else 0.0, "status": "running",
        "argv": list(stage.argv), "version": __version__, "format": FORMATS["record"],
    }  # fmt: skip
    before = finished(record)
    begun |= {"finished": before} if before else {}
    write_json(path, begun)
    return begun


def finish(graph: Graph, stage: Stage, record: dict[str, Any], *, seconds: float, nproc: int) -> None:
    """Put what the stage made in its place, and record that it is done. RuntimeError where something was not made."""
    missing = [path for path in stage.outputs if not stage.unfinished(path).exists()]
    if missing:
        raise RuntimeError(f"{stage.name} ended without a word, and {missing[0]} was not made")
    kept = {name: value for name, value in record.items() if name not in ("finished", "swap", "error")}
    done = {**kept, "status": "done", "seconds": max(seconds, spent_inside(stage)), "nproc": nproc}
    done["output"] = " ".join(content_digest(stage.unfinished(path)) for path in stage.outputs)
    refuse_links(stage)
    refuse_other(stage, record)
    # From here on the outputs are complete, and moving them is only a matter of doing it: see `settle`.
    write_json(record_path(graph, stage), {**record, "swap": done})
    settle(graph, stage)
    forget_tries(stage)


def settle(graph: Graph, stage: Stage) -> dict[str, Any]:
    """The stage's record, once outputs that were being moved to their place are there, and all that is left of it and
    of a try that was given up is cleared."""
    record = read_record(graph, stage)
    if isinstance(record.get("swap"), dict):
        take_place(stage)
        record = record["swap"]
        write_json(record_path(graph, stage), record)
    if record.get("status") == "done":
        tidy(stage, str(record.get("key")))
    return record


def skip(graph: Graph, stage: Stage, record: dict[str, Any]) -> None:
    """Record that the stage is done as it is, also where it was tried otherwise since."""
    if record.get("status") != "done":
        write_json(record_path(graph, stage), finished(record))


def spent_inside(stage: Stage) -> float:
    """The seconds that a training stage counted itself: they outlive a killed `dp4tl run`."""
    if stage.argv[0] != "train":
        return 0.0
    return float(newest_meta(stage.unfinished(stage.output)).get("seconds", 0.0))


def is_done(stage: Stage, record: dict[str, Any], key: str) -> bool:
    """Whether the stage finished under the same key and its outputs are still what they were then."""
    if record.get("status") != "done" or record.get("key") != key:
        return False
    there = all(path.exists() for path in stage.outputs)
    return there and record.get("output") == output_digest(stage) and (stage.argv[0] != "train" or ends_whole(stage))


def ends_whole(stage: Stage) -> bool:
    """Whether a training's newest checkpoint is its last, with the weights that its meta promises."""
    meta, folders = newest_meta(stage.output), sorted((stage.output / "checkpoints").glob("step_*"))
    digests, weights = meta.get("digests"), "weights.safetensors"
    if meta.get("complete") is not True or not isinstance(digests, dict) or not (folders[-1] / weights).is_file():
        return False
    return digest_file(folders[-1] / weights) == digests.get(weights)


def stage_key(graph: Graph, stage: Stage) -> str:
    """A digest of all that the stage's result depends on: command, config, the content of its inputs.

    Paths count by their content alone, so that a run folder can be moved. How often a stage logs or saves, and on how
    many ranks it runs, does not change what it makes.
    """
    contents = {str(path): content_digest(path) for path in stage.inputs}
    made = {str(path): path for each in graph.stages.values() for path in (*each.outputs, graph.config_path(each.name))}

    def unplaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: unplaced(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [unplaced(item) for item in value]
        if isinstance(value, str) and value not in contents:
            return f"RUN/{made[value].relative_to(graph.out)}" if value in made else value
        return contents[value] if isinstance(value, str) else value

    config = {key: value for key, value in (stage.config or {}).items() if key not in ("log", "checkpoint")}
    numbers = revision(stage.argv[0])
    whole = {"argv": stage.argv, "config": config, "inputs": list(contents), "revision": numbers}
    return hashlib.blake2b(json.dumps(unplaced(whole), sort_keys=True).encode(), digest_size=16).hexdigest()


def output_digest(stage: Stage) -> str:
    return " ".join(content_digest(path) for path in stage.outputs)


def record_path(graph: Graph, stage: Stage) -> Path:
    return graph.out / "stages" / f"{stage.name}.json"


def read_record(graph: Graph, stage: Stage) -> dict[str, Any]:
    """A stage's record: {} where there is none, and UNREADABLE where it is damaged."""
    path = record_path(graph, stage)
    if not path.exists():
        return {}
    try:
        record = read_json(path)
    except UserError:
        return UNREADABLE
    return record if isinstance(record, dict) and "status" in record else UNREADABLE
