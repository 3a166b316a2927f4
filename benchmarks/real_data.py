"""Makes the record of a finished `dp4tl run` on real images: accuracy and time of every arm, and who voted for what.

    python benchmarks/real_data.py RUN_DIR [--beside LABEL=RUN_DIR] [--names labels.csv] [--record NAME]

`--names` is a CSV whose first two columns are a class folder's name and what people call it.
"""

import argparse
import csv
import datetime
import json
import os
from pathlib import Path
from typing import Any

import harness
import numpy as np

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.files import read_json
from dp4tl_dist.prune.votes_file import load_votes

SHOWN = 10
MANY_CLASSES = 20  # of a target: then all of its classes are shown together


def votes_by_class(votes: Path, target: Path, names: dict[str, str]) -> dict[str, list[tuple[str, int]]]:
    """For each target class, the `SHOWN` source classes that its images voted for most; of many classes for all."""
    cast, beton = load_votes(votes), open_beton(target)
    result = {}
    groups = {name: beton.labels == label for label, name in enumerate(beton.classes)}
    if len(groups) > MANY_CLASSES:
        groups = {f"all {len(groups)} classes": np.ones(beton.num_samples, bool)}
    for name, members in groups.items():
        counts = np.bincount(cast.predictions[members], minlength=len(cast.classes))
        first = np.argsort(-counts, kind="stable")[:SHOWN]
        result[name] = [(names.get(cast.classes[i], cast.classes[i]), int(counts[i])) for i in first if counts[i]]
    return result


def training(run: Path) -> dict[str, dict[str, Any]]:
    """What the last checkpoint of the surrogate and of each pretraining says of itself."""
    found = {}
    for name in ["surrogate", *(f"pretrain/{item.name}" for item in sorted((run / "pretrain").iterdir()))]:
        folder = run / name
        meta = read_json(sorted((folder / "checkpoints").glob("step_*/meta.json"))[-1])
        kept = ("num_samples", "samples_seen", "seconds", "val", "restarts", "num_ranks")
        found[name] = {key: meta[key] for key in kept}
    return found


def markdown(record: dict[str, Any]) -> str:
    """The record as a person reads it."""
    lines = [f"# {record['name']}, {record['date'][:10]}", "", record["note"], "", f"    {record['command']}", ""]
    machine = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    lines += [
        f"Machine: {machine['cpu']}, {machine['cores']} cores; commit {record['git']['commit'][:12]}; {versions}",
        "",
    ]
    surrogate = record["training"].get("surrogate", {})
    if surrogate.get("val"):
        lines += [
            f"The surrogate reaches {100 * surrogate['val']['top1']:.1f} % top-1 on the source's validation set.",
            "",
        ]
    modes = list(record["arms"][0]["accuracy"])
    robust = list(record["arms"][0].get("robust", ()))
    lines += ["| target | arm | source samples | pretrain s | total s (with selection) | speed-up | "
              + " | ".join([f"{mode} top-1 % | to random" for mode in modes] + [f"{mode} robust %" for mode in robust])
              + " |",
              "|---|---|---:|---:|---:|---:|" + "---:|---:|" * len(modes) + "---:|" * len(robust)]  # fmt: skip
    for row in record["arms"]:
        cells = [
            f"{row['accuracy'][mode]['mean']:.2f}"
            + _spread(row["accuracy"][mode])
            + f" | {to_random(record, row, mode)}"
            for mode in modes
        ]
        cells += [f"{row['robust'][mode]['mean']:.2f}" + _spread(row["robust"][mode]) for mode in robust]
        speed_up = f"{row['speed_up']:.2f}x" if row["speed_up"] else "-"
        lines.append(
            f"| {row['target']} | {row['arm']} | {np.mean(row['samples']):.0f} | {row['pretrain_s']:.0f} | "
            f"{row['total_s']:.0f} | {speed_up} | {' | '.join(cells)} |"
        )
    for target, table in record["votes"].items():
        lines += ["", f"Votes by class of {target} (the ten source classes with the most; number of images):", ""]
        lines += [
            f"- **{name}**: " + ", ".join(f"{source} {count}" for source, count in rows) for name, rows in table.items()
        ]
    return "\n".join(lines) + "\n"


def to_random(record: dict[str, Any], row: dict[str, Any], mode: str) -> str:
    """How far an arm is above the random arm of its size on the same target and seeds, in points; "" for others."""
    size = row["arm"].partition("@")[2]
    peers = [item for item in record["arms"] if item["target"] == row["target"] and item["arm"] == f"random@{size}"]
    if not size or not peers or row["arm"].startswith("random"):
        return ""
    pairs = zip(row["accuracy"][mode]["values"], peers[0]["accuracy"][mode]["values"], strict=True)
    return f"{np.mean([mine - other for mine, other in pairs]):+.2f}"


def unplaced(value: Any) -> Any:
    """`value` with absolute paths cut to their last two names: where the data lay on one machine says nothing."""
    if isinstance(value, dict):
        return {key: unplaced(item) for key, item in value.items()}
    if isinstance(value, list):
        return [unplaced(item) for item in value]
    return "/".join(Path(value).parts[-2:]) if isinstance(value, str) and value.startswith("/") else value


def _spread(cell: dict[str, Any]) -> str:
    return f" +- {cell['std']:.2f} (n = {len(cell['values'])})" if cell["std"] is not None else " (n = 1)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, metavar="RUN_DIR")
    parser.add_argument("--beside", action="append", default=[], metavar="LABEL=RUN_DIR",
                        help="add the rows of another run, whose arms get the label")  # fmt: skip
    parser.add_argument("--names", type=Path)
    parser.add_argument("--note", default="", help="what a reader should know")
    parser.add_argument("--command", default="", help="the command that made RUN_DIR, as others would type it")
    parser.add_argument("--record", metavar="NAME", help="write benchmarks/results/DATE_NAME_MACHINE.{json,md}")
    args = parser.parse_args()
    if not (args.run / "results.json").is_file():
        harness.refuse(f"{args.run} holds no results.json: finish `dp4tl run` first")
    names = {}
    if args.names:
        with open(args.names, newline="") as handle:
            names = {row[0]: row[1] for row in csv.reader(handle)}
    config = read_json(args.run / "config.json")
    rows = read_json(args.run / "results.json")
    voted = {
        f"{target} ({votes.stem.split('-')[1]})": votes_by_class(votes, _target(args.run, config, target), names)
        for target in config["targets"]
        for votes in sorted((args.run / "votes").glob(f"vote-*-{target}.npz"))
    }
    now = datetime.datetime.now(datetime.timezone.utc)
    trained = training(args.run)
    configs = {}
    for label, _, folder in (text.partition("=") for text in args.beside):
        run = Path(folder)
        rows += [{**row, "arm": f"{row['arm']} {label}"} for row in read_json(run / "results.json")]
        trained |= {f"{label}/{name}": found for name, found in training(run).items() if name != "surrogate"}
        configs[label] = unplaced(read_json(run / "config.json"))
    record = {
        "name": args.record or args.run.name, "date": now.isoformat(timespec="seconds"), "note": args.note,
        "command": args.command, "config": unplaced(config), "arms": rows,
        "configs_beside": configs, "training": trained, "votes": voted,
        "machine": harness.machine() | {"load_at_end": os.getloadavg()}, "versions": harness.versions(),
        "git": harness.git(),
    }  # fmt: skip
    print(markdown(record))
    if args.record:
        base = harness.RESULTS / f"{now.date()}_{args.record}_{record['machine']['name']}"
        base.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n")
        base.with_suffix(".md").write_text(markdown(record))


def _target(run: Path, config: dict[str, Any], target: str) -> Path:
    origin = config["targets"][target]["train"]
    return Path(origin) if origin.endswith(".beton") else run / "data" / f"{target}-train.beton"


if __name__ == "__main__":
    main()
