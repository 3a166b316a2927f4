"""The published transfer recipes, and the config that a transfer run is validated from."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dp4tl_dist.config import Count, EngineConfig, LogConfig, OptimConfig, Share, Table
from dp4tl_dist.errors import UserError

Mode = Literal["lp", "ff"]

_COMMON: dict[str, Any] = {
    "batch_size": 128, "weight_decay": 0.0, "schedule": "cosine", "peak_epoch": 0.0,
    "resolution": 224, "val_resolution": 224, "val_ratio": 224 / 256,
}  # fmt: skip
RECIPES: dict[str, dict[str, Any]] = {
    "lp": {**_COMMON, "epochs": 50, "optimizer": "adam", "lr": 0.01},
    "ff": {**_COMMON, "epochs": 200, "optimizer": "adam", "lr": 1e-4},
    # Food101, StanfordCars and SUN397 finetune by SGD in the published code.
    "ff-sgd": {**_COMMON, "epochs": 200, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
}


class TransferConfig(Table):
    """One transfer run. Every value not given is the published recipe's of its mode."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    recipe: Literal["lp", "ff", "ff-sgd"] = "lp"
    val_share: Share = 0.1
    """Share of the target's training set that chooses the epoch, drawn class by class."""
    cached: bool = False
    """Linear probe on features of the centre view, computed once."""
    robust: bool = False
    """The test also tells accuracy under attack (PGD-10, L-infinity)."""
    eps: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 3 / 255
    """The attack's radius as a share of the pixel range."""
    num_workers: Count | Literal[0] = 0
    train: OptimConfig
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig(tensorboard=False)


def recipe(mode: Mode, content: dict[str, Any]) -> dict[str, Any]:
    """`content` on top of the published recipe: what `TransferConfig` is validated from."""
    name = content.get("recipe", mode)
    if str(name) not in RECIPES or not str(name).startswith(mode):
        raise UserError(f"recipe {name!r} does not fit --mode {mode}: use one of {', '.join(RECIPES)}")
    if content.get("cached") and mode != "lp":
        raise UserError("--cached works with --mode lp only: full finetuning changes the features")
    given = content.get("train", {})
    # What is no table is left for the validation to refuse.
    return {**content, "recipe": name, "train": {**RECIPES[str(name)], **given} if isinstance(given, dict) else given}
