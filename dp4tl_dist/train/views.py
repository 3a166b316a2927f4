"""Augmented views of images that are on the device already: crop, flip, colours, grey, blur, as batched operations.

As for the loader's crops, each draw is a hash of (seed, epoch, identifier, view, draw number), here computed on the
device: a sample's view does not depend on its batch or its rank.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from dp4tl_dist.config import MocoConfig
from dp4tl_dist.data.augment import NUM_TRIES, stream_key

RATIO = (3 / 4, 4 / 3)
HUE = 0.25  # of the jitter: a share of the full circle is drawn from +- HUE x jitter
JITTERED = 0.8  # share of the views
SIGMAS = (0.1, 2.0)  # of the blur, in pixels of a view of BLUR_SIDE
BLUR_SIDE = 224
GREY = (0.299, 0.587, 0.114)
TOP, LEFT, FLIP, JITTER, STRENGTHS, ORDER, GREYED, BLURRED, SIGMA = 20, 21, 22, 23, 24, 28, 32, 33, 34
NUM_DRAWS = 35


def augmented(
    images: Tensor,
    identifiers: Tensor,
    *,
    side: int,
    seed: int,
    epoch: int,
    view: int,
    how: MocoConfig,
    flip: bool = True,
) -> Tensor:
    """One view of each image: float32 (n, 3, side, side), in units of 8-bit pixel values.

    images: uint8 (n, 3, canvas, canvas). identifiers: int64 (n,), on the same device.
    """
    draws = uniform(identifiers, NUM_DRAWS, seed=seed, epoch=epoch, view=view)
    boxes = crop_boxes(draws, min_scale=how.min_scale)
    crops = cut(images, boxes, (draws[:, FLIP] < 0.5) & flip, side=side)
    shift, matrix = colours(draws, crops.mean(dim=(2, 3)), jitter=how.jitter, grayscale=how.grayscale)
    coloured = (torch.einsum("nij,njhw->nihw", matrix, crops) + shift[:, :, None, None]).clamp_(0, 255)
    sigma = SIGMAS[0] + (SIGMAS[1] - SIGMAS[0]) * draws[:, SIGMA]
    return blurred(coloured, torch.where(draws[:, BLURRED] < how.blur, sigma * side / BLUR_SIDE, 0.0))


# ---------------------------------------------------------------- draws


def _signed(word: int) -> int:
    """The int64 with the bits of a 64-bit word: torch has no arithmetic on unsigned ones."""
    return word - (1 << 64) if word >> 63 else word


_STEP, _MULTIPLY_1, _MULTIPLY_2 = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _shifted(word: Tensor, count: int) -> Tensor:
    """To the right, filled with zeros."""
    return (word >> count) & ((1 << (64 - count)) - 1)


def _mix(key: Tensor, value: Tensor) -> Tensor:
    """`augment._mix` on int64 words."""
    word = (key ^ value) + _STEP
    word = (word ^ _shifted(word, 30)) * _MULTIPLY_1
    word = (word ^ _shifted(word, 27)) * _MULTIPLY_2
    return word ^ _shifted(word, 31)


def uniform(identifiers: Tensor, num_draws: int, *, seed: int, epoch: int, view: int) -> Tensor:
    """float64 (n, num_draws) in [0, 1): the numbers of `augment.uniform`, made on the device of `identifiers`."""
    key = torch.tensor(_signed(int(stream_key(seed=seed, epoch=epoch, view=view)[0])), device=identifiers.device)
    keys = _mix(key, identifiers)
    words = _mix(keys[:, None], torch.arange(num_draws, device=identifiers.device))
    return _shifted(words, 11).double() * 2.0**-53


# ---------------------------------------------------------------- crops


def crop_boxes(draws: Tensor, *, min_scale: float) -> Tensor:
    """Random resized crops of the unit square, float64 (n, 4): (top, left, height, width).

    As `augment.train_boxes`: area uniform in [min_scale, 1], log aspect uniform, the first of ten that fits, else all.
    """
    tries = draws[:, : 2 * NUM_TRIES].reshape(-1, NUM_TRIES, 2)
    area = min_scale + (1 - min_scale) * tries[..., 0]
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    aspect = torch.exp(low + (high - low) * tries[..., 1])
    sizes = torch.stack([(area / aspect).sqrt(), (area * aspect).sqrt()], dim=2)  # (n, tries, height and width)
    fits = (sizes <= 1).all(dim=2)
    first = fits.int().argmax(dim=1)
    size = sizes[torch.arange(len(sizes), device=sizes.device), first]
    size = torch.where(fits.any(dim=1)[:, None], size, 1.0)
    return torch.cat([draws[:, [TOP, LEFT]] * (1 - size), size], dim=1)


def cut(images: Tensor, boxes: Tensor, flips: Tensor, *, side: int) -> Tensor:
    """float32 (n, 3, side, side): each image's box, resized bilinearly and mirrored where `flips` (n,) says so."""
    places = (torch.arange(side, device=images.device) + 0.5) / side
    y, x = (2 * (boxes[:, i, None] + boxes[:, i + 2, None] * places) - 1 for i in (0, 1))  # (n, side) in [-1, 1]
    x = torch.where(flips[:, None], x.flip(1), x)
    grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=3).float()
    return functional.grid_sample(
        images.float().contiguous(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )


# ---------------------------------------------------------------- colours


def colours(draws: Tensor, means: Tensor, *, jitter: float, grayscale: float) -> tuple[Tensor, Tensor]:
    """What happens to the colours of each view, as one affine map: shift float32 (n, 3) and matrix (n, 3, 3).

    Brightness, contrast, saturation and hue in an order of their own for each view, then grey. Hue turns the plane of
    chroma, which is linear, and values are clipped once, at the end. means: the mean colours (n, 3) of the views.
    """
    n, device = len(draws), draws.device
    unit = torch.eye(3, dtype=torch.float64, device=device)
    grey = torch.tensor(GREY, dtype=torch.float64, device=device).expand(3, 3)
    factors = 1 + jitter * (2 * draws[:, STRENGTHS : STRENGTHS + 3, None, None] - 1)
    angle = 2 * math.pi * HUE * jitter * (2 * draws[:, STRENGTHS + 3] - 1)
    bright, contrast, saturation = factors.unbind(1)
    steps = torch.stack(
        [bright * unit, contrast * unit, saturation * unit + (1 - saturation) * grey, _turned_hue(angle)], dim=1
    )  # fmt: skip  (n, 4, 3, 3)
    order = draws[:, ORDER : ORDER + 4].argsort(dim=1)
    rows, matrix, shift = (
        torch.arange(n, device=device),
        unit.expand(n, 3, 3),
        torch.zeros_like(means, dtype=torch.float64),
    )
    for slot in range(4):
        which = order[:, slot]
        step = steps[rows, which]
        mean = torch.einsum("nij,nj->ni", matrix, means.double()) + shift
        # Contrast moves colours away from the view's mean grey; the other steps only multiply.
        middle = (1 - contrast[:, :, 0]) * (mean @ grey[0])[:, None]
        shift = torch.einsum("nij,nj->ni", step, shift) + torch.where(which[:, None] == 1, middle, 0.0)
        matrix = step @ matrix
    kept = (draws[:, JITTER] >= JITTERED)[:, None]
    shift, matrix = torch.where(kept, 0.0, shift), torch.where(kept[:, :, None], unit, matrix)
    greyed = (draws[:, GREYED] < grayscale)[:, None]
    shift = torch.where(greyed, shift @ grey.T, shift)
    matrix = torch.where(greyed[:, :, None], grey @ matrix, matrix)
    return shift.float(), matrix.float()


@functools.cache
def _chroma(device: torch.device) -> tuple[Tensor, Tensor]:
    """The map from RGB to luma and two axes of chroma (YIQ), and its inverse."""
    with torch.inference_mode(False):
        there = torch.tensor(
            [GREY, (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135)], dtype=torch.float64
        )
        return there.to(device), there.inverse().to(device)


def _turned_hue(angle: Tensor) -> Tensor:
    """float64 (n, 3, 3): RGB maps that turn the chroma by `angle` (n,) and leave the luma."""
    there, back = _chroma(angle.device)
    zero, one, cosine, sine = torch.zeros_like(angle), torch.ones_like(angle), angle.cos(), angle.sin()
    turn = torch.stack([one, zero, zero, zero, cosine, -sine, zero, sine, cosine], dim=1).view(-1, 3, 3)
    return back @ turn @ there


# ---------------------------------------------------------------- blur


def blurred(images: Tensor, sigma: Tensor) -> Tensor:
    """`images` (n, 3, height, width) under Gaussians of deviation `sigma` (n,) in pixels; 0 leaves one as it is."""
    radius = math.ceil(3 * SIGMAS[1] * images.shape[3] / BLUR_SIDE)
    places = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float64)
    weights = torch.exp(-0.5 * (places / sigma.clamp(min=1e-6)[:, None]) ** 2)  # at sigma 0 the middle alone is left
    weights = (weights / weights.sum(dim=1, keepdim=True)).float()
    for axis in (2, 3):
        pad = (radius, radius, 0, 0) if axis == 3 else (0, 0, radius, radius)
        wide = functional.pad(images, pad, mode="reflect")
        parts = (
            weights[:, i, None, None, None] * wide.narrow(axis, i, images.shape[axis]) for i in range(2 * radius + 1)
        )
        images = functools.reduce(torch.add, parts)
    return images
