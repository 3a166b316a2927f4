"""Step time of DDP and of DeepSpeed's ZeRO stages over several ranks, and what each step of an attack adds.

Peers of DDP are the stages; peer of plain training is training under FGSM and PGD of 1, 2 and 3 steps. Pixels lie on
the device already.
"""

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

import harness
import torch
from harness import Bench, Case, Workers, rank_environs
from train_step import Point, command, missing, point

ENGINES = {"ddp": ["--engine=ddp"], **{f"zero{i}": ["--engine=deepspeed", f"--zero={i}"] for i in range(4)}}
ATTACKS = {"plain": 0, "fgsm": 1, "pgd1": 1, "pgd2": 2, "pgd3": 3}


def memory(workers: Workers, seconds: float) -> Mapping[str, float | str]:
    return {"memory MiB": float(workers("memory"))}


def compare_engines(bench: Bench, arguments: argparse.Namespace, where: Point) -> None:
    with ExitStack() as stack:
        cases = []
        for name, more in ENGINES.items():
            if name != "ddp" and (why := missing("deepspeed")):
                bench.skip(name, why)
                continue
            commands = [command(arguments, where, more)] * arguments.ranks
            workers = stack.enter_context(Workers(commands, rank_environs(arguments.ranks)))
            cases.append(Case(name, workers, where.batch_size * arguments.steps, facts=partial(memory, workers)))
        title = f"{where}: {arguments.steps} steps of {arguments.ranks} ranks on {arguments.device}"
        bench.compare(title, cases, unit="images")


def compare_attacks(bench: Bench, arguments: argparse.Namespace, where: Point) -> None:
    with ExitStack() as stack:
        cases = []
        for name, steps in ATTACKS.items():
            more = [f"--attack-steps={steps}", *(["--fgsm"] if name == "fgsm" else [])]
            workers = stack.enter_context(Workers([command(arguments, where, more)]))
            cases.append(Case(name, workers, where.batch_size * arguments.steps, f"{steps} passes more"))
        bench.compare(f"{where}: {arguments.steps} steps under attack on {arguments.device}", cases, unit="images")
    rows = {row["name"]: row for row in bench.comparisons[-1]["rows"]}
    for name, steps in ATTACKS.items():
        if steps and name in rows and "plain" in rows:
            # Of a whole plain step: forward, backward and optimizer.
            rows[name]["facts"]["per attack step, x plain"] = (rows[name]["ratio_of_medians"] - 1) / steps


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__)
    usual = "resnet50@192x256" if cuda else "resnet18@64x32"
    parser.add_argument("--point", type=point, default=point(usual), metavar="ARCH@SIDExBATCH",
                        help=f"default here: {usual}")  # fmt: skip
    parser.add_argument("--steps", type=int, default=20 if cuda else 3, help="timed steps of a run, after one")
    parser.add_argument("--ranks", type=int, default=max(1, torch.cuda.device_count()) if cuda else 2)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    arguments = harness.parse(parser, runs=5)
    bench = Bench("engines", arguments)
    compare_engines(bench, arguments, arguments.point)
    compare_attacks(bench, arguments, arguments.point)
    bench.finish()


if __name__ == "__main__":
    main()
