"""The published time table on this machine and your data: surrogate, voting and pretraining at five pruning ratios.

Stages run one after another in one process that is warm, so that starting Python does not count; writing the betons
does not either. Peers: pretraining on everything; the published speed-ups; the limit 1 / (1 - ratio). The surrogate
whose time counts may be a small one: the full recipe's is trained beside it, and tells what the small one would have
chosen differently.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import harness
import passive  # noqa: F401 (before torch)
import torch
from harness import Bench
from speedup_project import project
from speedup_stages import SpeedupConfig, Stages, spread

from dp4tl_dist.config import load_config
from dp4tl_dist.errors import UserError
from dp4tl_dist.world import joined

CONFIG = Path(__file__).with_name("speedup.toml")
PAPER = {0: 1.0, 20: 1.17, 40: 1.54, 60: 2.25, 80: 4.15}
"""Pruning ratio in % -> speed-up with the surrogate's training and voting, from the poster."""


def measure(stages: Stages, arguments: argparse.Namespace, bench: Bench) -> None:
    config = stages.config
    for table in (config.surrogate, config.reference, config.pretrain):
        stages.warm_up(table)
    cheap = stages.surrogate("surrogate", config.surrogate)
    full = stages.surrogate("reference", config.reference)
    rows = [row(stages, ratio, arguments.runs, cheap, full) for ratio in sorted({0, *arguments.ratios})]
    dense = rows[0]["pretrain_s"]
    for found in rows:
        found["speed_up"] = dense / found["total_s"]
        found["speed_up_reference"] = dense / (found["pretrain_s"] + found["reference_s"])
    bench.report(
        "time to the pretrained model, the choice's cost included", [shown(found) for found in rows], notes(full)
    )
    bench.keep("ratios", rows)
    bench.keep("surrogates", {"surrogate": cheap, "reference": full})


def row(stages: Stages, ratio: int, runs: int, cheap: dict[str, Any], full: dict[str, Any]) -> dict[str, Any]:
    """One pruning ratio: the median of `runs` pretrainings, and what choosing cost."""
    subset, selection, reference, agreement = None, 0.0, 0.0, None
    if ratio:
        keep = (100 - ratio) / 100
        pruning, subset = stages.prune("surrogate", keep)
        selection = cheap["voting"] + pruning
        reference = full["seconds"] + full["voting"] + pruning
        agreement = stages.agreement("surrogate", "reference", keep)
    trainings = [stages.train(f"pretrain-{ratio}", stages.config.pretrain, subset) for _ in range(runs)]
    pretrain = spread([found["seconds"] for found in trainings])
    surrogate = cheap["seconds"] if ratio else 0.0
    return {
        "ratio": ratio, "samples": trainings[0]["samples"], "seen": trainings[0]["seen"], "surrogate_s": surrogate,
        "voting_s": selection, "pretrain_s": pretrain["median"], "pretrain": pretrain,
        "epoch": spread([seconds for found in trainings for seconds in found["epochs"]]),
        "reference_s": reference, "total_s": pretrain["median"] + surrogate + selection, "agreement": agreement,
    }  # fmt: skip


def shown(found: dict[str, Any]) -> dict[str, str]:
    """A row as a person reads it."""
    ratio, epoch = found["ratio"], found["epoch"]
    agreement = "" if found["agreement"] is None else f"{100 * found['agreement']:.0f} %"
    return {
        "pruned": f"{ratio} %", "samples": f"{found['samples']}", "surrogate s": f"{found['surrogate_s']:.2f}",
        "vote, prune s": f"{found['voting_s']:.2f}", "pretraining s": f"{found['pretrain_s']:.2f}",
        "an epoch s": f"{epoch['median']:.2f} ({epoch['min']:.2f} .. {epoch['max']:.2f})",
        "speed-up": f"{found['speed_up']:.2f}", "with full surrogate": f"{found['speed_up_reference']:.2f}",
        "paper": f"{PAPER[ratio]:.2f}" if ratio in PAPER else "", "limit": f"{100 / (100 - ratio):.2f}",
        "same classes": agreement,
    }  # fmt: skip


def notes(full: dict[str, Any]) -> list[str]:
    return [
        f"with full surrogate: had the reference voted, which takes {full['seconds']:.1f} s",
        "same classes: the share of the kept classes that the reference's votes keep, too",
        "paper: ImageNet and a ResNet-101 on GPUs; limit: 1 / (1 - ratio), a free choice",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=CONFIG, help="recipes as TOML (default: speedup.toml)")
    parser.add_argument("--source", help="a beton or a folder of <class>/<image>, instead of the config's")
    parser.add_argument("--target", help="likewise: the target's training images")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, as in `dp4tl train`")
    parser.add_argument("--ratios", type=int, nargs="+", default=list(PAPER), help="classes pruned, in %%")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--project", choices=("imagenet",), help="from measured rates, instead of running it all")
    parser.add_argument("--images", type=Path, help="for --project: images to measure decoding with")
    arguments = harness.parse(parser, runs=1, warmup=1)
    if not all(0 <= ratio < 100 for ratio in arguments.ratios):
        harness.refuse(f"--ratios {arguments.ratios} must be from 0 to 99")
    device = arguments.device if arguments.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    bench = Bench("speedup-" + arguments.project if arguments.project else "speedup", arguments)
    with tempfile.TemporaryDirectory() as name:
        if arguments.project:
            project(bench, arguments, Path(name), device, PAPER)
        else:
            origin = {key: value for key in ("source", "target") if (value := getattr(arguments, key))}
            overrides = [*arguments.set, *(f"{key}={value}" for key, value in origin.items())]
            try:
                config = load_config(SpeedupConfig, str(arguments.config), overrides)
            except UserError as error:
                harness.refuse(str(error))
            torch.set_num_threads(len(os.sched_getaffinity(0)))
            with joined(device, timeout_s=600) as world:
                measure(Stages(config, world, Path(name)), arguments, bench)
    bench.finish()


if __name__ == "__main__":
    main()
