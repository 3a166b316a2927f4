"""The published transfer recipes, and the config that a transfer run is validated from."""

from typing import Annotated, Any, Literal

from pydantic import Field

from dp4tl_dist.config import EngineConfig, LogConfig, OptimConfig, Part, Seed, Share, Table, Workers
from dp4tl_dist.config_file import SideOrNone
from dp4tl_dist.errors import UserError
from dp4tl_dist.sides import TrainedAt, misfit, transfer_side

Mode = Literal["lp", "ff"]

_COMMON: dict[str, Any] = {"batch_size": 128, "weight_decay": 0.0, "schedule": "cosine", "peak_epoch": 0.0}
RECIPES: dict[str, dict[str, Any]] = {
    "lp": {**_COMMON, "epochs": 50, "optimizer": "adam", "lr": 0.01},
    "ff": {**_COMMON, "epochs": 200, "optimizer": "adam", "lr": 1e-4},
    # Food101, StanfordCars and SUN397 finetune by SGD in the published code.
    "ff-sgd": {**_COMMON, "epochs": 200, "optimizer": "sgd", "lr": 0.1, "weight_decay": 5e-4},
}
CROPS = ("min_scale", "flip")
"""Keys of how finetuning crops its training images. A linear probe does not crop."""


class TransferOptim(OptimConfig):
    """As in training, but for the sides."""

    resolution: SideOrNone = 0
    """Side of the training crops, and of what a linear probe sees, in pixels. 0: it follows from what the network was
    trained on, 224 for 192 as published (`dp4tl_dist.sides`)."""
    val_resolution: SideOrNone = 0
    """Side of the centre crop that chooses the epoch and tests. 0: `resolution`."""
    val_ratio: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Side of the centre crop as a share of the image's shorter side. 0: as the network was validated."""


class TransferConfig(Table):
    """One transfer run. Every value not given is the published recipe's of its mode."""

    seed: Seed = 0
    recipe: Literal["lp", "ff", "ff-sgd"] = "lp"
    val_share: Part = 0.1
    """Share of the target's training set that chooses the epoch, drawn class by class."""
    cached: bool = False
    """Linear probe on features of the centre view, computed once: the same result sooner."""
    robust: bool = False
    """The test also tells accuracy under attack (PGD-10, L-infinity)."""
    eps: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 3 / 255
    """The attack's radius as a share of the pixel range."""
    min_scale: Share = 0.08
    """Finetuning: smallest share of the image's area that a random resized crop takes."""
    flip: bool = True
    """Finetuning: mirror half of the training samples."""
    num_workers: Workers = 0
    train: TransferOptim
    engine: EngineConfig = EngineConfig()
    log: LogConfig = LogConfig(tensorboard=False)

    def suited(self, network: TrainedAt) -> "TransferConfig":
        """This config with each side that is 0 as it follows from the network."""
        given = self.train
        side = given.resolution or transfer_side(network.resolution, network.arch)
        if self.recipe == "lp":
            side = given.resolution or given.val_resolution or side
        sides = {"resolution": side, "val_resolution": given.val_resolution or side,
                 "val_ratio": given.val_ratio or network.val_ratio}  # fmt: skip
        # Validated anew, as a ramp follows from the resolution.
        train = TransferOptim.model_validate({**given.model_dump(exclude_unset=True), **sides})
        return self.model_copy(update={"train": train})

    def misfits(self, network: TrainedAt) -> list[str]:
        """What to warn of in a config that is `suited` to the network."""
        seen = self.train.val_resolution
        if self.recipe == "lp":
            found = [misfit("train.resolution", seen, network.resolution)]
        else:
            found = [misfit("train.resolution", self.train.resolution, network.resolution),
                     misfit("train.val_resolution", seen, self.train.resolution)]  # fmt: skip
        return [text for text in found if text]


def recipe(mode: Mode, content: dict[str, Any]) -> dict[str, Any]:
    """`content` on top of the published recipe: what `TransferConfig` is validated from."""
    name = content.get("recipe", mode)
    if str(name) not in RECIPES or not str(name).startswith(mode):
        raise UserError(f"recipe {name!r} does not fit --mode {mode}: use one of {', '.join(RECIPES)}")
    if content.get("cached") and mode != "lp":
        raise UserError("--cached works with --mode lp only: full finetuning changes the features")
    given = content.get("train", {})
    if not isinstance(given, dict):  # what is no table is left for the validation to refuse
        return {**content, "recipe": name}
    if mode == "lp":
        _check_one_view(content, given)
    return {**content, "recipe": name, "train": {**RECIPES[str(name)], **given}}


def _check_one_view(content: dict[str, Any], train: dict[str, Any]) -> None:
    """A probe trains and tests on one view of each image, the centre's."""
    crops = [key for key in CROPS if key in content]
    if crops:
        raise UserError(f"{crops[0]} is for --mode ff: a linear probe sees the centre of its images, without crops")
    first, second = train.get("resolution"), train.get("val_resolution")
    if first and second and first != second:
        raise UserError(
            f"a linear probe sees its images at one side, and train.resolution {first} is not train.val_resolution "
            f"{second}: leave one of them out"
        )
