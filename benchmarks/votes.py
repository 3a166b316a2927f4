"""Counting votes (LM, FM), and choosing classes by them, at ImageNet's size: the part after the network.

Peers: the published code's way of doing it, in the same words of torch, where its loop over images and classes runs on
a few images only, and times are compared for one image; and what a user would write in plain float32.
"""

import argparse
import os
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import harness
import numpy as np
import torch
import votes_ranks
from harness import Bench, Case, Workers, rank_environs
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.data.beton import RAW, BetonWriter, open_beton
from dp4tl_dist.prune.make import prune
from dp4tl_dist.prune.votes_file import Votes, save_votes

SIZES = ("classes", "dim", "lm_targets", "fm_targets", "source", "threads")


def start_ranks(num_ranks: int, arguments: argparse.Namespace) -> Workers:
    """Ranks that answer to "lm", "fm" and "means"."""
    script = Path(__file__).with_name("votes_ranks.py")
    sizes = [f"--{name.replace('_', '-')}={getattr(arguments, name)}" for name in SIZES]
    return Workers([[str(script), *sizes]] * num_ranks, rank_environs(num_ranks))


def our_cases(what: str, items: int, ranks: dict[int, Workers]) -> list[Case]:
    names = {count: f"dp4tl {count} rank{'s' if count > 1 else ''}" for count in ranks}
    note = "sums are exact: the same bits for any batches and ranks"
    return [
        Case(names[count], partial(workers, what), items, "" if i else note)
        for i, (count, workers) in enumerate(ranks.items())
    ]


# ---------------------------------------------------------------- the peers


def lm_published(logits: Tensor) -> Tensor:
    predictions = torch.cat([rows.argmax(dim=-1) for rows in logits.split(1024)])
    return torch.Tensor([(predictions == i).sum() for i in range(logits.shape[1])]).int()


def lm_plain(logits: Tensor) -> tuple[Tensor, Tensor]:
    mass = torch.zeros(logits.shape[1])
    for rows in logits.split(votes_ranks.BATCH_SIZE):
        mass += rows.softmax(dim=1).sum(dim=0)
    return torch.bincount(logits.argmax(dim=1), minlength=logits.shape[1]), mass


def fm_published(features: Tensor, centres: Tensor) -> Tensor:
    votes = torch.zeros(len(centres))
    for feature in features:
        distances = torch.zeros(len(centres))
        for i in range(len(centres)):
            distances[i] = torch.norm(feature - centres[i], p=2)
        votes[distances.argmin()] += 1
    return votes


def fm_plain(features: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    votes, affinity = torch.zeros(len(centres), dtype=torch.int64), torch.zeros(len(centres))
    for rows in features.split(votes_ranks.BATCH_SIZE):
        distances = torch.cdist(rows, centres)
        votes += torch.bincount(distances.argmin(dim=1), minlength=len(centres))
        affinity -= distances.sum(dim=0)
    return votes, affinity


def means_published(features_of_class: list[list[NDArray[np.float32]]]) -> list[Tensor]:
    return [torch.tensor(np.array(features)).mean(dim=0) for features in features_of_class]


def means_plain(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    sums = torch.zeros(classes, features.shape[1]).index_add_(0, labels, features)
    return sums / torch.bincount(labels, minlength=classes)[:, None]


# ---------------------------------------------------------------- the questions


def compare_lm(bench: Bench, arguments: argparse.Namespace, ranks: dict[int, Workers]) -> None:
    classes, n = arguments.classes, arguments.lm_targets
    logits = votes_ranks.draw(n, classes, seed=0)
    cases = [
        *our_cases("lm", n, ranks),
        Case("published", lambda: lm_published(logits), n, "argmax, then one comparison for each class; no affinity"),
        Case("plain", lambda: lm_plain(logits), n, "argmax, bincount and float32 softmax sums"),
    ]
    bench.compare(f"LM votes of {n} images over {classes} classes", cases, unit="images")


def compare_fm(bench: Bench, arguments: argparse.Namespace, ranks: dict[int, Workers]) -> None:
    classes, dim, few, n = arguments.classes, arguments.dim, arguments.published_targets, arguments.fm_targets
    features, centres = votes_ranks.draw(n, dim, seed=1), votes_ranks.draw(classes, dim, seed=4)
    note = f"a Python loop over images and classes, on {few} images; its wrong slot mended"
    cases = [
        *our_cases("fm", n, ranks),
        Case("published", lambda: fm_published(features[:few], centres), few, note),
        Case("plain", lambda: fm_plain(features, centres), n, "float32 cdist, argmin, sums"),
    ]
    bench.compare(f"FM votes of {n} images over {classes} centres of {dim}", cases, unit="images")


def compare_means(bench: Bench, arguments: argparse.Namespace, ranks: dict[int, Workers]) -> None:
    classes, n = arguments.classes, arguments.source
    features, labels = votes_ranks.draw(n, arguments.dim, seed=2), votes_ranks.labels_of(n, classes)
    rows_of_class: list[list[NDArray[np.float32]]] = [[] for _ in range(classes)]
    for row, label in zip(features.numpy(), labels.tolist(), strict=True):
        rows_of_class[label].append(row)
    cases = [
        *our_cases("means", n, ranks),
        Case("published", lambda: means_published(rows_of_class), n, "class by class, of features it keeps as lists"),
        Case("plain", lambda: means_plain(features, labels, classes), n, "float32 index_add, all in memory"),
    ]
    bench.compare(f"class means of {n} source images, {arguments.dim} features", cases, unit="images")


def compare_prune(bench: Bench, arguments: argparse.Namespace) -> None:
    """The verb itself, on a beton of as many samples, each a single raw pixel."""
    n, classes, generator = arguments.prune_samples, arguments.classes, np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        source, file, out = Path(name, "source.beton"), Path(name, "votes.npz"), Path(name, "subset.npz")
        with BetonWriter(source, capacity=n) as writer:
            for i, label in enumerate(generator.integers(classes, size=n).tolist()):
                writer.add(b"\0\0\0", height=1, width=1, label=label, identifier=i, mode=RAW)
            names = tuple(map(str, range(classes)))
            writer.finish(names, {})
        predictions = generator.integers(classes, size=arguments.lm_targets)
        votes = np.bincount(predictions, minlength=classes)[None].astype(np.int64)
        affinity, sizes = generator.random((1, classes)), np.array([arguments.lm_targets])
        meta: dict[str, Any] = {"inputs": {"source": open_beton(source).fingerprint}}
        save_votes(file, Votes(votes, affinity, predictions, sizes, "lm", names, meta))
        run = partial(prune, source=source, out=out, votes=file, keep=0.5, force=True)
        case = Case("dp4tl", run, n, "opening and checking the beton and the votes, choosing, writing the subset")
        bench.compare(f"prune {n} samples of {classes} classes", [case], unit="samples", aim="under 2 s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    votes_ranks.add_sizes(parser)
    parser.add_argument("--published-targets", type=int, default=20, help="images for the published FM loop")
    parser.add_argument("--prune-samples", type=int, default=1_281_167)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    arguments = harness.parse(parser)
    bench = Bench("votes", arguments)
    torch.set_num_threads(arguments.threads or len(os.sched_getaffinity(0)))
    with ExitStack() as stack, torch.inference_mode():
        ranks = {count: stack.enter_context(start_ranks(count, arguments)) for count in arguments.ranks}
        for compare in (compare_lm, compare_fm, compare_means):
            compare(bench, arguments, ranks)
    compare_prune(bench, arguments)
    bench.finish()


if __name__ == "__main__":
    main()
