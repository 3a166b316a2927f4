"""One rank that trains on the same made-up batch over and over; see `harness.serve`. Beside "run" it answers to
"memory": its highest use, in MiB."""

import argparse
import time
from collections.abc import Callable

import harness
import memory
import torch
from harness import Seconds
from torch import Tensor, nn

from dp4tl_dist.config import AdversarialConfig, EngineConfig, OptimConfig
from dp4tl_dist.data.loader import Batch
from dp4tl_dist.models import build_model, normalise
from dp4tl_dist.train import engine as engines
from dp4tl_dist.train.adversarial import Adversarial
from dp4tl_dist.train.task import Supervised
from dp4tl_dist.world import World, joined

CLASSES = 1000


def draw(arguments: argparse.Namespace, world: World) -> Batch:
    """This rank's part of the global batch, as the loader gives it: uint8, channels last."""
    count, draws = arguments.batch_size // world.num_ranks, torch.Generator().manual_seed(world.rank)
    images = torch.randint(256, (count, 3, arguments.side, arguments.side), dtype=torch.uint8, generator=draws)
    layout = torch.contiguous_format if arguments.contiguous or arguments.reference else torch.channels_last
    labels = torch.randint(CLASSES, (count,), generator=draws)
    where = world.device
    return Batch(images.contiguous(memory_format=layout).to(where), labels.to(where), torch.arange(count).to(where))


def ours(arguments: argparse.Namespace, world: World) -> Callable[[], object]:
    """A step of this project's engine."""
    config = EngineConfig.model_validate(
        {
            "kind": arguments.engine, "zero": arguments.zero, "precision": arguments.precision,
            "compile": arguments.compile, "channels_last": not arguments.contiguous,
        }
    )  # fmt: skip
    model, optim = build_model(arguments.arch, CLASSES).train(), OptimConfig(batch_size=arguments.batch_size)
    task = Supervised(model)
    if arguments.attack_steps:
        attack = AdversarialConfig(steps=arguments.attack_steps, fast="fgsm" if arguments.fgsm else "none")
        task = Adversarial(model, attack, seed=0, label_smoothing=0.0)
    engine = engines.make_engine(world, task, optim, config)
    batch = draw(arguments, world)
    return lambda: engine.step(batch, lr=0.01)


def reference(arguments: argparse.Namespace, world: World) -> Callable[[], object]:
    """A step as in torchvision's reference scripts, with mixed precision where there is a GPU."""
    cuda = world.device != "cpu"
    model = build_model(arguments.arch, CLASSES).to(world.device).train()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-5)
    scaler = torch.amp.GradScaler("cuda") if cuda else None
    batch = draw(arguments, world)
    images: Tensor = normalise(batch.images)  # the reference gets floats from its transforms

    def step() -> float:
        with torch.autocast("cuda", torch.float16, enabled=cuda):
            loss = criterion(model(images), batch.labels)
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        return float(loss.item())

    return step


class Rank:
    """Answers to what the benchmark asks."""

    def __init__(self, arguments: argparse.Namespace, world: World) -> None:
        self.steps, self.cuda = arguments.steps, world.device != "cpu"
        self.step = (reference if arguments.reference else ours)(arguments, world)

    def answer(self, what: str) -> Seconds:
        if what == "memory":
            used = torch.cuda.max_memory_allocated() / 2**20 if self.cuda else memory.resident("VmHWM")
            return Seconds(used)
        return Seconds(self.run())

    def run(self) -> float:
        self.step()  # memory that the run before gave back is asked for again
        self.settle()
        start = time.perf_counter()
        for _ in range(self.steps):
            self.step()
        self.settle()
        seconds = time.perf_counter() - start
        if self.cuda:
            torch.cuda.empty_cache()  # the other cases' processes share the device
        return seconds

    def settle(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", required=True)
    parser.add_argument("--side", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True, help="global: the sum over the ranks")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--compile", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--contiguous", action="store_true")
    parser.add_argument("--engine", choices=("ddp", "deepspeed"), default="ddp")
    parser.add_argument("--zero", type=int, choices=range(4), default=1, help="DeepSpeed's stage")
    parser.add_argument("--attack-steps", type=int, default=0, help="train on images under PGD of so many steps")
    parser.add_argument("--fgsm", action="store_true", help="the attack is FGSM from a random start")
    parser.add_argument("--reference", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with joined(arguments.device, timeout_s=600) as world:
        harness.serve(Rank(arguments, world).answer)


if __name__ == "__main__":
    main()
