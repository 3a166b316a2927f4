"""The stage graph: from one RunConfig to the command lines that carry it out. Pure arithmetic on names and paths."""

from pathlib import Path

from dp4tl_dist.arms import select, whose
from dp4tl_dist.config import OptimConfig
from dp4tl_dist.data.losses import NAME as LOSSES
from dp4tl_dist.data.rows import beside
from dp4tl_dist.errors import UserError
from dp4tl_dist.recipes import CROPS, Mode, recipe
from dp4tl_dist.run_config import SYNTHETIC, RunConfig, StageTrain, parse_arm
from dp4tl_dist.stage import Stage, Trial

__all__ = ["Graph", "Stage", "Trial"]

MAX_NAME = 180
"""Letters of a stage's name: with what temporary files add, names of files stay below 255."""


def no_option(path: Path) -> Path:
    """`path`, which no command line is to take for an option: where it begins with "-", from the root on."""
    return path.absolute() if str(path).startswith("-") else path


class Graph:
    """The stages of a run in an order that can be carried out, and the trials that they serve."""

    def __init__(self, config: RunConfig, out: Path) -> None:
        self.config, self.out = config, no_option(out)
        self.stages: dict[str, Stage] = {}
        self._makers: dict[Path, str] = {}
        self.trials: list[Trial] = []
        self.source = self._beton("source-train", config.source.train)
        self.source_val = self._beton("source-val", config.source.val) if config.source.val else None
        self.targets = {
            name: (self._beton(f"{name}-train", target.train), self._beton(f"{name}-test", target.test))
            for name, target in config.targets.items()
        }
        # Selection first, then arms seed by seed, so that an interrupted run has whole comparisons to show.
        trials = [(arm, target, seed) for seed in config.seeds for target in config.targets for arm in config.arms]
        for trial in trials:
            select(self, *trial)
        for trial in trials:
            self._trial(*trial)

    def add(self, stage: Stage) -> Path:
        """Take a stage in, once. UserError where another one has its name, or makes one of its files."""
        if len(stage.name) > MAX_NAME:
            raise UserError(
                f"the name {stage.name[:40]}... is too long for a file: shorten what names targets and arms"
            )
        if self.stages.setdefault(stage.name, stage) != stage:
            raise UserError(f"two different stages are called {stage.name}: rename a target or a surrogate")
        for path in (stage.output, *stage.also):
            other = self._makers.setdefault(path, stage.name)
            if other != stage.name:
                raise UserError(f"{other} and {stage.name} would both make {path}: rename a target or a surrogate")
        return stage.output

    def _beton(self, name: str, origin: str) -> Path:
        """The beton of a dataset; a stage writes it unless it is one already."""
        if origin.endswith(".beton"):
            return no_option(Path(origin))
        output, write = self.out / "data" / f"{name}.beton", self.config.write
        is_drawn = origin.startswith(SYNTHETIC)
        images, part = no_option(Path(origin)), origin.removeprefix(SYNTHETIC)
        what = ["--images", str(images)]
        if is_drawn:  # a part's name with a "-" before it is none, and `write` is to say so
            what = [f"--synthetic={part}"] if part.startswith("-") else ["--synthetic", part]
        argv = ["write", *what, "--out", str(output), "--max-side", str(write.max_side),
                "--quality", str(write.quality), "--seed", str(write.seed)]  # fmt: skip
        argv += [*(["--skip-bad"] if write.skip_bad else []), *(["--reencode"] if write.reencode else [])]
        inputs = () if is_drawn else (images,)
        return self.add(Stage(f"write-{name}", tuple(argv), inputs, output, also=beside(output)))

    def train(
        self,
        name: str,
        table: StageTrain,
        train: Path,
        val: Path | None,
        subset: Path | None,
        val_subset: Path | None,
        seed: int,
        steps_of: Path | None = None,
        losses: bool = False,
    ) -> Path:
        output = self.out / name.replace("pretrain-", "pretrain/", 1)
        paths = {"train": train, "val": val, "subset": subset, "val_subset": val_subset, "steps_of": steps_of}
        config = {
            "seed": seed,
            "data": {
                **{key: str(path) if path else "" for key, path in paths.items()},
                **{key: getattr(table, key) for key in ("min_scale", "flip", "page_aware", "num_workers")},
            },
            **{key: getattr(table, key).model_dump(mode="json") for key in ("model", "task", "train")},
            **{key: getattr(self.config, key).model_dump(mode="json") for key in ("engine", "log", "checkpoint")},
        }
        config["log"]["sample_losses"] = self.config.log.sample_losses or losses
        also = (output / LOSSES,) if losses else ()
        init = (Path(table.model.init),) if table.model.init else ()
        inputs = (*(path for path in paths.values() if path), *init)
        argv = ("train", "--config", str(self.config_path(name)), "--out", str(output))
        return self.add(Stage(name, argv, inputs, output, distributed=True, config=config, also=also))

    def config_path(self, name: str) -> Path:
        """Where the runner writes a stage's config."""
        return self.out / "configs" / f"{name}.json"

    def _trial(self, arm: str, target: str, seed: int) -> None:
        subset, selection = select(self, arm, target, seed)
        found = parse_arm(arm)
        names = whose(found, target, seed) if found else []
        label = found.trained if found else arm
        own = [] if found and found.of_chance else [f"s{seed}"]
        name = "-".join(["pretrain", label, *names, *own])
        train, indices = self.source, subset
        if subset and self.config.compact:
            train, indices = self.out / "data" / f"{subset.stem}.beton", None
            argv = ("compact", "--source", str(self.source), "--subset", str(subset), "--out", str(train))
            stage = Stage(f"compact-{subset.stem}", argv, (self.source, subset), train, also=beside(train))
            self.add(stage)
            selection = (*selection, stage.name)
        val_subset = subset.with_suffix(".val.npz") if subset and self.source_val else None
        steps_of = self.source if found and found.steps else None
        run = self.train(name, self.config.pretrain, train, self.source_val, indices, val_subset, seed, steps_of)
        transfers = {
            mode: self._transfer(mode, f"{label}-{target}-s{seed}", run, target, seed)
            for mode in self.config.transfer.modes
        }
        self.trials.append(Trial(arm, target, seed, subset, selection, name, transfers))

    def _transfer(self, mode: Mode, trial: str, run: Path, target: str, seed: int) -> str:
        table, (train, test) = self.config.transfer, self.targets[target]
        name = f"transfer-{mode}-{trial}"
        output = self.out / "transfer" / f"{mode}-{trial}.json"
        overrides = getattr(table, mode)
        known = [*OptimConfig.model_fields, *(CROPS if mode == "ff" else ())]
        unknown = sorted(overrides.keys() - set(known))
        if unknown:
            raise UserError(f"unknown key 'transfer.{mode}.{unknown[0]}': known are {', '.join(sorted(known))}")
        cached = table.cached and mode == "lp"
        never = {"activation_checkpointing": False} if cached else {}  # features that are there have no blocks
        content = {
            "seed": seed,
            "val_share": table.val_share,
            "cached": cached,
            "robust": table.robust,
            **{key: overrides[key] for key in CROPS if key in overrides},
            "train": {key: value for key, value in overrides.items() if key not in CROPS},
            # A target is small: nothing of its training needs to be divided among the ranks.
            "engine": {**self.config.engine.model_dump(mode="json"), "kind": "ddp", **never},
        }
        config = recipe(mode, content)
        argv = ("transfer", "--config", str(self.config_path(name)), "--checkpoint", str(run), "--train", str(train),
                "--test", str(test), "--mode", mode, "--out", str(output))  # fmt: skip
        self.add(Stage(name, argv, (run, train, test), output, distributed=True, config=config))
        return name
