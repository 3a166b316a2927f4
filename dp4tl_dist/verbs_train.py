"""The verbs that train and show: train, transfer, run, report. What a verb needs is imported only when it runs."""

import argparse
from pathlib import Path

from dp4tl_dist.arguments import Verbs, add_allow_incomplete, add_config, add_out, add_verb, number


def train(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "train", run_train, "Train a surrogate or a source model; continues a run that was cut off."
    )
    add_config(parser, required=True)
    add_allow_incomplete(parser, "model.init")
    parser.add_argument("--subset", type=Path, help="train on these samples of data.train only")
    parser.add_argument("--val-subset", type=Path, help="validate on these samples of data.val only")
    add_out(parser, "the run folder")


def run_train(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import TrainConfig, load_config
    from dp4tl_dist.config_file import toml_string
    from dp4tl_dist.files import keep_inputs

    paths = {"subset": args.subset, "val_subset": args.val_subset}
    given = [f"data.{key}={toml_string(str(path))}" for key, path in paths.items() if path]
    given += ["model.allow_incomplete=true"] * args.allow_incomplete
    config = load_config(TrainConfig, args.config, [*args.set, *given])

    if args.force:
        keep_inputs([args.out / "config.json"], [args.config])

    from dp4tl_dist.train.supervised import train
    from dp4tl_dist.world import joined

    with joined(config.engine.device, timeout_s=config.engine.timeout_s) as world:
        train(config, out=args.out, world=world, force=args.force)


def transfer(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "transfer", run_transfer, "Measure a checkpoint on a target: linear probe (lp) or full finetuning (ff)."
    )
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint folder or a run folder")
    add_allow_incomplete(parser, "--checkpoint")
    parser.add_argument("--train", type=Path, required=True, help="the target's training beton")
    parser.add_argument("--test", type=Path, required=True, help="the target's test beton: read once, at the end")
    parser.add_argument("--mode", choices=("lp", "ff"), required=True)
    parser.add_argument(
        "--cached", action="store_true", help="lp on features computed once: seconds instead of minutes"
    )
    parser.add_argument("--robust", action="store_true", help="also tell the accuracy under attack (PGD-10, 3/255)")
    add_config(parser, required=False)
    add_out(parser, "the result, a .json file")


def run_transfer(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import apply_overrides, find_config, read_toml, validate
    from dp4tl_dist.files import check_output
    from dp4tl_dist.recipes import TransferConfig, recipe

    content = read_toml(find_config(args.config)) if args.config else {}
    flags = [f"{name}=true" for name in ("cached", "robust") if getattr(args, name)]
    content = apply_overrides(content, [*args.set, *flags])
    config = validate(TransferConfig, recipe(args.mode, content), source=args.config or "--set")
    read = [args.checkpoint, args.train, args.test, args.config]
    check_output(args.out, force=args.force, inputs=read, folders=[args.out.with_name(args.out.name + ".run")])

    from dp4tl_dist.transfer import transfer
    from dp4tl_dist.world import joined

    with joined(config.engine.device, timeout_s=config.engine.timeout_s) as world:
        transfer(config, checkpoint_path=args.checkpoint, train=args.train, test=args.test, out=args.out, world=world,
                 force=args.force, allow_incomplete=args.allow_incomplete)  # fmt: skip


def run(verbs: Verbs) -> None:
    parser = add_verb(verbs, "run", run_run, "Do all stages from one config; what is done and unchanged is skipped.")
    add_config(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--nproc", type=number, help="ranks of each training, voting and transfer stage")
    parser.add_argument("--dry-run", action="store_true", help="only list what would run")


def run_run(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import load_config
    from dp4tl_dist.pipeline import run
    from dp4tl_dist.run_config import RunConfig

    nproc = [f"nproc={args.nproc}"] if args.nproc is not None else []
    run(load_config(RunConfig, args.config, [*args.set, *nproc]), out=args.out, dry_run=args.dry_run)


def report(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "report", run_report, "Write RUN_DIR/report.html: one page that shows a run, finished or not."
    )
    parser.add_argument("path", type=Path, metavar="RUN_DIR", help="the folder that `dp4tl run --out` made")


def run_report(args: argparse.Namespace) -> None:
    from dp4tl_dist.log import say
    from dp4tl_dist.report.html import write_report

    say(f"report: {write_report(args.path)}")
