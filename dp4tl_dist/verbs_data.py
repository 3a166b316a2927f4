"""The verbs that make and show files: write, info, compact, doctor.

What a verb needs is imported only when that verb runs.
"""

import argparse
import json
from pathlib import Path

from dp4tl_dist.arguments import Verbs, add_out, add_verb, number, seed, workers


def write(verbs: Verbs) -> None:
    parser = add_verb(verbs, "write", run_write, "Write images as one .beton file.")
    origin = parser.add_mutually_exclusive_group(required=True)
    origin.add_argument("--images", type=Path, help="a folder DIR/<class>/<image>")
    origin.add_argument("--torchvision", metavar="NAME", help="a torchvision dataset, with --split and --root")
    origin.add_argument(
        "--synthetic", metavar="KIND/SPLIT", help="the embedded dataset: source/train, target/test, ..."
    )
    parser.add_argument("--split", default="train", help="split of --torchvision (default: train)")
    parser.add_argument("--root", type=Path, default=Path("data"), help="folder of --torchvision (default: data)")
    parser.add_argument("--download", action="store_true", help="let torchvision fetch the dataset into --root")
    parser.add_argument(
        "--max-side", type=number, default=400, help="shrink to this longest side; 0 keeps sizes (default: 400)"
    )
    parser.add_argument("--quality", type=number, default=90, help="JPEG quality (default: 90)")
    parser.add_argument("--seed", type=seed, default=0, help="of the shuffle at write time")
    parser.add_argument("--workers", type=workers, default=0, help="processes; 0 is one for each core")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    parser.add_argument("--reencode", action="store_true", help="encode the JPEGs anew that could be kept as they are")
    add_out(parser, "the .beton file to make")


def run_write(args: argparse.Namespace) -> None:
    from dp4tl_dist.data.origin import write_origin
    from dp4tl_dist.errors import printable
    from dp4tl_dist.log import progress, say, warn

    with progress("write") as advance:
        report = write_origin(args, advance)
    for path, reason in report.skipped:
        warn(f"skipped {path}: {reason}")
    say(f"{args.out}: {report.num_samples} samples of {report.num_classes} classes in {report.seconds:.1f} s"
        + (f", {len(report.skipped)} skipped" if report.skipped else ""))  # fmt: skip
    if report.left_out:
        say("left out: " + printable(", ".join(f"{count} {reason}" for reason, count in report.left_out.items())))


def info(verbs: Verbs) -> None:
    parser = add_verb(verbs, "info", run_info, "Tell what any artefact is.")
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a beton, an .npz, a checkpoint, a run folder, a result"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--verify", action="store_true", help="read every byte, and name what is damaged")


def run_info(args: argparse.Namespace) -> None:
    from dp4tl_dist.errors import UserError, printable
    from dp4tl_dist.info import describe, render, verify

    if args.verify and (faults := verify(args.path)):
        print("\n".join(printable(line) for line in faults), flush=True)
        raise UserError(f"{args.path} is damaged, in {len(faults)} places: restore it from a copy, or make it again")
    content = describe(args.path) | ({"verified": True} if args.verify else {})
    print(json.dumps(content, indent=2, sort_keys=True) if args.json else render(content))


def doctor(verbs: Verbs) -> None:
    add_verb(verbs, "doctor", run_doctor, "Tell what this machine has and lacks, with the command that mends each.")


def run_doctor(args: argparse.Namespace) -> None:
    from dp4tl_dist.doctor import diagnose, print_report

    checks = diagnose()
    print_report(checks)
    missing = [check.name for check in checks if check.status == "missing"]
    if missing:
        raise RuntimeError(f"required and missing: {', '.join(missing)}")


def compact(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "compact", run_compact, "Copy a subset's samples, byte by byte, into a beton of their own."
    )
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    parser.add_argument("--subset", type=Path, required=True, help="the samples to copy")
    parser.add_argument("--seed", type=seed, default=0, help="of the new file's shuffle")
    add_out(parser, "the .beton file to make")


def run_compact(args: argparse.Namespace) -> None:
    from dp4tl_dist.data.compact import compact
    from dp4tl_dist.log import say

    count = compact(args.source, args.subset, args.out, seed=args.seed, force=args.force)
    say(f"{args.out}: {count} samples")
