"""Momentum contrast (MoCo v2): a query is to find its key, the other view of its image, among the keys of other images.

What trains is the query encoder: the network with a small MLP in the place of its head. The key encoder follows it
slowly; former keys wait in a queue. Both, and the MLP, are in a checkpoint's state; its weights are the network's own.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from dp4tl_dist.config import MocoConfig
from dp4tl_dist.data.loader import IGNORED, Batch, SquareView
from dp4tl_dist.errors import UserError
from dp4tl_dist.models import head_name, normalise
from dp4tl_dist.train.checkpoint import load_weights
from dp4tl_dist.train.views import augmented
from dp4tl_dist.world import World

QUERY, KEY = 1, 2  # the numbers of the two views


class Moco:
    """The Task. All ranks hold the same queue and the same key encoder, but for its batch-norm statistics."""

    robust: Callable[[nn.Module, Batch], Tensor] | None = None

    def __init__(
        self, model: nn.Module, config: MocoConfig, world: World, *, seed: int, batch_size: int, parts: int = 1,
        flip: bool = True,
    ) -> None:  # fmt: skip
        """batch_size: the global one, over `parts` micro-batches. `model` becomes the query encoder."""
        check_moco(config, batch_size, batch_size // world.num_ranks // parts)
        self.config, self.world, self.seed, self.parts, self.flip = config, world, seed, parts, flip
        self.head = project(model, config.dim)
        self.module = model
        self.forward: Callable[[Tensor], Tensor] = model
        self.key = copy.deepcopy(model).requires_grad_(False)
        generator = torch.Generator().manual_seed(seed)
        self.queue = functional.normalize(torch.randn(config.queue, config.dim, generator=generator), dim=1)
        self.pointer, self.calls, self.epoch, self.placed = 0, 0, 0, False
        self.fresh: list[Tensor] = []

    # ---------------------------------------------------------------- a step

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """{"loss": scalar}: cross-entropy of each query's key among the queue's keys."""
        self._place(batch.images.device)
        if self.calls % self.parts == 0:
            self._enqueue()
            self._follow()
        queries = functional.normalize(self.forward(self._view(batch.images, batch.identifiers, QUERY)).float(), dim=1)
        keys, everyone = self._keys(batch)
        self.calls += 1
        loss = contrast(queries, keys, self.queue, temperature=self.config.temperature)
        # Divided by the whole batch, so that ranks and micro-batches weigh alike.
        total = (loss * (batch.labels != IGNORED)).sum() / len(loss)
        self.fresh.append(everyone)
        return {"loss": total}

    def _view(self, images: Tensor, identifiers: Tensor, view: int) -> Tensor:
        side = round(images.shape[2] / self.config.canvas)
        pixels = augmented(
            images, identifiers, side=side, seed=self.seed, epoch=self.epoch, view=view, how=self.config, flip=self.flip
        )
        return normalise(pixels).contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _follow(self) -> None:
        """The key encoder moves towards the query encoder."""
        for slow, fast in zip(self.key.parameters(), self.module.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.config.momentum)

    @torch.no_grad()
    def _keys(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The keys (n, dim) of this rank's samples, and those of all ranks in their order.

        Samples are shuffled over the ranks first: batch norm would otherwise tell by its statistics which key and query
        are of the same batch. Small pixels travel, and each rank makes the views of what it is given.
        """
        images, identifiers = all_gathered(self.world, batch.images), all_gathered(self.world, batch.identifiers)
        bits = np.random.Philox(key=np.array([self.seed, self.calls], np.uint64)).random_raw(len(identifiers))
        order = torch.from_numpy(np.argsort(bits, kind="stable")).to(images.device)
        n, rank = len(batch.identifiers), self.world.rank
        mine = order[rank * n : (rank + 1) * n]
        views = self._view(images[mine], identifiers[mine], KEY)
        parts = [self.key(part) for part in views.chunk(self.config.bn_groups)]
        shuffled = all_gathered(self.world, functional.normalize(torch.cat(parts).float(), dim=1))
        keys = torch.empty_like(shuffled)
        keys[order] = shuffled
        return keys[rank * n : (rank + 1) * n], keys

    def _enqueue(self) -> None:
        """The oldest keys make room for those of the last step, whose gradients have been taken by now."""
        for keys in self.fresh:
            self.queue[self.pointer : self.pointer + len(keys)] = keys
            self.pointer = (self.pointer + len(keys)) % len(self.queue)
        self.fresh = []

    def _place(self, device: torch.device) -> None:
        if not self.placed:
            self.queue = self.queue.to(device)
            self.key.to(device)
            if device.type == "cuda":
                self.key.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.placed = True

    # ---------------------------------------------------------------- around the steps

    def square(self, side: int, epoch: int) -> SquareView:
        """What the loader is to decode for views of `side`."""
        return SquareView(round(side * self.config.canvas), seed=self.seed, epoch=epoch)

    def predict(self, batch: Batch) -> Tensor:
        """Queries (batch, dim): there are no classes."""
        queries: Tensor = self.module(normalise(batch.images))
        return queries

    def weights(self) -> dict[str, Tensor]:
        """The query encoder as a plain network without its head."""
        return {name: value for name, value in self.module.state_dict().items() if not self._in_head(name)}

    def extra(self) -> dict[str, Any]:
        """What resuming needs beside the weights."""
        self._enqueue()
        head = {name: value for name, value in self.module.state_dict().items() if self._in_head(name)}
        return {
            "head": head, "key": self.key.state_dict(), "queue": self.queue, "pointer": self.pointer,
            "calls": self.calls,
        }  # fmt: skip

    def restore(self, folder: Path, extra: dict[str, Any]) -> None:
        """Go on from a checkpoint of a run with the same config."""
        self.module.load_state_dict({**load_weights(folder), **extra["head"]})
        self.key.load_state_dict(extra["key"])
        self.queue, self.placed = extra["queue"].clone(), False
        self.pointer, self.calls = int(extra["pointer"]), int(extra["calls"])

    def _in_head(self, name: str) -> bool:
        return name.startswith(self.head + ".")


def check_moco(config: MocoConfig, batch_size: int, share: int) -> None:
    """Raise UserError where queue and groups do not fit the global batch, or a rank's share of a micro-batch."""
    if config.queue % batch_size:
        raise UserError(
            f"task.moco.queue {config.queue} is not divisible by train.batch_size {batch_size}: choose a multiple"
        )
    if share % config.bn_groups:
        raise UserError(
            f"task.moco.bn_groups {config.bn_groups} does not divide the {share} samples of a rank: choose another"
        )


def project(model: nn.Module, dim: int) -> str:
    """Put an MLP with outputs of length `dim` in the place of the model's head; returns the head's name."""
    name = head_name(model)
    parent, _, leaf = name.rpartition(".")
    old = model.get_submodule(name)
    assert isinstance(old, nn.Linear)
    width = old.in_features
    mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, dim))
    setattr(model.get_submodule(parent), leaf, mlp)
    return name


def contrast(queries: Tensor, keys: Tensor, queue: Tensor, *, temperature: float) -> Tensor:
    """The loss (n,) of each query: cross-entropy of its own key among that and the queue's, all of length 1.

    queries and keys: (n, dim). queue: (size, dim), without gradients.
    """
    own = (queries * keys).sum(dim=1, keepdim=True)
    logits = torch.cat([own, queries @ queue.T], dim=1) / temperature
    first = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    return functional.cross_entropy(logits, first, reduction="none")


def all_gathered(world: World, rows: Tensor) -> Tensor:
    """The rows of all ranks, which have equally many, in the order of the ranks. Without gradients."""
    if world.num_ranks == 1:
        return rows
    rows = rows.contiguous()
    parts = [torch.empty_like(rows) for _ in range(world.num_ranks)]
    dist.all_gather(parts, rows)
    return torch.cat(parts)
