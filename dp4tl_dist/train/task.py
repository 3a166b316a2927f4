"""Tasks: what a batch is worth. The loop knows nothing of objectives, and a task knows nothing of ranks."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from dp4tl_dist.data.loader import IGNORED, Batch
from dp4tl_dist.models import head_name, normalise, replace_head
from dp4tl_dist.train.checkpoint import load_into


class Task(Protocol):
    """A module and the loss of a batch under it."""

    module: nn.Module
    """What the checkpoint stores and the engine wraps."""
    forward: Callable[[Tensor], Tensor]
    """The module as the engine wrapped it (data parallel, compiled): what the loss must call."""

    epoch: int
    """Set by the loop before an epoch's first batch, for what a task draws at random."""
    robust: Callable[[nn.Module, Batch], Tensor] | None
    """The attack that validation adds, if any: (module, batch) -> attacked images."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": scalar mean over the batch, ...}, with gradients."""
        ...

    def predict(self, batch: Batch) -> Tensor:
        """Logits (batch, classes) of the unwrapped module, for evaluation."""
        ...

    def weights(self) -> dict[str, Tensor]:
        """What a checkpoint's weights are, by plain names."""
        ...

    def extra(self) -> dict[str, Any]:
        """What else resuming needs of the task, alike on all ranks: plain values and tensors."""
        ...

    def restore(self, folder: Path, extra: dict[str, Any]) -> None:
        """Take the weights of the checkpoint `folder`, and what `extra` gave when it was saved."""
        ...


class Supervised:
    """Cross-entropy on the labels. A sample that was left out (label IGNORED) adds nothing to its batch's sum."""

    robust: Callable[[nn.Module, Batch], Tensor] | None = None

    def __init__(self, module: nn.Module, *, label_smoothing: float = 0.0) -> None:
        self.module, self.epoch = module, 0
        self.forward: Callable[[Tensor], Tensor] = module
        self.label_smoothing = label_smoothing
        self.watch: Callable[[Batch, Tensor], None] | None = None
        """Is shown each batch and its logits (n, classes), where somebody logs them."""

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.forward(inputs_of(batch))
        if self.watch is not None:
            self.watch(batch, logits.detach())
        # Divided by the whole batch, and not by the samples that count: then ranks and micro-batches weigh alike.
        total = functional.cross_entropy(
            logits.float(), batch.labels, label_smoothing=self.label_smoothing, ignore_index=IGNORED, reduction="sum"
        )
        return {"loss": total / len(batch.labels)}

    def predict(self, batch: Batch) -> Tensor:
        logits: Tensor = self.module(inputs_of(batch))
        return logits

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()

    def extra(self) -> dict[str, Any]:
        return {}

    def restore(self, folder: Path, extra: dict[str, Any]) -> None:
        load_into(self.module, folder)


def inputs_of(batch: Batch) -> Tensor:
    """The network's input: normalised pixels, or cached features (batch, dim) as they are."""
    return normalise(batch.images) if batch.images.dim() == 4 else batch.images


class LinearProbe(nn.Module):
    """A frozen backbone and a fresh head: only the head has gradients, and batch norm cannot drift."""

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.head = replace_head(model, num_classes)
        parent_name, _, leaf = head_name(model).rpartition(".")
        setattr(model.get_submodule(parent_name), leaf, nn.Identity())
        self.backbone = model.requires_grad_(False)

    def train(self, mode: bool = True) -> "LinearProbe":
        super().train(mode)
        self.backbone.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(batch, 3, height, width) -> (batch, classes)"""
        # An attack asks for the gradient of the pixels; nothing else does.
        with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
            features = self.backbone(images)
        logits: Tensor = self.head(features)
        return logits


def backbone_digest(backbone: nn.Module) -> str:
    """A digest of every parameter and buffer, bit by bit."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(backbone.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
