"""Small raw betons and an untrained surrogate that the files here share."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from dp4tl_dist.data.beton import RAW, Beton, BetonWriter, open_beton
from dp4tl_dist.files import make_meta
from dp4tl_dist.models import build_model, logits_and_features, normalise
from dp4tl_dist.train import checkpoint

settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")

SIDE = 40
MakeBeton = Callable[..., Beton]
MakeSurrogate = Callable[..., Path]


@pytest.fixture(scope="session")
def make_beton(tmp_path_factory: pytest.TempPathFactory) -> MakeBeton:
    """make_beton(labels, classes, seed=0): noise around a colour that the label sets."""

    def make(labels: list[int], classes: list[str], *, seed: int = 0) -> Beton:
        path = tmp_path_factory.mktemp("beton") / "data.beton"
        rng = np.random.default_rng(seed)
        with BetonWriter(path, capacity=len(labels)) as writer:
            for i, label in enumerate(labels):
                colour = np.random.default_rng(label).integers(40, 215, 3)
                pixels = (colour + rng.integers(-40, 41, (SIDE, SIDE, 3))).astype(np.uint8)
                writer.add(pixels.tobytes(), height=SIDE, width=SIDE, label=label, identifier=5 * i, mode=RAW)
            writer.finish(classes, {})
        return open_beton(path)

    return make


@pytest.fixture(scope="session")
def make_surrogate(tmp_path_factory: pytest.TempPathFactory) -> MakeSurrogate:
    """make_surrogate(beton, spoil=False, seed=1): a checkpoint as if trained on `beton`; `spoil` puts a NaN in it."""

    def make(beton: Beton, *, spoil: bool = False, seed: int = 1) -> Path:
        torch.manual_seed(seed)
        model = build_model("resnet_tiny", beton.num_classes)
        images = torch.from_numpy(np.stack([np.frombuffer(beton.payload(i), np.uint8) for i in range(16)]))
        images = images.view(-1, SIDE, SIDE, 3).permute(0, 3, 1, 2)
        with torch.no_grad():
            # Statistics of these images and a centred head spread the predictions over the classes.
            for _ in range(50):
                model(normalise(images))
            _, features = logits_and_features(model.eval(), normalise(images))
            head = model.get_submodule("fc")
            assert isinstance(head, torch.nn.Linear)
            head.weight *= 10
            head.bias -= head(features).mean(dim=0)
            if spoil:
                head.bias[0] = torch.nan
        folder = tmp_path_factory.mktemp("surrogate") / "step_000000001"
        config = {
            "model": {"arch": "resnet_tiny"},
            "train": {"resolution": 32, "val_resolution": 32, "val_ratio": 0.875},
        }
        meta = make_meta("checkpoint", config=config, inputs={"train": beton.fingerprint})
        meta |= {"classes": list(beton.classes), "complete": True}
        checkpoint.save(folder, weights=model.state_dict(), state={}, meta=meta)
        return folder

    return make


@pytest.fixture(scope="session")
def source(make_beton: MakeBeton) -> Beton:
    """10 classes, ragged, of which class 6 has no sample."""
    rng = np.random.default_rng(3)
    labels = rng.choice([0, 1, 2, 3, 4, 5, 7, 8, 9], 83)
    return make_beton(labels.tolist(), [f"class {i}" for i in range(10)], seed=1)


@pytest.fixture(scope="session")
def target(make_beton: MakeBeton) -> Beton:
    return make_beton([0, 1, 2] * 9 + [1, 1], ["x", "y", "z"], seed=2)


@pytest.fixture(scope="session")
def surrogate(make_surrogate: MakeSurrogate, source: Beton) -> Path:
    return make_surrogate(source)
