"""Scores of single samples by a network's outputs: EL2N, GraNd, and nearness to a target's images.

Each function takes a batch and returns float64 (n,): a sample's score depends on its own row alone. Norms and softmax
round; one thread computes them, so that nothing but the row counts (`dp4tl_dist.exact`).
"""

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from dp4tl_dist.exact import one_thread
from dp4tl_dist.prune.votes import CHUNK, exact_distances

GRADIENTS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 26}  # numbers of float32, for each thread of a CPU


@one_thread()
def el2n(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The L2 norm of the error, ||softmax(logits) - onehot(label)||: high where a sample is hard. Kept: the highest.

    Paul, Ganguli, Dziugaite: "Deep Learning on a Data Diet", NeurIPS 2021 (arXiv 2107.07075), definition 3. There it is
    the mean over ten short trainings. logits: (n, classes). labels: int64 (n,).
    """
    return _error(logits, labels).norm(dim=1)


@one_thread()
def grand(logits: Tensor, features: Tensor, labels: Tensor) -> Tensor:
    """The norm of the cross-entropy's gradient with respect to the last layer, weights and bias. Kept: the highest.

    "Deep Learning on a Data Diet", definition 1, for the parameters of the head. They are W h + b with the features h,
    (n, dim), so the gradient is the outer product of the error p - y and (h, 1), whose norm is the product of the two
    norms: no gradient is ever held.
    """
    ones = torch.ones_like(features[:, :1])
    return _error(logits, labels).norm(dim=1) * torch.cat([features, ones], dim=1).double().norm(dim=1)


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    return logits.double().softmax(dim=1) - functional.one_hot(labels, logits.shape[1])


def full_grand(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """The norm of the cross-entropy's gradient with respect to all parameters, for each sample by itself.

    "Deep Learning on a Data Diet", definition 1, at these weights; batch norm uses its running statistics, so that a
    sample's gradient is its own. inputs: (n, 3, height, width), normalised. All n gradients are held at once; the model
    must be this thread's own.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**weights, **buffers}, (image[None],))
        return functional.cross_entropy(logits.float(), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0), chunk_size=None)(parameters, inputs, labels)
    squares = [value.double().flatten(1).square().sum(dim=1) for value in found.values()]
    return torch.stack(squares).sum(dim=0).sqrt()


def gradients_at_once(model: nn.Module, device: str) -> int:
    """Of how many samples the gradients are held at once: what `GRADIENTS_AT_ONCE` has room for, and one at least."""
    return max(1, GRADIENTS_AT_ONCE[device] // sum(value.numel() for value in model.parameters()))


def retrieval(features: Tensor, targets: Tensor) -> Tensor:
    """The cosine similarity to the nearest of the targets' images, in the surrogate's features. Kept: the highest.

    Nearest-neighbour retrieval, as in choosing pretraining data by similarity to the target (Cui et al., CVPR 2018,
    arXiv 1806.06193, for classes; Kim et al., "Coreset Sampling from Open-Set", CVPR 2023, arXiv 2303.11101, for
    samples). features: (n, dim). targets: (images, dim), unit rows as `unit` makes them.
    """
    rows = unit(features)
    nearest = torch.full_like(rows[:, 0], torch.inf)
    for part in targets.split(max(1, CHUNK // len(rows))):
        nearest = torch.minimum(nearest, exact_distances(rows, part).amin(dim=1))
    return 1 - nearest.square() / 2


@one_thread()
def unit(features: Tensor) -> Tensor:
    """float64 rows of length 1; a row of zeros stays."""
    rows = features.double()
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)
