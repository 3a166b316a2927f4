"""The kNN probe: how well labels follow from the nearest neighbours' in feature space, while labels train nothing."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dp4tl_dist.data.loader import CentreView
from dp4tl_dist.data.order import inference_batches
from dp4tl_dist.models import logits_and_features, normalise
from dp4tl_dist.train.engine import DDPEngine, averaged_buffers
from dp4tl_dist.train.evaluate import Score, Split
from dp4tl_dist.train.moco import Moco
from dp4tl_dist.world import World, gather_rows

TEMPERATURE = 0.07
MAX_SAMPLES = 50_000
CHUNK = 1024


@torch.inference_mode()
def probe(
    task: Moco, engine: DDPEngine, world: World, split: Split, view: CentreView, *, batch_size: int = 256
) -> Score:
    """Accuracy over `split`, where each sample's class is voted for by its nearest others there (by cosine).

    The same numbers on every rank. Of a large split the first `MAX_SAMPLES` count. The loss is of the votes' shares.
    """
    kept = split.kept[:MAX_SAMPLES]
    batches = inference_batches(np.arange(len(kept)), batch_size=batch_size, num_ranks=world.num_ranks, rank=world.rank)
    was_training = task.module.training
    task.module.eval()
    rows, labels = [], []
    with averaged_buffers(task.module, world):
        for batch in split.source.epoch([kept[batch] for batch in batches], view):
            with engine.autocast():
                _, features = logits_and_features(task.module, normalise(batch.images), head=task.head)
            rows.append(functional.normalize(features.float().flatten(1), dim=1).cpu())
            labels.append(batch.labels.cpu())
    task.module.train(was_training)
    positions = np.concatenate([np.zeros(0, np.int64), *batches])
    dim = task.module.get_submodule(task.head)[0].in_features  # type: ignore[index]
    mine = torch.cat([torch.zeros(0, dim), *rows]).numpy()
    features = torch.from_numpy(gather_rows(world, positions, mine, len(kept))).to(world.device)
    known = torch.cat([torch.zeros(0, dtype=torch.int64), *labels]).numpy()
    truth = torch.from_numpy(gather_rows(world, positions, known, len(kept))).to(world.device)
    good = truth >= 0  # neither IGNORED nor unlabelled
    return score(features[good], truth[good], neighbours=task.config.neighbours)


def score(features: Tensor, labels: Tensor, *, neighbours: int) -> Score:
    """Leave-one-out kNN on unit features (n, dim) float32 and labels (n,): neighbours vote by exp(cosine / 0.07)."""
    num_classes, count = int(labels.max()) + 1, min(neighbours, len(labels) - 1)
    right, among_five, loss = 0, 0, 0.0
    for first in range(0, len(features), CHUNK):
        rows = features[first : first + CHUNK]
        closeness = rows @ features.T
        closeness.diagonal(first).fill_(-2.0)  # nobody is its own neighbour
        best, who = closeness.topk(count, dim=1)
        votes = torch.zeros(len(rows), num_classes, device=rows.device)
        votes.scatter_add_(1, labels[who], ((best - 1) / TEMPERATURE).exp())
        own = labels[first : first + CHUNK]
        top = votes.topk(min(5, num_classes), dim=1).indices == own[:, None]
        right, among_five = right + int(top[:, 0].sum()), among_five + int(top.sum())
        shares = (votes + 1e-3 / num_classes) / (votes.sum(dim=1, keepdim=True) + 1e-3)
        loss -= float(shares[torch.arange(len(rows), device=rows.device), own].log().double().sum())
    n = len(features)
    return Score(top1=right / n, top5=among_five / n, loss=loss / n, num_samples=n)
