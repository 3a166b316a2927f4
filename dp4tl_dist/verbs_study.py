"""The verbs that study choices: advise, sweep, influence. What a verb needs is imported only when it runs."""

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dp4tl_dist.arguments import Verbs, add_allow_incomplete, add_config, add_out, add_verb, number


def advise(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "advise", run_advise, "Read off the votes how much of the source to keep, and what it costs."
    )
    parser.add_argument("--votes", type=Path, nargs="+", required=True, metavar="V.npz")
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    speed = parser.add_mutually_exclusive_group()
    speed.add_argument(
        "--throughput", type=float, metavar="N", help="images a second in training, of all ranks together"
    )
    speed.add_argument("--benchmark", action="store_true", help="measure it: train for some seconds on these ranks")
    parser.add_argument(
        "--config", default="resnet101", help="the recipe of the source model: a training config, a run's, or a preset"
    )
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="override one key")
    parser.add_argument("--val", type=Path, metavar="VAL.beton", help="the source's validation set, where one is used")
    parser.add_argument(
        "--surrogate", type=Path, action="append", help="what voted, for its cost (default: where the votes say it is)"
    )
    add_allow_incomplete(parser, "a surrogate")
    parser.add_argument("--combine", choices=("normalised", "max", "counts", "sum"), default="normalised")
    parser.add_argument("--weights", metavar="W,W,...", help="weight of each target's votes, in their order")
    parser.add_argument("--influence", type=Path, metavar="I.npz", help="hold the ranking against brute force's")
    parser.add_argument("--json", action="store_true", help="everything, the whole coverage curve included, as JSON")


def run_advise(args: argparse.Namespace) -> None:
    from dp4tl_dist import advise
    from dp4tl_dist.errors import UserError
    from dp4tl_dist.log import say
    from dp4tl_dist.train.cost import Speed
    from dp4tl_dist.verbs_select import parse_weights

    advice = advise.read_votes(args.votes, args.source, combine=args.combine, weights=parse_weights(args.weights))
    recipe = advise.read_recipe(args.config, args.set)
    speed, main = None, True
    if args.throughput is not None:
        if not 0 < args.throughput < math.inf:
            raise UserError(f"--throughput {args.throughput} is not a number of images a second: give one above 0")
        speed = Speed.of_throughput(args.throughput, recipe.train)
    if args.benchmark:
        from dp4tl_dist.train.benchmark import measure
        from dp4tl_dist.world import joined

        with joined(recipe.engine.device, timeout_s=recipe.engine.timeout_s) as world:
            speed, main = measure(advise.with_paths(recipe, args.source, args.val), world), world.is_main
    surrogates = args.surrogate or advise.surrogates_of(advice.cast)
    costs = None
    if speed is not None:
        read = [advise.read_surrogate(path, allow_incomplete=args.allow_incomplete) for path in surrogates]
        costs = advise.costs_of(advice, recipe.train, speed, read, args.val)
    influence = None
    if args.influence is not None:
        from dp4tl_dist.prune.influence import load_influence

        influence = load_influence(args.influence, beton=advice.beton)
    found = advise.advise(advice, costs, influence)
    if main:
        say(json.dumps(found, indent=2) if args.json else as_text(found))


def as_text(found: dict[str, Any]) -> str:
    """What a reader wants first: whose votes, the sizes in a table, the suggestion and its reason."""
    from dp4tl_dist.advise import clock

    zero, suggestion, costs = found["zero_votes"], found["suggestion"], found["costs"]
    lines = [
        f"{found['num_voters']} images of {found['num_targets']} target(s) voted for "
        f"{found['num_classes'] - len(zero['classes'])} of {found['num_classes']} classes; the other "
        f"{len(zero['classes'])} ({zero['samples']} samples) got no vote",
        f"{'keep':>7} {'classes':>8} {'samples':>9} {'MiB':>9} {'votes':>7}"
        + (f" {'time*':>9} {'speed-up':>9}" if costs else ""),
    ]
    lines[:0] = [f"note: voted before its training's end: {line}" for line in found["unfinished"]]
    for size in found["sizes"]:
        time = "-" if size["hours"] is None else clock(size["hours"] * 3600)
        gain = "-" if size["speed_up"] is None else f"{size['speed_up']:.2f}x"
        lines.append(
            f"{size['keep']:>7.3g} {size['classes']:>8} {size['samples']:>9} {size['bytes'] / 2**20:>9.1f} "
            f"{100 * size['coverage']:>5.1f} %"
            + (f" {time:>9} {gain:>9}" if costs else "")
            + (f"  {', '.join(size['notes'])}" if size["notes"] else "")
        )
    if costs:
        parts = f"surrogate {clock(costs['surrogate_s'])}, vote {clock(costs['vote_s'])}"
        known = parts if costs["surrogate_s"] else "the surrogate's cost is not known: name it with --surrogate"
        lines.append(f"* at {costs['speed']['images_per_s']:.0f} images/s, with the selection ({known})")
    if found["agreement"]:
        tops = ", ".join(f"{item['overlap']:.2f} of the first {item['k']}" for item in found["agreement"]["top"])
        lines.append(f"agreement with brute force: Spearman {found['agreement']['spearman']:.2f}; in common: {tops}")
    lines.append(f"suggested: keep {suggestion['keep']:.3g} ({suggestion['classes']} classes): {suggestion['reason']}")
    return "\n".join(lines)


def sweep(verbs: Verbs) -> None:
    parser = add_verb(verbs, "sweep", run_sweep, "Run every combination of methods, sizes, surrogates and more.")
    add_config(parser, required=True)
    parser.add_argument("--out", type=Path, required=True, help="the run folder")
    parser.add_argument("--nproc", type=number, help="ranks of each training, voting and transfer stage")
    parser.add_argument("--dry-run", action="store_true", help="only list what would run")
    parser.add_argument("--tables", action="store_true", help="run nothing: write the tables of what is done")


def run_sweep(args: argparse.Namespace) -> None:
    from dp4tl_dist.log import say
    from dp4tl_dist.pipeline import run
    from dp4tl_dist.stages import Graph
    from dp4tl_dist.sweep import read_sweep
    from dp4tl_dist.sweep_files import write_tables

    nproc = [f"nproc={args.nproc}"] if args.nproc is not None else []
    config = read_sweep(args.config, [*args.set, *nproc])
    if not args.tables:
        run(config, out=args.out, dry_run=args.dry_run)
    if not args.dry_run:
        from dp4tl_dist.report.html import write_report

        write_tables(Graph(config, args.out))
        say(f"report: {write_report(args.out)}")  # anew: it shows the tables


def influence(verbs: Verbs) -> None:
    parser = add_verb(
        verbs, "influence", run_influence, "Find what each source class does for a target, by many small models."
    )
    add_config(parser, required=True)
    parser.add_argument("--masks", type=number, help="how many models, each on a random half of the classes")
    parser.add_argument("--worker", default="0/1", metavar="I/N", help="this is worker I (from 0) of N on one --out")
    add_out(parser, "the influences, an .npz file; the models' results are kept beside it, in OUT.run")


def run_influence(args: argparse.Namespace) -> None:
    from dp4tl_dist.config import load_config
    from dp4tl_dist.errors import UserError
    from dp4tl_dist.files import check_output
    from dp4tl_dist.influence import influence
    from dp4tl_dist.influence_config import InfluenceConfig
    from dp4tl_dist.world import joined

    index, _, count = args.worker.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--worker {args.worker} is not of the form I/N with I from 0 to N - 1, like 0/4")
    masks = [f"masks={args.masks}"] if args.masks is not None else []
    config = load_config(InfluenceConfig, args.config, [*args.set, *masks])
    store = args.out.with_name(args.out.name + ".run")
    check_output(args.out, force=args.force, inputs=[config.source, config.target, args.config], folders=[store])
    with joined(config.engine.device, timeout_s=config.engine.timeout_s) as world:
        influence(config, out=args.out, worker=(int(index), int(count)), world=world, force=args.force)
