"""Images a second, step time and memory of one optimizer step, from pixels that lie on the device already.

Peer: the loop that people write after torchvision's reference: contiguous memory, no compilation, on CUDA float16
autocast with a gradient scaler, and the loss read at every step. Beside it this project's own settings, one changed at
a time, and its two engines over several ranks.
"""

import argparse
import re
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harness
import torch
from harness import Bench, Case, Workers, rank_environs
from workers import PASSIVE

from dp4tl_dist.config import EngineConfig
from dp4tl_dist.errors import UserError
from dp4tl_dist.models import ARCHITECTURES, build_model
from dp4tl_dist.train.engine import check_engine

SCRIPT = Path(__file__).with_name("train_step_worker.py")
# Dense bf16 with fp32 accumulation, from the makers' data sheets.
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 4090": 165, "V100": 125}
VARIANTS = {
    "dp4tl": ([], "its defaults"),
    "dp4tl-fp32": (["--precision", "fp32"], "no autocast (TF32 on CUDA)"),
    "dp4tl-bf16": (["--precision", "bf16"], "autocast"),
    "dp4tl-contiguous": (["--contiguous"], "images and weights not channels last"),
    "dp4tl-eager": (["--compile", "off"], "no torch.compile"),
    "dp4tl-compiled": (["--compile", "on"], "torch.compile"),
    "reference": (["--reference"], "the peer's loop"),
}


class Point(NamedTuple):
    """What is trained on: ARCH@SIDExBATCH."""

    arch: str
    side: int
    batch_size: int

    def __str__(self) -> str:
        return f"{self.arch}@{self.side}x{self.batch_size}"

    @property
    def arguments(self) -> list[str]:
        return [f"--arch={self.arch}", f"--side={self.side}", f"--batch-size={self.batch_size}"]


def point(text: str) -> Point:
    found = re.fullmatch(r"(\w+)@(\d+)x(\d+)", text)
    if not found or found[1] not in ARCHITECTURES:
        raise argparse.ArgumentTypeError(f"{text!r} is not ARCH@SIDExBATCH with one of {', '.join(ARCHITECTURES)}")
    return Point(found[1], int(found[2]), int(found[3]))


def flops_of_image(where: Point) -> float:
    """Floating-point operations of the forward and the backward pass of one image (a multiply-add is two)."""
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        images = torch.empty(1, 3, where.side, where.side)
        build_model(where.arch, 1000).train()(images.expand(2, -1, -1, -1)).sum().backward()
    return counter.get_total_flops() / 2


def facts(workers: Workers, flops: float, peak: float | None, seconds: float) -> Mapping[str, float | str]:
    """Memory of the largest process; arithmetic (`flops` a run), and its share of the device's peak where known."""
    rate = flops / seconds / 1e12
    share = {"MFU %": 100 * rate / peak} if peak else {}
    return {"memory MiB": float(workers("memory")), "TFLOP/s": rate, **share}


def command(arguments: argparse.Namespace, where: Point, more: list[str]) -> list[str]:
    return [str(SCRIPT), *where.arguments, f"--steps={arguments.steps}", f"--device={arguments.device}", *more]


def compare_variants(bench: Bench, arguments: argparse.Namespace, where: Point, peak: float | None) -> None:
    with ExitStack() as stack:
        cases, images = [], where.batch_size * arguments.steps
        flops = flops_of_image(where) * images
        for name in arguments.variants:
            more, note = VARIANTS[name]
            environ = {} if name == "reference" else PASSIVE  # torch's own default, and this project's
            workers = stack.enter_context(Workers([command(arguments, where, more)], [environ]))
            cases.append(Case(name, workers, images, note, facts=partial(facts, workers, flops, peak)))
        bench.compare(f"{where}: {arguments.steps} steps on {arguments.device}", cases, unit="images")


def compare_engines(bench: Bench, arguments: argparse.Namespace, where: Point) -> None:
    """The global batch split over ranks, by each engine that is here."""
    ranks, images = arguments.ranks, where.batch_size * arguments.steps
    with ExitStack() as stack:
        cases = []
        for kind in arguments.engines:
            if why := missing(kind):
                bench.skip(kind, why)
                continue
            commands = [command(arguments, where, ["--engine", kind])] * ranks
            workers = stack.enter_context(Workers(commands, [environ | PASSIVE for environ in rank_environs(ranks)]))
            flops = flops_of_image(where) * images
            cases.append(Case(kind, workers, images, facts=partial(facts, workers, flops, None)))
        if cases:
            of_ranks = f"{ranks} rank{'s' if ranks > 1 else ''}"
            bench.compare(f"{where}: {arguments.steps} steps of {of_ranks} on {arguments.device}", cases, unit="images")


def missing(kind: str) -> str:
    """Why this engine cannot run here; empty where it can."""
    try:
        check_engine(EngineConfig.model_validate({"kind": kind}))
    except UserError as error:
        return str(error)
    return ""


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    usual = "resnet18@160x1024 resnet50@192x256 resnet101@224x256" if cuda else "resnet18@160x16 resnet50@160x8"
    parser.add_argument("--points", nargs="+", type=point, default=[point(text) for text in usual.split()],
                        metavar="ARCH@SIDExBATCH", help=f"default here: {usual}")  # fmt: skip
    variants = ["dp4tl", "dp4tl-fp32" if cuda else "dp4tl-bf16", "dp4tl-contiguous", *(["dp4tl-eager"] if cuda else [])]
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*variants, "reference"])
    parser.add_argument(
        "--steps", type=int, default=20 if cuda else 2, help="timed steps of a run, after one that is not"
    )
    parser.add_argument("--engines", nargs="*", choices=("ddp", "deepspeed"), default=["ddp", "deepspeed"])
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()) if cuda else 2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--peak-tflops", type=float, help="of the GPU in bf16, where it is not known here")
    arguments = harness.parse(parser, runs=3)
    peak = arguments.peak_tflops
    if arguments.device == "cuda" and not peak:
        name = torch.cuda.get_device_name()
        peak = next((float(value) for key, value in PEAK_TFLOPS.items() if key in name), None)
    bench = Bench("train_step", arguments)
    for where in arguments.points:
        compare_variants(bench, arguments, where, peak)
    if arguments.engines:
        compare_engines(bench, arguments, arguments.points[0])
    bench.finish()


if __name__ == "__main__":
    main()
