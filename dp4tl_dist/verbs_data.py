"""The verbs that make and choose samples: write, info, vote, prune, compact, doctor.

What a verb needs is imported only when that verb runs.
"""

import argparse
import json
from pathlib import Path

from dp4tl_dist.arguments import Verbs, add_out, add_verb


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
        "--max-side", type=int, default=400, help="shrink to this longest side; 0 keeps sizes (default: 400)"
    )
    parser.add_argument("--quality", type=int, default=90, help="JPEG quality (default: 90)")
    parser.add_argument("--seed", type=int, default=0, help="of the shuffle at write time")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 is one for each core")
    parser.add_argument("--skip-bad", action="store_true", help="leave unreadable images out and list them")
    add_out(parser, "the .beton file to make")


def run_write(args: argparse.Namespace) -> None:
    from dp4tl_dist.data.origin import write_origin
    from dp4tl_dist.log import progress, say, warn

    with progress("write") as advance:
        report = write_origin(args, advance)
    for path, reason in report.skipped:
        warn(f"skipped {path}: {reason}")
    say(f"{args.out}: {report.num_samples} samples of {report.num_classes} classes in {report.seconds:.1f} s"
        + (f", {len(report.skipped)} skipped" if report.skipped else ""))  # fmt: skip


def info(verbs: Verbs) -> None:
    parser = add_verb(verbs, "info", run_info, "Tell what any artefact is.")
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a beton, an .npz, a checkpoint, a run folder, a result"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run_info(args: argparse.Namespace) -> None:
    from dp4tl_dist.info import describe, render

    content = describe(args.path)
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


def vote(verbs: Verbs) -> None:
    parser = add_verb(verbs, "vote", run_vote, "Let a surrogate vote for the source classes that matter to a target.")
    parser.add_argument("--method", choices=("lm", "fm"), required=True, help="label mapping or feature mapping")
    parser.add_argument("--surrogate", type=Path, required=True, help="a checkpoint folder or a run folder")
    parser.add_argument(
        "--target", type=Path, action="append", required=True, help="a target's training beton; may be repeated"
    )
    parser.add_argument("--source", type=Path, help="the source beton (fm: its class means are the centres)")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument(
        "--resolution", type=int, help="side of the centre crop (default: the surrogate's validation side)"
    )
    parser.add_argument("--workers", type=int, default=0, help="decoding threads a rank; 0 shares the cores")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")
    add_out(parser, "the votes, an .npz file")


def run_vote(args: argparse.Namespace) -> None:
    from dp4tl_dist.files import check_output
    from dp4tl_dist.log import say
    from dp4tl_dist.world import joined

    check_output(args.out, force=args.force)
    from dp4tl_dist.prune.make import vote

    with joined(args.device) as world:
        summary = vote(world, method=args.method, surrogate=args.surrogate, targets=args.target, source=args.source,
                       out=args.out, batch_size=args.batch_size, resolution=args.resolution,
                       num_workers=args.workers, precision=args.precision, force=args.force)  # fmt: skip
        if world.is_main:
            say(f"{args.out}: {summary}")


def prune(verbs: Verbs) -> None:
    parser = add_verb(verbs, "prune", run_prune, "Choose the source samples to keep.")
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--votes", type=Path, help="keep the classes with the most votes")
    how.add_argument("--random", choices=("classes", "samples"), help="keep classes or samples drawn by --seed")
    how.add_argument("--list", type=Path, help="keep the classes that a text file names, one a line")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--keep", type=float, help="share of the classes (or samples) to keep, 0 < KEEP <= 1")
    amount.add_argument("--keep-classes", type=int, help="number of classes to keep")
    amount.add_argument("--coverage", type=float, help="the fewest classes that hold this share of the votes")
    parser.add_argument(
        "--combine", choices=("normalised", "sum", "max"), default="normalised",
        help="how the votes of several targets count together (default: each target's sum to 1)",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="W,W,...", help="weight of each target's votes, in their order")
    parser.add_argument("--reverse", action="store_true", help="keep the classes with the fewest votes (a check)")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument(
        "--apply-to", type=Path, metavar="VAL.beton", help="prune the validation set alike, into OUT.val.npz"
    )
    add_out(parser, "the subset, an .npz file")


def run_prune(args: argparse.Namespace) -> None:
    from dp4tl_dist.log import say
    from dp4tl_dist.prune.make import prune

    summary = prune(source=args.source, out=args.out, votes=args.votes, random=args.random, list_file=args.list,
                    keep=args.keep, keep_classes=args.keep_classes, coverage=args.coverage, reverse=args.reverse,
                    combine=args.combine, weights=parse_weights(args.weights), seed=args.seed,
                    apply_to=args.apply_to, force=args.force)  # fmt: skip
    say(f"{args.out}: {summary}")


def parse_weights(text: str | None) -> list[float] | None:
    """ "2,1" -> [2.0, 1.0]"""
    from dp4tl_dist.errors import UserError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--weights {text!r} is not a list of numbers like 2,1") from error


def compact(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "compact", run_compact, "Copy a subset's samples, byte by byte, into a beton of their own."
    )
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    parser.add_argument("--subset", type=Path, required=True, help="the samples to copy")
    parser.add_argument("--seed", type=int, default=0, help="of the new file's shuffle")
    add_out(parser, "the .beton file to make")


def run_compact(args: argparse.Namespace) -> None:
    from dp4tl_dist.data.compact import compact
    from dp4tl_dist.log import say

    count = compact(args.source, args.subset, args.out, seed=args.seed, force=args.force)
    say(f"{args.out}: {count} samples")
