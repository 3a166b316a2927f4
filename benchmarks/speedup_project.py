"""What the published recipes would take on ImageNet, from rates that are measured here: a projection, no measurement.

An epoch of a recipe is its samples divided by the rate at that epoch's resolution. On CUDA the slower of the step and
the loader sets the rate; on a CPU both share the cores, and their times add up.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import images
from harness import Bench, Case, Workers

from dp4tl_dist.config import OptimConfig, TrainConfig, load_config
from dp4tl_dist.schedule import resolution

SAMPLES = 1_281_167
TARGETS = 10_000
"""Training images of the target: few have more."""
PRETRAIN, FULL, FAST = "resnet101", "resnet18-surrogate", "resnet18-surrogate-fast"
BATCH = {"cpu": {"resnet101": 4, "resnet18": 16}, "cuda": {"resnet101": 256, "resnet18": 1024}}
STEPS = {"cpu": 1, "cuda": 20}
DECODED = 250
HERE = Path(__file__).parent
Rate = Callable[[str, int], float]


def project(bench: Bench, arguments: argparse.Namespace, folder: Path, device: str, paper: Mapping[int, float]) -> None:
    """Measure the rates that the recipes need, and add up the hours of each pruning ratio."""
    recipes = {name: load_config(TrainConfig, name) for name in (PRETRAIN, FULL, FAST)}
    points = sorted({(recipe.model.arch, side) for recipe in recipes.values() for side in sides(recipe.train)})
    step, load = step_rates(bench, points, device), load_rates(bench, arguments, {side for _, side in points}, folder)

    def rate(arch: str, side: int) -> float:
        """Images a second of training."""
        if side not in load:
            return step[arch, side]
        ours = (step[arch, side], load[side])
        return min(ours) if device == "cuda" else 1 / sum(1 / each for each in ours)

    dense = hours(recipes[PRETRAIN], SAMPLES, rate)
    cost = {name: hours(recipes[name], SAMPLES, rate) for name in (FULL, FAST)}
    vote = {name: vote_hours(recipes[name], rate) for name in (FULL, FAST)}
    rows, kept = [], []
    for ratio in sorted({0, *arguments.ratios}):
        samples = SAMPLES * (100 - ratio) // 100
        pretrain = hours(recipes[PRETRAIN], samples, rate)
        chosen = {name: pretrain + (cost[name] + vote[name] if ratio else 0.0) for name in (FULL, FAST)}
        kept.append({"ratio": ratio, "samples": samples, "pretrain_h": pretrain,
                     "total_h": chosen[FAST], "speed_up": dense / chosen[FAST],
                     "total_full_h": chosen[FULL], "speed_up_full": dense / chosen[FULL]})  # fmt: skip
        rows.append({
            "pruned": f"{ratio} %", "samples": f"{samples}", "surrogate h": f"{cost[FAST] if ratio else 0:.3g}",
            "vote h": f"{vote[FAST] if ratio else 0:.2g}", "pretraining h": f"{pretrain:.4g}",
            "total h": f"{chosen[FAST]:.4g}", "speed-up": f"{dense / chosen[FAST]:.2f}",
            "published surrogate": f"{dense / chosen[FULL]:.2f}",
            "paper": f"{paper[ratio]:.2f}" if ratio in paper else "", "limit": f"{100 / (100 - ratio):.2f}",
        })  # fmt: skip
    title = f"PROJECTION from the rates above: {PRETRAIN} on {SAMPLES} images, {recipes[PRETRAIN].train.epochs} epochs"
    notes = [
        f"surrogate: {FAST}; published surrogate: {FULL}, {cost[FULL]:.3g} h and {vote[FULL]:.2g} h for its votes",
        f"vote: the forward passes of {TARGETS} target images at a third of a training step's time",
        "one device; not counted: starting, compiling, validation, checkpoints, talk among ranks",
        "loading: " + ("measured" if load else "NOT counted: pass --images"),
    ]
    bench.report(title, rows, notes)
    bench.keep("projection", kept)


def sides(train: OptimConfig) -> set[int]:
    return {resolution(train, epoch) for epoch in range(train.epochs)}


def hours(recipe: TrainConfig, samples: int, rate: Rate) -> float:
    """Of training `recipe` on that many samples."""
    each = (samples / rate(recipe.model.arch, resolution(recipe.train, i)) for i in range(recipe.train.epochs))
    return sum(each) / 3600


def vote_hours(recipe: TrainConfig, rate: Rate) -> float:
    """Of the target's pass: a third of a training step's arithmetic at the validation's resolution."""
    side = max(sides(recipe.train))
    return TARGETS / rate(recipe.model.arch, side) / 3 * (recipe.train.val_resolution / side) ** 2 / 3600


def step_rates(bench: Bench, points: list[tuple[str, int]], device: str) -> dict[tuple[str, int], float]:
    """Images a second of an optimizer step, by network and side."""
    with ExitStack() as stack:
        cases = []
        for arch, side in points:
            batch, steps = BATCH[device][arch], STEPS[device]
            command = [str(HERE / "train_step_worker.py"), f"--arch={arch}", f"--side={side}", f"--steps={steps}",
                       f"--batch-size={batch}", f"--device={device}"]  # fmt: skip
            cases.append(Case(f"{arch}@{side}", stack.enter_context(Workers([command])), batch * steps))
        bench.compare(f"training steps on {device}", cases, unit="images", peers=False, runs=3)
    rows = bench.comparisons[-1]["rows"]
    return {point: row["items_per_second"] for point, row in zip(points, rows, strict=True)}


def load_rates(bench: Bench, arguments: argparse.Namespace, wanted: set[int], folder: Path) -> dict[int, float]:
    """Images a second that this machine's cores decode, crop and resize, by side; {} without images."""
    if not (arguments.images or images.DEFAULT).exists():
        bench.skip("loading", "there are no images: pass --images DIR with DIR/<class>/<image>")
        return {}
    samples, classes = images.find(arguments.images, folder)
    beton, threads = folder / "images.beton", len(os.sched_getaffinity(0))
    images.write(samples, classes, DECODED, beton=beton, files=folder / "files")
    with ExitStack() as stack:
        cases = []
        for side in sorted(wanted):
            command = [str(HERE / "loader_peers.py"), "dp4tl", "--data", str(beton), f"--threads={threads}",
                       "--batch-size=50", f"--resolution={side}", "--serve"]  # fmt: skip
            cases.append(Case(f"{side} px", stack.enter_context(Workers([command])), DECODED))
        bench.compare(f"loading on {threads} cores", cases, unit="images", peers=False, runs=3)
    rows = bench.comparisons[-1]["rows"]
    return {side: row["items_per_second"] for side, row in zip(sorted(wanted), rows, strict=True)}
