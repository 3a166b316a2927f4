"""Adversarial training: the loss of images that an L-infinity attack (PGD, FGSM) has made as hard as it may.

All of the attack happens in units of pixel values (0..255) and in float32, whatever precision the network computes in.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from dp4tl_dist.config import AdversarialConfig
from dp4tl_dist.data.loader import IGNORED, Batch
from dp4tl_dist.models import normalise
from dp4tl_dist.train.task import Supervised

FRACTION = 1 << 16
"""Radii are rounded to this share of a pixel value: then image + radius has an exact float32, and so the bounds hold
exactly."""
ROBUST_STEPS = 10


@dataclass(frozen=True)
class Attack:
    """Projected gradient ascent on the cross-entropy inside the ball of radius `eps` about each image."""

    eps: float
    """Radius in pixel values: 3.0 is 3/255 of the range."""
    steps: int
    step_size: float
    """In pixel values."""
    random_start: bool = True
    seed: int = 0

    def __call__(self, module: nn.Module, batch: Batch, *, epoch: int = 0) -> Tensor:
        """The attacked images, float32 (batch, 3, height, width) in [0, 255] and within `eps` of `batch.images`.

        `module` gives logits for normalised images. It is attacked as it evaluates; no gradient, batch-norm statistic
        or training flag of it changes. The random start is a function of (seed, epoch, identifier).
        """
        with torch.inference_mode(False), torch.enable_grad(), evaluating(module):
            clean, labels = batch.images.float(), batch.labels.clone()
            low, high = (clean - self.eps).clamp_(min=0), (clean + self.eps).clamp_(max=255)
            attacked = clean
            if self.random_start:
                noise = uniform_like(clean, batch.identifiers, seed=self.seed, epoch=epoch)
                attacked = clean + self.eps * (2 * noise - 1)
            attacked = attacked.clamp(low, high)
            for _ in range(self.steps):
                attacked.requires_grad_()
                logits = module(normalise(attacked)).float()
                # A sum, so that a sample's gradient does not depend on how many others are in its batch.
                loss = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
                (gradient,) = torch.autograd.grad(loss, attacked)
                attacked = (attacked.detach() + self.step_size * gradient.sign()).clamp(low, high)
        return attacked


def training_attack(config: AdversarialConfig, *, seed: int) -> Attack:
    """The attack that `task.adversarial` describes."""
    eps = in_pixels(config.eps)
    if config.fast == "fgsm":
        return Attack(eps, 1, 255 * config.step_size or 1.25 * eps, config.random_start, seed)
    return Attack(eps, config.steps, 255 * config.step_size or 2 * eps / 3, config.random_start, seed)


def robust_attack(eps: float, *, seed: int = 0) -> Attack:
    """What robust accuracy is measured by: PGD-10 from a random start, each step a quarter of `eps` (a share of 1)."""
    radius = in_pixels(eps)
    return Attack(radius, ROBUST_STEPS, radius / 4, True, seed)


def in_pixels(eps: float) -> float:
    """A share of the pixel range in pixel values, rounded so that float32 images can hold it."""
    return round(255 * eps * FRACTION) / FRACTION


class Adversarial(Supervised):
    """Cross-entropy on attacked images; validation adds robust accuracy."""

    def __init__(self, module: nn.Module, config: AdversarialConfig, *, seed: int, label_smoothing: float) -> None:
        super().__init__(module, label_smoothing=label_smoothing)
        self.attack = training_attack(config, seed=seed)
        self.robust = robust_attack(config.eps) if config.robust_val else None

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        return super().__call__(batch._replace(images=self.attack(self.module, batch, epoch=self.epoch)))


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """`module` in evaluation mode; afterwards each part of it is in the mode that it was in."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def uniform_like(images: Tensor, identifiers: Tensor, *, seed: int, epoch: int) -> Tensor:
    """float32 in [0, 1), of the shape and layout of `images` (n, ...), on their device.

    A hash of (seed, epoch, identifier, place in the image): the same for any batch, number of ranks and device.
    """
    key = torch.zeros_like(identifiers)
    for value in (seed, epoch, identifiers):
        key = _mix64(key ^ value)
    words = torch.arange(images[0].numel(), dtype=torch.int32, device=images.device) * -1640531527
    words = words[None] ^ (key & 0x7FFFFFFF).to(torch.int32)[:, None]
    # The finaliser of MurmurHash3; int32 halves the memory of a large batch.
    words ^= words >> 16 & 0xFFFF
    words *= -2048144789
    words ^= words >> 13 & 0x7FFFF
    words *= -1028477387
    words ^= words >> 16 & 0xFFFF
    noise = (words >> 8 & 0xFFFFFF).float().mul_(2.0**-24).view(images.shape)
    return noise.contiguous(memory_format=torch.channels_last) if images.dim() == 4 else noise


def _mix64(word: Tensor) -> Tensor:
    """One splitmix64 round on int64, whose products wrap; the masks make its shifts logical."""
    word = word - 7046029254386353131
    word = (word ^ (word >> 30 & (1 << 34) - 1)) * -4658895280553007687
    word = (word ^ (word >> 27 & (1 << 37) - 1)) * -7723592293110705685
    return word ^ (word >> 31 & (1 << 33) - 1)
