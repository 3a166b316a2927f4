"""The command `dp4tl`: one verb a stage. Imports what a verb needs only when that verb runs."""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from dp4tl_dist import __version__
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, Stopped, UserError
from dp4tl_dist.launcher import report_error


class Parser(argparse.ArgumentParser):
    """argparse, with usage errors as one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}: see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 2 bad input, 75 stopped and saved, 1 a failure of its own."""
    try:
        args = build_parser().parse_args(argv)
        args.run(args)
    except UserError as error:
        return fail(EXIT_BAD_INPUT, str(error))
    except Stopped as stop:
        return fail(EXIT_STOPPED, str(stop), kind="stopped")
    except (RuntimeError, FloatingPointError, OSError) as error:
        return fail(EXIT_FAILURE, f"{error or type(error).__name__}")
    except Exception as error:  # a defect: show where, and still tell whoever started this rank
        traceback.print_exc()
        return fail(EXIT_FAILURE, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return fail(130, "interrupted", kind="stopped")
    return EXIT_DONE


def fail(code: int, message: str, *, kind: str = "error") -> int:
    """Print one line, leave it for whoever started this rank, and return the code."""
    report_error(code, message)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    # Bad input is bad on every rank alike, and a stop is agreed: one line is enough.
    if rank != "0" and code == EXIT_BAD_INPUT:
        time.sleep(1)  # the first rank to end has the others ended: let rank 0 speak
    if rank == "0" or code == EXIT_FAILURE:
        where = f"dp4tl [rank {rank}]" if rank != "0" else "dp4tl"
        print(f"{where}: {kind}: {' '.join(message.split())}", file=sys.stderr, flush=True)
    return code


def build_parser() -> Parser:
    parser = Parser(
        prog="dp4tl", description="Prune a source dataset for a target, pretrain on what is left, and measure it."
    )
    parser.add_argument("--version", action="version", version=f"dp4tl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in (_write, _info, _train, _vote, _prune, _compact, _transfer, _run, _doctor):
        add(verbs)
    return parser


Verbs = Any


def _verb(verbs: Verbs, name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
    parser: Parser = verbs.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_out(parser: Parser, what: str) -> None:
    parser.add_argument("--out", type=Path, required=True, help=what)
    parser.add_argument("--force", action="store_true", help="replace what is there")


def _add_config(parser: Parser, *, required: bool) -> None:
    parser.add_argument("--config", required=required, help="a .toml file, or the name of a preset")
    parser.add_argument(
        "--set", action="append", default=[], metavar="table.key=value", help="override one key; may be repeated"
    )


# ---------------------------------------------------------------- write, info, doctor


def _write(verbs: Verbs) -> None:
    parser = _verb(verbs, "write", run_write, "Write images as one .beton file.")
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
    _add_out(parser, "the .beton file to make")


def run_write(args: argparse.Namespace) -> None:
    from dp4tl_dist.data.origin import write_origin
    from dp4tl_dist.log import progress, say, warn

    with progress("write") as advance:
        report = write_origin(args, advance)
    for path, reason in report.skipped:
        warn(f"skipped {path}: {reason}")
    say(f"{args.out}: {report.num_samples} samples of {report.num_classes} classes in {report.seconds:.1f} s"
        + (f", {len(report.skipped)} skipped" if report.skipped else ""))  # fmt: skip


def _info(verbs: Verbs) -> None:
    parser = _verb(verbs, "info", run_info, "Tell what any artefact is.")
    parser.add_argument(
        "path", type=Path, metavar="PATH", help="a beton, an .npz, a checkpoint, a run folder, a result"
    )
    parser.add_argument("--json", action="store_true", help="as JSON")


def run_info(args: argparse.Namespace) -> None:
    from dp4tl_dist.info import describe, render

    content = describe(args.path)
    print(json.dumps(content, indent=2, sort_keys=True) if args.json else render(content))


def _doctor(verbs: Verbs) -> None:
    _verb(verbs, "doctor", run_doctor, "Tell what this machine has and lacks, with the command that mends each.")


def run_doctor(args: argparse.Namespace) -> None:
    from dp4tl_dist.doctor import diagnose, print_report

    checks = diagnose()
    print_report(checks)
    missing = [check.name for check in checks if check.status == "missing"]
    if missing:
        raise RuntimeError(f"required and missing: {', '.join(missing)}")


# ---------------------------------------------------------------- train, transfer, run


def _train(verbs: Verbs) -> None:
    parser = _verb(verbs, "train", run_train, "Train a surrogate or a source model; continues a run that was cut off.")
    _add_config(parser, required=True)
    parser.add_argument("--subset", type=Path, help="train on these samples of data.train only")
    parser.add_argument("--val-subset", type=Path, help="validate on these samples of data.val only")
    _add_out(parser, "the run folder")


def run_train(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import TrainConfig, load_config

    paths = {"subset": args.subset, "val_subset": args.val_subset}
    given = [f"data.{key}={json.dumps(str(path))}" for key, path in paths.items() if path]
    config = load_config(TrainConfig, args.config, [*args.set, *given])

    from dp4tl_dist.train.supervised import train
    from dp4tl_dist.world import joined

    with joined(config.engine.device, timeout_s=config.engine.timeout_s) as world:
        train(config, out=args.out, world=world, force=args.force)


def _transfer(verbs: Verbs) -> None:
    parser = _verb(
        verbs, "transfer", run_transfer, "Measure a checkpoint on a target: linear probe (lp) or full finetuning (ff)."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint folder or a run folder")
    parser.add_argument("--train", type=Path, required=True, help="the target's training beton")
    parser.add_argument("--test", type=Path, required=True, help="the target's test beton: read once, at the end")
    parser.add_argument("--mode", choices=("lp", "ff"), required=True)
    parser.add_argument(
        "--cached", action="store_true", help="lp on features computed once: seconds instead of minutes"
    )
    _add_config(parser, required=False)
    _add_out(parser, "the result, a .json file")


def run_transfer(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import apply_overrides, find_config, read_toml, validate
    from dp4tl_dist.files import check_output
    from dp4tl_dist.recipes import TransferConfig, recipe

    content = read_toml(find_config(args.config)) if args.config else {}
    content = apply_overrides(content, [*args.set, *(["cached=true"] if args.cached else [])])
    config = validate(TransferConfig, recipe(args.mode, content), source=args.config or "--set")
    check_output(args.out, force=args.force)

    from dp4tl_dist.transfer import transfer
    from dp4tl_dist.world import joined

    with joined(config.engine.device, timeout_s=config.engine.timeout_s) as world:
        transfer(config, checkpoint_path=args.checkpoint, train=args.train, test=args.test, out=args.out, world=world)


def _run(verbs: Verbs) -> None:
    parser = _verb(verbs, "run", run_run, "Do all stages from one config; what is done and unchanged is skipped.")
    _add_config(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--nproc", type=int, help="ranks of each training, voting and transfer stage")
    parser.add_argument("--dry-run", action="store_true", help="only list what would run")


def run_run(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import load_config
    from dp4tl_dist.pipeline import run
    from dp4tl_dist.stages import RunConfig

    nproc = [f"nproc={args.nproc}"] if args.nproc is not None else []
    run(load_config(RunConfig, args.config, [*args.set, *nproc]), out=args.out, dry_run=args.dry_run)


# ---------------------------------------------------------------- vote, prune, compact


def _vote(verbs: Verbs) -> None:
    parser = _verb(verbs, "vote", run_vote, "Let a surrogate vote for the source classes that matter to a target.")
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
    _add_out(parser, "the votes, an .npz file")


def run_vote(args: argparse.Namespace) -> None:
    from dp4tl_dist.files import check_output
    from dp4tl_dist.log import say
    from dp4tl_dist.world import joined

    check_output(args.out, force=args.force)
    from dp4tl_dist.prune.make import vote

    with joined(args.device) as world:
        summary = vote(world, method=args.method, surrogate=args.surrogate, targets=args.target, source=args.source,
                       out=args.out, batch_size=args.batch_size, resolution=args.resolution,
                       num_workers=args.workers, force=args.force)  # fmt: skip
        if world.is_main:
            say(f"{args.out}: {summary}")


def _prune(verbs: Verbs) -> None:
    parser = _verb(verbs, "prune", run_prune, "Choose the source samples to keep.")
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--votes", type=Path, help="keep the classes with the most votes")
    how.add_argument("--random", choices=("classes", "samples"), help="keep classes or samples drawn by --seed")
    how.add_argument("--list", type=Path, help="keep the classes that a text file names, one a line")
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument("--keep", type=float, help="share of the classes (or samples) to keep, 0 < KEEP <= 1")
    amount.add_argument("--keep-classes", type=int, help="number of classes to keep")
    amount.add_argument("--coverage", type=float, help="the fewest classes that hold this share of the votes")
    parser.add_argument("--reverse", action="store_true", help="keep the classes with the fewest votes (a check)")
    parser.add_argument("--seed", type=int, default=0, help="of --random")
    parser.add_argument(
        "--apply-to", type=Path, metavar="VAL.beton", help="prune the validation set alike, into OUT.val.npz"
    )
    _add_out(parser, "the subset, an .npz file")


def run_prune(args: argparse.Namespace) -> None:
    from dp4tl_dist.log import say
    from dp4tl_dist.prune.make import prune

    summary = prune(source=args.source, out=args.out, votes=args.votes, random=args.random, list_file=args.list,
                    keep=args.keep, keep_classes=args.keep_classes, coverage=args.coverage, reverse=args.reverse,
                    seed=args.seed, apply_to=args.apply_to, force=args.force)  # fmt: skip
    say(f"{args.out}: {summary}")


def _compact(verbs: Verbs) -> None:
    parser = _verb(verbs, "compact", run_compact, "Copy a subset's samples, byte by byte, into a beton of their own.")
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    parser.add_argument("--subset", type=Path, required=True, help="the samples to copy")
    parser.add_argument("--seed", type=int, default=0, help="of the new file's shuffle")
    _add_out(parser, "the .beton file to make")


def run_compact(args: argparse.Namespace) -> None:
    from dp4tl_dist.data.compact import compact
    from dp4tl_dist.log import say

    count = compact(args.source, args.subset, args.out, seed=args.seed, force=args.force)
    say(f"{args.out}: {count} samples")
