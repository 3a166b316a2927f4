"""The verbs that choose samples: vote, cluster, score, prune. A verb imports what it needs when it runs."""

import argparse
from pathlib import Path

from dp4tl_dist.arguments import Verbs, add_allow_incomplete, add_out, add_verb, number, seed, side, workers


def vote(verbs: Verbs) -> None:
    parser = add_verb(verbs, "vote", run_vote, "Let a surrogate vote for the source classes that matter to a target.")
    parser.add_argument("--method", choices=("lm", "fm"), required=True, help="label mapping or feature mapping")
    parser.add_argument("--surrogate", type=Path, required=True, help="a checkpoint folder or a run folder")
    parser.add_argument(
        "--target", type=Path, action="append", required=True, help="a target's training beton; may be repeated"
    )
    parser.add_argument("--source", type=Path, help="the source beton (fm: its class means are the centres)")
    parser.add_argument("--clusters", type=Path, help="fm: a clusters file, whose centres take the classes' place")
    add_view(parser)
    add_out(parser, "the votes, an .npz file")


def add_view(parser: argparse.ArgumentParser) -> None:
    """How a surrogate looks at images, and on what."""
    parser.add_argument("--batch-size", type=number, default=256)
    parser.add_argument(
        "--resolution",
        type=side,
        help="side of the centre crop (default: the surrogate's validation side)",
    )
    parser.add_argument("--workers", type=workers, default=0, help="decoding threads a rank; 0 shares the cores")
    add_allow_incomplete(parser, "--surrogate")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on CUDA")


def run_vote(args: argparse.Namespace) -> None:
    from dp4tl_dist.files import check_output
    from dp4tl_dist.log import say
    from dp4tl_dist.world import joined

    check_output(args.out, force=args.force)
    from dp4tl_dist.prune.make import vote

    with joined(args.device) as world:
        summary = vote(world, method=args.method, surrogate=args.surrogate, targets=args.target, source=args.source,
                       clusters=args.clusters, out=args.out, batch_size=args.batch_size, resolution=args.resolution,
                       num_workers=args.workers, precision=args.precision, force=args.force,
                       allow_incomplete=args.allow_incomplete)  # fmt: skip
        if world.is_main:
            say(f"{args.out}: {summary}")


def cluster(verbs: Verbs) -> None:
    parser = add_verb(verbs, "cluster", run_cluster, "Cluster the source by what a surrogate sees in it (k-means).")
    parser.add_argument("--surrogate", type=Path, required=True, help="a checkpoint folder or a run folder")
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    parser.add_argument("--clusters", type=number, required=True, metavar="K", help="how many clusters to make")
    parser.add_argument(
        "--init", choices=("kmeans++", "sample"), default="kmeans++",
        help="the first centres: samples far from each other, or any (default: kmeans++)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of the start")
    parser.add_argument("--iterations", type=number, default=100, help="at most so many (default: 100)")
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="stop where inertia falls by less than this share (default: 1e-4)"
    )
    parser.add_argument("--store", type=Path, help="folder for the features (default: OUT.features)")
    parser.add_argument(
        "--store-precision", choices=("float32", "float16"), default="float32", help="of the features on disk"
    )
    add_view(parser)
    add_out(parser, "the clusters, an .npz file")


def run_cluster(args: argparse.Namespace) -> None:
    from dp4tl_dist.files import check_output
    from dp4tl_dist.log import say
    from dp4tl_dist.world import joined

    check_output(args.out, force=args.force)
    from dp4tl_dist.prune.cluster import cluster

    with joined(args.device) as world:
        summary = cluster(world, surrogate=args.surrogate, source=args.source, num_clusters=args.clusters,
                          out=args.out, start=args.init, seed=args.seed, iterations=args.iterations,
                          tolerance=args.tolerance, store=args.store, store_precision=args.store_precision,
                          batch_size=args.batch_size, resolution=args.resolution, num_workers=args.workers,
                          precision=args.precision, force=args.force,
                       allow_incomplete=args.allow_incomplete)  # fmt: skip
        if world.is_main:
            say(f"{args.out}: {summary}")


def score(verbs: Verbs) -> None:
    parser = add_verb(verbs, "score", run_score, "Score every sample of a source, for `prune --scores`.")
    parser.add_argument(
        "--method", required=True,
        choices=("el2n", "grand", "moderate", "herding", "k-centre", "retrieval", "forgetting", "cld"),
    )  # fmt: skip
    parser.add_argument(
        "--surrogate", type=Path, action="append", required=True,
        help="a checkpoint folder or a run folder; repeated: the mean of their scores. forgetting and cld read the "
        "losses that its run logged (log.sample_losses)",
    )  # fmt: skip
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    parser.add_argument(
        "--target", type=Path, action="append", default=[], help="retrieval: a target's training beton; may be repeated"
    )
    parser.add_argument("--full-gradient", action="store_true", help="grand: by all parameters, not the head's alone")
    add_view(parser)
    add_out(parser, "the scores, an .npz file")


def run_score(args: argparse.Namespace) -> None:
    from dp4tl_dist.files import check_output
    from dp4tl_dist.log import say
    from dp4tl_dist.world import joined

    check_output(args.out, force=args.force)
    from dp4tl_dist.prune.score import score

    with joined(args.device) as world:
        summary = score(world, method=args.method, surrogates=args.surrogate, source=args.source, targets=args.target,
                        out=args.out, full_gradient=args.full_gradient, batch_size=args.batch_size,
                        resolution=args.resolution, num_workers=args.workers, precision=args.precision,
                        force=args.force, allow_incomplete=args.allow_incomplete)  # fmt: skip
        if world.is_main:
            say(f"{args.out}: {summary}")


def prune(verbs: Verbs) -> None:
    parser = add_verb(verbs, "prune", run_prune, "Choose the source samples to keep.")
    parser.add_argument("--source", type=Path, required=True, help="the source beton")
    parser.add_argument(
        "--votes", type=Path, nargs="+", action="extend", metavar="V.npz",
        help="keep the classes with the most votes; of several files the votes count together",
    )  # fmt: skip
    parser.add_argument("--scores", type=Path, help="keep the samples that a scores file puts first")
    parser.add_argument(
        "--random", choices=("classes", "samples", "balanced"),
        help="keep classes or samples drawn by --seed; balanced: the same share of the samples of every class",
    )  # fmt: skip
    parser.add_argument("--influence", type=Path, help="keep the classes that `influence` found most helpful")
    parser.add_argument("--list", type=Path, help="keep the classes that a text file names, one a line")
    parser.add_argument(
        "--within-class", metavar="SCORES:SHARE",
        help="of the kept classes' samples, keep this share: the best by a scores file or the method of --scores "
        "(moderate:0.5), or random:SHARE",
    )  # fmt: skip
    parser.add_argument(
        "--class-balanced", action=argparse.BooleanOptionalAction,
        help="with --scores or --random samples: the same share of every class, or not (default: as the method says)",
    )  # fmt: skip
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--keep", type=share_or_auto, help="share of the classes (or samples) to keep, in (0, 1]; auto: see `advise`"
    )
    amount.add_argument("--keep-classes", type=number, help="number of classes to keep")
    amount.add_argument("--coverage", type=float, help="the fewest classes that hold this share of the votes")
    amount.add_argument("--like", type=Path, metavar="X.npz", help="as many classes (or samples) as this subset keeps")
    parser.add_argument(
        "--combine", choices=("normalised", "max", "counts", "sum"), default="normalised",
        help="how the votes of several targets count together (default: each target's sum to 1; sum is counts)",
    )  # fmt: skip
    parser.add_argument("--weights", metavar="W,W,...", help="weight of each target's votes, in their order")
    parser.add_argument("--reverse", action="store_true", help="keep what the ranking puts last (a check)")
    parser.add_argument("--seed", type=seed, default=0, help="of --random")
    parser.add_argument(
        "--apply-to", type=Path, metavar="VAL.beton", help="prune the validation set alike, into OUT.val.npz"
    )
    add_out(parser, "the subset, an .npz file")


def run_prune(args: argparse.Namespace) -> None:
    from dp4tl_dist.log import say
    from dp4tl_dist.prune.make import prune

    summary = prune(source=args.source, out=args.out, votes=args.votes, influence=args.influence, scores=args.scores,
                    random=args.random, list_file=args.list, within=args.within_class,
                    balanced=args.class_balanced, keep=args.keep, keep_classes=args.keep_classes,
                    coverage=args.coverage, like=args.like, reverse=args.reverse, combine=args.combine,
                    weights=parse_weights(args.weights), seed=args.seed, apply_to=args.apply_to,
                    force=args.force)  # fmt: skip
    say(f"{args.out}: {summary}")


def share_or_auto(text: str) -> "float | str":
    """ "0.4" -> 0.4, "auto" -> "auto"; argparse tells the user of anything else."""
    return text if text == "auto" else float(text)


def parse_weights(text: str | None) -> list[float] | None:
    """ "2,1" -> [2.0, 1.0]"""
    from dp4tl_dist.errors import UserError

    try:
        return None if text is None else [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"--weights {text!r} is not a list of numbers like 2,1") from error
