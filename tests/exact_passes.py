"""Everything that is promised to be exact, on 1, 2 and 3 threads of one process: a digest for each, and a line for each
number of threads. Run as exact_passes.py SURROGATE SOURCE TARGET; the environment says which kernels compute it."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from dp4tl_dist.data.beton import open_beton
from dp4tl_dist.data.loader import BetonLoader, CentreView
from dp4tl_dist.files import load_npz
from dp4tl_dist.models import build_model
from dp4tl_dist.prune.cluster import cluster
from dp4tl_dist.prune.score import METHODS, score
from dp4tl_dist.prune.vote import vote
from dp4tl_dist.train import checkpoint
from dp4tl_dist.train.evaluate import Split
from dp4tl_dist.train.task import LinearProbe
from dp4tl_dist.transfer import cache_features
from dp4tl_dist.world import World

NETWORK = [name for name, method in METHODS.items() if method.reads != "losses"]


def digests(surrogate: Path, source: Path, target: Path, folder: Path) -> dict[str, str]:
    """A digest of the arrays of each artefact, from one rank with as many threads as torch has now."""
    same = {"batch_size": 40}  # a whole batch, a last one that is short, and one that is cut into parts
    for method in ("lm", "fm"):
        vote(World(), method=method, surrogate=surrogate, targets=[target], source=source, out=folder / f"{method}.npz",
             **same)  # type: ignore[arg-type]  # fmt: skip
    for name in [*NETWORK, "full"]:
        method, targets = "grand" if name == "full" else name, [target] if name == "retrieval" else []
        score(World(), method=method, surrogates=[surrogate], source=source, out=folder / f"{name}.npz",
              targets=targets, full_gradient=name == "full", **same)  # type: ignore[arg-type]  # fmt: skip
    cluster(World(), surrogate=surrogate, source=source, num_clusters=7, out=folder / "clusters.npz", **same)  # type: ignore[arg-type]
    found = {}
    for path in sorted(folder.glob("*.npz")):
        kind = {"clusters": "clusters", "lm": "votes", "fm": "votes"}.get(path.stem, "scores")
        arrays = load_npz(path, kind)[0]
        found[path.stem] = digest(*(arrays[name] for name in sorted(arrays)))
    beton = open_beton(source)
    model = build_model("resnet_tiny", beton.num_classes)
    model.load_state_dict(checkpoint.load_weights(surrogate))
    split = Split(BetonLoader(beton), np.arange(beton.num_samples))
    cached = cache_features(LinearProbe(model, 3), split, beton, CentreView(40), World())
    return found | {"cached": digest(cached.features.numpy())}


def digest(*arrays: np.ndarray) -> str:
    return hashlib.blake2b(b"".join(array.tobytes() for array in arrays), digest_size=8).hexdigest()


if __name__ == "__main__":
    disorder = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        disorder.append([torch.ones(999 * threads + i) for i in range(100)][::threads])  # other addresses are free now
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(digests(*(Path(item) for item in sys.argv[1:4]), Path(folder))))
