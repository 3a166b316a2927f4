"""Networks by name, and the three things the project needs of each: its head, its features, its input scale."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dp4tl_dist.errors import UserError, one_line
from dp4tl_dist.sides import FIXED_RESOLUTION

# ImageNet's channel statistics, in units of 8-bit pixel values.
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class TinyResNet(nn.Module):
    """A ResNet of torchvision's basic blocks, one a stage, narrow enough to train on a CPU at 32 px."""

    def __init__(self, num_classes: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        from torchvision.models.resnet import BasicBlock

        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(inplace=True),
        )
        blocks = [BasicBlock(widths[0], widths[0])]
        for before, width in zip(widths, widths[1:], strict=False):
            shortcut = nn.Sequential(nn.Conv2d(before, width, 1, stride=2, bias=False), nn.BatchNorm2d(width))
            blocks.append(BasicBlock(before, width, stride=2, downsample=shortcut))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) float -> (batch, classes)"""
        return self.fc(self.blocks(self.stem(images)).mean(dim=(2, 3)))


def _torchvision(name: str) -> Callable[[int], nn.Module]:
    def build(num_classes: int) -> nn.Module:
        import torchvision.models

        model: nn.Module = getattr(torchvision.models, name)(weights=None, num_classes=num_classes)
        return model

    return build


ARCHITECTURES: dict[str, Callable[[int], nn.Module]] = {
    "resnet_tiny": TinyResNet,
    **{f"resnet{depth}": _torchvision(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    "vit_b_16": _torchvision("vit_b_16"),
}


def check_arch(arch: str, resolutions: tuple[int, ...] = ()) -> None:
    """Raise UserError unless `arch` can be built here and takes crops of these sides."""
    if arch.startswith("timm:"):
        _timm()
    elif arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise UserError(f"model.arch: unknown architecture {arch!r}: use one of {known}, or timm:NAME")
    fixed = FIXED_RESOLUTION.get(arch)
    wrong = [side for side in resolutions if fixed and side != fixed]
    if wrong:
        raise UserError(f"model.arch: {arch} takes {fixed} px only, not {wrong[0]}: set the resolutions to {fixed}")


def build_model(arch: str, num_classes: int) -> nn.Module:
    """A freshly initialised network from torch's global generator, with `num_classes` outputs."""
    check_arch(arch)
    if arch.startswith("timm:"):
        name = arch.removeprefix("timm:")
        timm = _timm()
        if not timm.is_model(name):
            raise UserError(
                f"model.arch: timm has no model {name!r}: `python -c 'import timm; print(timm.list_models())'`"
            )
        return timm.create_model(name, pretrained=False, num_classes=num_classes)
    return ARCHITECTURES[arch](num_classes)


@functools.cache
def outline(arch: str, num_classes: int) -> nn.Module:
    """The network without numbers, on torch's meta device: names and shapes, for next to no time and memory.

    It is shared: do not change it.
    """
    try:
        with torch.device("meta"):
            return build_model(arch, num_classes)
    except RuntimeError:  # some networks of timm compute with what they are building
        with torch.random.fork_rng(devices=[]):
            return build_model(arch, num_classes).to("meta")


@functools.cache
def check_shapes(arch: str, num_classes: int, side: int, batch: int = 1, *, training: bool = False) -> None:
    """Raise UserError unless the network takes `batch` images of `side` pixels; nothing is computed but shapes."""
    if side < 1:
        raise UserError(f"a resolution of {side} px: it must be positive (train.resolution_step rounds a ramp's sides)")
    model = outline(arch, num_classes)
    head_name(model)
    try:
        model.train(training)
        with torch.no_grad():
            model(torch.empty(batch, 3, side, side, device="meta"))
    except Exception as error:  # networks refuse shapes in ways of their own; all mean the same here
        how = "train on" if training else "take"
        raise UserError(
            f"model.arch: {arch} cannot {how} {batch} images of {side} px at a time ({one_line(str(error))}): "
            "change the resolution" + (", or the batch of a rank" if training else "")
        ) from error


def _timm() -> Any:
    try:
        import timm
    except ImportError as error:
        raise UserError("model.arch: timm is not installed: pip install timm") from error
    return timm


def head_name(model: nn.Module) -> str:
    """The dotted name of the last linear layer: what a transfer replaces."""
    for name in ("fc", "heads.head", "head.fc", "head", "classifier"):
        try:
            if isinstance(model.get_submodule(name), nn.Linear):
                return name
        except AttributeError:
            continue
    raise UserError(f"{type(model).__name__} has no linear head that is known here: use another architecture")


def feature_dim(model: nn.Module) -> int:
    """The length of what goes into the head."""
    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear)
    return head.in_features


def replace_head(model: nn.Module, num_classes: int) -> nn.Linear:
    """Give `model` a fresh head of `num_classes` outputs and return it."""
    parent_name, _, leaf = head_name(model).rpartition(".")
    parent = model.get_submodule(parent_name)
    old = getattr(parent, leaf)
    fresh = nn.Linear(old.in_features, num_classes).to(old.weight.device)
    setattr(parent, leaf, fresh)
    return fresh


def logits_and_features(model: nn.Module, images: Tensor, *, head: str = "") -> tuple[Tensor, Tensor]:
    """One pass: logits (batch, classes) and what goes into the head (batch, dim). `head` names it where it is known."""
    caught: list[Tensor] = []
    hook = model.get_submodule(head or head_name(model)).register_forward_pre_hook(
        lambda _, inputs: caught.append(inputs[0])
    )
    try:
        logits = model(images)
    finally:
        hook.remove()
    return logits, caught[0]


def normalise(images: Tensor) -> Tensor:
    """uint8 pixels (batch, 3, height, width) -> float32 with ImageNet's mean 0 and deviation 1; keeps the layout."""
    mean, std = _pixel_scale(images.device)
    return (images.float() - mean) / std


@functools.cache
def _pixel_scale(device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation (1, 3, 1, 1) on `device`: copied there once, not at every step."""
    # Also usable where gradients flow, wherever the first call came from.
    with torch.inference_mode(False):
        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return mean, std
