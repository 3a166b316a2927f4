"""Augmented views: the draws of the loader's hash, and each operation against torchvision or arithmetic."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import functional as vision

from dp4tl_dist.config import MocoConfig
from dp4tl_dist.data import augment
from dp4tl_dist.train import views

NOTHING = MocoConfig(min_scale=1.0, jitter=0.0, grayscale=0.0, blur=0.0)


def images(n: int = 12, side: int = 20) -> Tensor:
    smooth = torch.rand(n, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    return torch.nn.functional.interpolate(smooth, size=(side, side), mode="bilinear").to(torch.uint8)


def view(pixels: Tensor, ids: Tensor, *, number: int = 1, epoch: int = 0, how: MocoConfig = MocoConfig()) -> Tensor:  # noqa: B008
    return views.augmented(pixels, ids, side=16, seed=9, epoch=epoch, view=number, how=how)


def test_draws_are_those_of_the_loader() -> None:
    ids = np.array([0, 1, 2**40, 77])
    for seed, epoch, number in ((0, 0, 0), (2**63 - 1, 5, 1), (12345, 900, 2)):
        expected = augment.uniform(ids, np.arange(35), seed=seed, epoch=epoch, view=number)
        found = views.uniform(torch.from_numpy(ids), 35, seed=seed, epoch=epoch, view=number)
        assert np.array_equal(found.numpy(), expected)


def test_a_view_depends_on_its_sample_alone() -> None:
    pixels, ids = images(), torch.arange(12) * 7
    whole = view(pixels, ids)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(view(pixels[order], ids[order]), whole[order])
    parts = [view(pixels[part], ids[part]) for part in (slice(0, 1), slice(1, 8), slice(8, 12))]
    assert torch.equal(torch.cat(parts), whole)
    for changed in (view(pixels, ids, number=2), view(pixels, ids, epoch=1), view(pixels, ids + 1)):
        assert ((changed - whole).abs().amax(dim=(1, 2, 3)) > 1).sum() > 8
    assert whole.dtype == torch.float32 and whole.min() >= 0 and whole.max() <= 255


def test_without_changes_a_view_is_the_square_or_its_mirror() -> None:
    pixels, ids = images(side=16), torch.arange(12)
    found = view(pixels, ids, how=NOTHING)
    flips = views.uniform(ids, 35, seed=9, epoch=0, view=1)[:, views.FLIP] < 0.5
    expected = torch.where(flips[:, None, None, None], pixels.flip(3), pixels).float()
    torch.testing.assert_close(found, expected, atol=1e-2, rtol=0)
    assert 0 < flips.sum() < 12


def test_boxes_are_random_resized_crops() -> None:
    draws = views.uniform(torch.arange(4000), 35, seed=1, epoch=0, view=1)
    top, left, height, width = views.crop_boxes(draws, min_scale=0.2).unbind(1)
    assert min(top.min(), left.min()) >= 0 and (top + height).max() <= 1 + 1e-9 and (left + width).max() <= 1 + 1e-9
    area, aspect = height * width, width / height
    assert area.min() >= 0.2 - 1e-9 and area.max() <= 1
    assert aspect.min() >= 3 / 4 - 1e-9 and aspect.max() <= 4 / 3 + 1e-9
    boxes = augment.train_boxes(
        np.full(4000, 3000), np.full(4000, 3000), np.arange(4000), seed=1, epoch=0, min_scale=0.2, view=1
    )
    same = np.abs(torch.stack([top, left, height, width], 1).numpy() - boxes / 3000).max(axis=1) < 2e-3
    assert same.mean() > 0.999  # whole pixels let a crop in, or keep it out, that fits to within half of one


def test_a_cut_is_a_bilinear_resize() -> None:
    pixels = images(1, 24)
    box = torch.tensor([[0.25, 0.125, 0.5, 0.75]], dtype=torch.float64)
    found = views.cut(pixels, box, torch.tensor([False]), side=16)
    expected = vision.resized_crop(pixels.float(), 6, 3, 12, 18, [16, 16], antialias=False)
    torch.testing.assert_close(found[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], atol=0.5, rtol=0)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_brightness_contrast_and_saturation_are_torchvisions(which: int) -> None:
    """One change at a time, on mid-grey images that need no clipping."""
    pixels = images().float() * 0.4 + 70
    draws = torch.full((12, 35), 0.5, dtype=torch.float64)
    draws[:, views.STRENGTHS + which] = torch.linspace(0, 0.99, 12, dtype=torch.float64)
    shift, matrix = views.colours(draws, pixels.mean(dim=(2, 3)), jitter=0.4, grayscale=0.0)
    found = torch.einsum("nij,njhw->nihw", matrix, pixels) + shift[:, :, None, None]
    change = (vision.adjust_brightness, vision.adjust_contrast, vision.adjust_saturation)[which]
    for i in range(12):
        factor = 0.6 + 0.8 * float(draws[i, views.STRENGTHS + which])
        expected = change(pixels[i] / 255, factor) * 255
        torch.testing.assert_close(found[i], expected, atol=0.05, rtol=0)


def test_hue_keeps_luma_and_turns_colours() -> None:
    angles = torch.tensor([0.0, 0.3, -0.3, 2 * np.pi], dtype=torch.float64)
    turn = views._turned_hue(angles)
    luma = torch.tensor(views.GREY, dtype=torch.float64)
    torch.testing.assert_close(luma @ turn, luma.expand(4, 3), atol=1e-5, rtol=0)
    unit = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(turn[[0, 3]], unit.expand(2, 3, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(turn[1] @ turn[2], unit, atol=1e-5, rtol=0)
    assert (turn[1] - unit).abs().max() > 0.1


def test_contrast_in_any_place_keeps_the_mean_grey_at_its_turn() -> None:
    """Against applying the four changes one after another to the pixels."""
    pixels = images(30).float() * 0.4 + 70
    draws = views.uniform(torch.arange(30), 35, seed=3, epoch=0, view=1)
    draws[:, views.JITTER] = 0.0
    shift, matrix = views.colours(draws, pixels.mean(dim=(2, 3)), jitter=0.4, grayscale=0.0)
    found = torch.einsum("nij,njhw->nihw", matrix, pixels) + shift[:, :, None, None]
    orders = draws[:, views.ORDER : views.ORDER + 4].argsort(dim=1)
    assert len({tuple(order) for order in orders.tolist()}) > 10
    luma = torch.tensor(views.GREY)[:, None, None]
    for i in range(30):
        slow = pixels[i]
        for which in orders[i].tolist():
            factor = 0.6 + 0.8 * float(draws[i, views.STRENGTHS + which])
            grey = (luma * slow).sum(dim=0, keepdim=True)
            if which == 3:
                angle = 2 * np.pi * 0.1 * (2 * draws[i : i + 1, views.STRENGTHS + 3] - 1)
                slow = torch.einsum("ij,jhw->ihw", views._turned_hue(angle)[0].float(), slow)
            else:
                base = (torch.zeros(1), grey.mean(), grey)[which]
                slow = factor * slow + (1 - factor) * base
        torch.testing.assert_close(found[i], slow, atol=0.05, rtol=0)


def test_shares_of_grey_and_unjittered_views() -> None:
    draws = views.uniform(torch.arange(5000), 35, seed=0, epoch=0, view=1)
    _, matrix = views.colours(draws, torch.full((5000, 3), 100.0), jitter=0.4, grayscale=0.2)
    grey = (matrix[:, 0] == matrix[:, 1]).all(dim=1)
    plain = (matrix == torch.eye(3)).all(dim=2).all(dim=1)
    assert grey.float().mean() == pytest.approx(0.2, abs=0.03)
    assert plain.float().mean() == pytest.approx(0.2 * 0.8, abs=0.03)


def test_blur_is_torchvisions() -> None:
    pixels = torch.rand(3, 3, 112, 112, generator=torch.Generator().manual_seed(0)) * 255
    found = views.blurred(pixels, torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64))
    assert torch.equal(found[0], pixels[0])
    for i, sigma in ((1, 0.5), (2, 1.0)):
        torch.testing.assert_close(found[i], vision.gaussian_blur(pixels[i], [7, 7], [sigma, sigma]), atol=0.05, rtol=0)
