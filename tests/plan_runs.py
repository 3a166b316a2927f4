"""Configs of whole runs, drawn at random and wild, on tiny data; and each stage of one, up to its first step, here."""

import contextlib
import functools
import io
from argparse import ArgumentParser
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
from data_factory import make_beton
from PIL import Image

import dp4tl_dist.transfer as transfer_module
from dp4tl_dist import models
from dp4tl_dist.cli import build_parser
from dp4tl_dist.config import TrainConfig, validate
from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.loader import CentreView
from dp4tl_dist.errors import UserError
from dp4tl_dist.influence import influence
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.recipes import TransferConfig, recipe
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.sides import trained_at
from dp4tl_dist.stage import Stage
from dp4tl_dist.stages import Graph
from dp4tl_dist.train import supervised
from dp4tl_dist.train.check import check_transfer
from dp4tl_dist.train.checkpoint import read_meta
from dp4tl_dist.train.engine import Engine
from dp4tl_dist.train.evaluate import Score, Split, evaluate
from dp4tl_dist.train.supervised import make_job
from dp4tl_dist.train.task import Task
from dp4tl_dist.transfer import transfer
from dp4tl_dist.world import World

Content = dict[str, Any]
METHODS = ("lm", "fm", "el2n", "grand", "moderate", "herding", "k-centre", "retrieval", "forgetting", "cld",
           "influence", "random", "random-samples", "random-balanced", "lm-reverse", "lm-joint", "lm+moderate",
           "random+random", "fm+el2n:0.5", "lm+retrieval")  # fmt: skip


def make_place(folder: Path) -> Path:
    """Sources and targets of a few images: betons, folders, and what is none."""
    folder.mkdir(exist_ok=True)
    make_beton(folder / "source.beton", num_classes=5, per_class=8)
    make_beton(folder / "val.beton", split="val", num_classes=5, per_class=2)
    make_beton(folder / "val4.beton", split="val", num_classes=4, per_class=2)
    for name, classes, count in (("t20", 4, 5), ("t6", 2, 3), ("t40", 4, 10), ("ones", 3, 1)):
        for split in ("train", "test"):
            make_beton(folder / f"{name}-{split}.beton", kind="target", split=split, num_classes=classes,
                       per_class=count)  # fmt: skip
    parts = {"images": (6, 6, 6), "images-test": (2, 2, 2), "uneven": (2, 5, 9, 3), "uneven-test": (1, 3, 1, 2)}
    for name, sizes in (parts | {"lone": (1, 1), "broken-test": (2,)}).items():
        for label, size in enumerate(sizes):
            (folder / name / f"class{label}").mkdir(parents=True)
            for i in range(size):
                noise = np.random.default_rng([label, i]).integers(0, 60, (20, 24, 3)) + 40 * label
                Image.fromarray(noise.astype(np.uint8)).save(folder / name / f"class{label}" / f"{i}.png")
    (folder / "empty" / "class0").mkdir(parents=True)
    (folder / "broken" / "class0").mkdir(parents=True)
    (folder / "broken" / "class0" / "0.png").symlink_to(folder / "nowhere.png")
    for i in range(1, 4):
        (folder / "broken" / "class0" / f"{i}.png").symlink_to(folder / "images" / "class0" / f"{i}.png")
    (folder / "none.beton").write_bytes(b"no beton")
    return folder


class Draw:
    """One config, a function of its seed. `wild` is how likely each part is one that cannot be."""

    def __init__(self, seed: int, place: Path, *, wild: float = 0.015) -> None:
        self.random, self.place, self.wild = Random(seed), place, wild

    def one(self, *good: Any, bad: tuple[Any, ...] = ()) -> Any:
        wild = bool(bad) and self.random.random() < self.wild
        return self.random.choice(bad if wild else good)

    def some(self, **tables: Any) -> Content:
        """Some of the keys, each with a value of its choices."""
        return {key: value for key, value in tables.items() if self.random.random() < 0.4}

    def path(self, *good: str, bad: tuple[str, ...] = ()) -> str:
        name = self.one(*good, bad=(*bad, "nowhere", "none.beton", "gone.beton", "empty", "torchvision:cifar10/train"))
        return name if name.startswith(("torchvision:", "synthetic:")) else str(self.place / name)

    def model(self) -> Content:
        arch = self.one("resnet_tiny", "resnet_tiny", "resnet_tiny", bad=("resnet999", "timm:nothing", "vit_b_16"))
        return {"arch": arch, **({"init": str(self.place / "nowhere")} if self.random.random() < self.wild else {})}

    def train(self) -> Content:
        return {
            "epochs": self.one(1, 2, 3), "batch_size": self.one(2, 4, 6, 6, bad=(1, 5, 40, 300)),
            "lr": self.one(0.01, 0.1, bad=("x",)), "peak_epoch": self.one(0, 1, bad=(9,)),
            "resolution": self.one(16, 24, 32, bad=(0, -1)), "val_resolution": self.one(16, 32, bad=(0,)),
            **self.some(
                start_resolution=self.one(8, 16, 48), ramp_end=self.one(0, 1, 2), ramp_start=self.one(0, 0, bad=(3,)),
                resolution_step=self.one(8, 16, bad=(64, 500)), accumulate=self.one(1, 1, 2, bad=(3,)),
                steps=self.one(1, 3), val_every=self.one(1, 2), optimizer=self.one("sgd", "adamw", bad=("lion",)),
                schedule=self.one("cosine", "constant"), clip_norm=1.0, label_smoothing=self.one(0.1, bad=(1.0,)),
            ),
            **({"typo": 1} if self.random.random() < self.wild else {}),
        }  # fmt: skip

    def stage(self, *, surrogate: bool) -> Content:
        kind = self.one(*["supervised"] * 9, "adversarial", bad=("moco",) if surrogate else ())
        kind = "moco" if not surrogate and self.random.random() < 0.1 else kind
        moco = {"queue": self.one(24, 48, bad=(25,)), "dim": 8, "bn_groups": self.one(1, 1, 2), "neighbours": 3}
        attack = {"steps": 1, "robust_val": self.random.random() < 0.1}
        task = {"kind": kind, "moco": moco, "adversarial": attack}
        return {"model": self.model(), "train": self.train(), "task": task, **self.some(page_aware=True)}

    def transfer(self) -> Content:
        overrides = {"epochs": self.one(1, 2), **self.some(resolution=self.one(16, 32))}
        more = self.some(batch_size=self.one(3, 8, 128, 9999, bad=(0, 1)), accumulate=self.one(1, 2, bad=(7,)),
                         lr=self.one(0.01, bad=("fast", -1)), peak_epoch=self.one(0, bad=(99,)))  # fmt: skip
        wrong = {"epoch": 3} if self.random.random() < self.wild else {}
        return {"modes": self.one(["lp"], ["lp"], ["lp"], ["ff", "lp"]), "cached": self.one(True, False),
                "val_share": self.one(0.1, 0.5, 0.9, bad=(1.0, 0.0)), "robust": self.random.random() < 0.05,
                "lp": {**overrides, **more, **wrong}, "ff": {**overrides, **more}}  # fmt: skip

    def arm(self, surrogates: list[str]) -> str:
        method = self.random.choice(METHODS)
        votes = method in ("lm", "fm", "lm-joint", "lm-reverse")
        keep = self.random.choice(["auto", "0.4", ".5"] if votes else ["0.3", "0.5", ".50", "1"])
        asks = method not in ("influence", "random", "random-samples", "random-balanced", "random+random")
        by = f"+{self.random.choice(surrogates)}" if surrogates and asks and self.random.random() < 0.4 else ""
        return f"{method}@{keep}{by}{self.one('', '', '', '+steps')}"

    def config(self) -> Content:
        name = self.one("source.beton", "source.beton", "images", "uneven")
        val = {"source.beton": ("val.beton", ("val4.beton",))}.get(name)
        names = self.random.sample(["pets", "long-pets", "s0", "a.val", "dense", "x--y"], self.one(1, 1, 2))
        tables = self.random.sample([("t20-train.beton", "t20-test.beton"), ("t6-train.beton", "t6-test.beton"),
                                     ("t40-train.beton", "t40-test.beton"), ("images", "images-test"),
                                     ("uneven", "uneven-test")], len(names))  # fmt: skip
        surrogates = self.random.sample(["r18", "r18-long"], self.one(0, 0, 1, 2))
        arms = list(dict.fromkeys(["dense", *(self.arm(surrogates) for _ in range(self.one(1, 1, 2)))]))
        return {
            "source": {"train": self.path(name, bad=("lone", "broken")),
                       **({"val": self.path(val[0], bad=val[1])} if val and self.one(True, False) else {})},
            "targets": {
                key: {"train": self.path(train, bad=("ones-train.beton", "broken")),
                      "test": self.path(test, bad=("t6-test.beton", "val4.beton", train))}
                for key, (train, test) in zip(names, tables, strict=True)
            },
            "arms": arms, "seeds": self.one([0], [0], [3], bad=([0, 1], [2**63])),
            "nproc": self.one(1, 1, 1, 2, 3), "compact": self.one(True, False),
            "clusters": {"count": self.one(0, 0, 0, bad=(500,))},
            "surrogate": self.stage(surrogate=True), "pretrain": self.stage(surrogate=False),
            "surrogates": {key: self.stage(surrogate=True) for key in surrogates},
            "influence": {"masks": self.one(12, 16, bad=(4,)), "model": self.model(), "val_share": 0.5,
                          "train": {"epochs": 1, "peak_epoch": 0, "batch_size": 2, "resolution": 16, "steps": 1,
                                    "val_resolution": 16},
                          "lp": {"epochs": 1, "steps": 1, "val_resolution": 16, "resolution": 16}},
            "transfer": self.transfer(),
            "write": {"max_side": self.one(0, 32, bad=(4,)), "skip_bad": self.one(False, True)},
            "engine": {"device": self.one("cpu", "auto", bad=("cuda",)), "kind": self.one("ddp", bad=("deepspeed",)),
                       "activation_checkpointing": self.one(False, False, True)},
            "log": {"tensorboard": False, "sample_losses": self.one(False, False, bad=(True,))},
        }  # fmt: skip


def first_steps(config: RunConfig, out: Path) -> list[str]:
    """Make each stage of a run here, training up to its first step (whole, where losses are logged) and judging a few
    samples; by a narrower network, as it is many. The names."""
    graph = Graph(config, out)
    narrow = functools.partial(models.TinyResNet, widths=(8, 8, 16, 16))
    with mock.patch.dict(models.ARCHITECTURES, resnet_tiny=narrow), contextlib.ExitStack() as held:
        for module in (supervised, transfer_module):
            held.enter_context(mock.patch.object(module, "evaluate", _judge_a_few))
        for stage in graph.stages.values():
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                _first_step(stage, config.nproc if stage.distributed else 1)
    return list(graph.stages)


def _judge_a_few(task: Task, engine: Engine, world: World, split: Split, view: CentreView, **more: Any) -> Score:
    few = split if "observe" in more else replace(split, kept=split.kept[:: max(1, len(split.kept) // 4)])
    return evaluate(task, engine, world, few, view, **more)


@functools.cache
def _parser() -> ArgumentParser:
    return build_parser()


def _first_step(stage: Stage, num_ranks: int) -> None:
    from dp4tl_dist.train.loop import Fit

    stage.output.parent.mkdir(parents=True, exist_ok=True)
    ranks = World(num_ranks=num_ranks)
    if stage.argv[0] == "train":
        config = validate(TrainConfig, stage.config or {}, source=stage.name)
        make_job(config, out=stage.output, world=ranks)
        job = make_job(config, out=stage.output, world=World())
        if not config.log.sample_losses:
            job = replace(job, optim=job.optim.model_copy(update={"steps": 1}))
        Fit(job, World()).run()
        return
    args = _parser().parse_args([*stage.argv])
    if stage.argv[0] == "transfer":
        content = recipe(args.mode, stage.config or {})
        whole = validate(TransferConfig, content, source=stage.name)
        folder = sorted((args.checkpoint / "checkpoints").iterdir())[-1]
        network = trained_at(read_meta(folder), folder)
        sizes = open_beton(args.train).class_sizes
        check_transfer(whole.suited(network), network.arch, sizes, args.train, num_ranks)
        brief = whole.model_copy(update={"train": whole.train.model_copy(update={"steps": 1})})
        transfer(brief, checkpoint_path=args.checkpoint, train=args.train, test=args.test, out=args.out, world=World())
    elif stage.argv[0] == "influence":
        found = validate(InfluenceConfig, stage.config or {}, source=stage.name)
        influence(found, out=args.out, worker=(0, 1), world=World())
    else:
        args.run(args)


def told(error: UserError) -> bool:
    """Whether an error is one line that says something."""
    text = str(error)
    return "\n" not in text and len(text) > 20
