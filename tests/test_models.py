"""Every network builds with the classes asked for, and its head, features and input scale are what they claim."""

import sys

import numpy as np
import pytest
import torch
from torch import nn

from dp4tl_dist.errors import UserError
from dp4tl_dist.models import (
    ARCHITECTURES,
    FIXED_RESOLUTION,
    build_model,
    check_arch,
    head_name,
    logits_and_features,
    normalise,
    replace_head,
)

HEADS = {"vit_b_16": "heads.head"}
SMALL = ["resnet_tiny", "resnet18", "resnet50"]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_builds(arch: str) -> None:
    with torch.device("meta"):  # shapes without memory
        model = build_model(arch, 7)
    assert head_name(model) == HEADS.get(arch, "fc")
    head = model.get_submodule(head_name(model))
    assert isinstance(head, nn.Linear) and head.out_features == 7
    side = FIXED_RESOLUTION.get(arch, 64)
    assert model(torch.empty(2, 3, side, side, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("arch", SMALL)
@torch.no_grad()
def test_features_are_what_goes_into_the_head(arch: str) -> None:
    torch.manual_seed(0)
    model = build_model(arch, 5).eval()
    images = torch.randn(2, 3, 64, 64)
    logits, features = logits_and_features(model, images)
    head = model.get_submodule(head_name(model))
    torch.testing.assert_close(head(features), logits, rtol=0, atol=0)
    torch.testing.assert_close(model(images), logits, rtol=0, atol=0)
    assert features.shape == (2, head.in_features)
    assert not head._forward_pre_hooks


def test_the_hook_goes_also_after_an_error() -> None:
    model = build_model("resnet_tiny", 5)
    with pytest.raises(RuntimeError):
        logits_and_features(model, torch.zeros(1, 4, 8, 8))
    assert not model.get_submodule("fc")._forward_pre_hooks


@torch.no_grad()
def test_a_fresh_head_changes_nothing_else() -> None:
    model = build_model("resnet_tiny", 5).eval()
    images = torch.randn(3, 3, 32, 32)
    before, features = logits_and_features(model, images)
    kept = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("fc.")}
    fresh = replace_head(model, 9)
    logits, after = logits_and_features(model, images)
    assert fresh is model.fc and logits.shape == (3, 9) and before.shape == (3, 5)
    torch.testing.assert_close(after, features, rtol=0, atol=0)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())


def test_the_same_seed_gives_the_same_network() -> None:
    states = []
    for _ in range(2):
        torch.manual_seed(3)
        states.append(build_model("resnet_tiny", 4).state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalise_against_numpy(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randint(0, 256, (4, 3, 9, 7), dtype=torch.uint8).contiguous(memory_format=layout)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    expected = (images.numpy() / 255 - mean[:, None, None]) / std[:, None, None]
    result = normalise(images)
    assert result.dtype == torch.float32 and result.is_contiguous(memory_format=layout)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-5)


def test_unknown_names_list_the_known_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError) as caught:
        build_model("resnet19", 5)
    assert all(name in str(caught.value) for name in [*ARCHITECTURES, "'resnet19'", "timm:NAME"])
    monkeypatch.setitem(sys.modules, "timm", None)
    for check in (lambda: build_model("timm:x", 5), lambda: check_arch("timm:x")):
        with pytest.raises(UserError, match="pip install timm"):
            check()


def test_resolutions_that_an_architecture_cannot_take() -> None:
    check_arch("resnet18", (32, 200))
    check_arch("vit_b_16", (224, 224))
    with pytest.raises(UserError, match="224 px only, not 192"):
        check_arch("vit_b_16", (224, 192))


def test_a_network_without_a_known_head() -> None:
    with pytest.raises(UserError, match="Sequential has no linear head"):
        head_name(nn.Sequential(nn.Linear(2, 2)))
