"""Where the loop draws its batches from: a beton, or features that are already in memory."""

from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dp4tl_dist.data.loader import Batch, View


class Source(Protocol):
    """`dp4tl_dist.data.loader.BetonLoader` is one."""

    def epoch(self, batches: Sequence[NDArray[np.int64]], view: View) -> Generator[Batch, None, None]:
        """One Batch for each array of positions, in that order."""
        ...


class FeatureSource:
    """Features (samples, dim) float32 and labels (samples,) int64 in memory; a Batch carries features as its images."""

    def __init__(self, features: Tensor, labels: Tensor) -> None:
        self.features, self.labels = features, labels

    def epoch(self, batches: Sequence[NDArray[np.int64]], view: View) -> Generator[Batch, None, None]:
        """Views make no difference: the features are those of one view."""
        for positions in batches:
            index = torch.from_numpy(np.ascontiguousarray(positions)).to(self.features.device)
            yield Batch(self.features[index], self.labels[index], index)
