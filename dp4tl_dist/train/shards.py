"""An optimizer's state in shares, one a rank: dealing them out to another number of ranks."""

from typing import NamedTuple

import torch
from torch import Tensor


class Block(NamedTuple):
    """Values that were cut into equal shares, the last ones padded."""

    numel: int
    share: int = 0
    """Values in each new share; 0: as few as hold them all."""


def reshard(shares: list[Tensor], blocks: list[Block], *, num_ranks: int, rank: int) -> Tensor:
    """The flat share of `rank` among `num_ranks`, from the flat `shares` of others, in the order of their ranks.

    A share holds a part of every block, one after the other. With a single block its parts may be padded at will;
    several must be cut as small as can be.
    """
    parts, offset = [], 0
    for block in blocks:
        old = len(shares[0]) if len(blocks) == 1 else -(-block.numel // len(shares))
        whole = torch.cat([share[offset : offset + old] for share in shares])[: block.numel]
        offset += old
        new = block.share or -(-block.numel // num_ranks)
        part = torch.zeros(new, dtype=whole.dtype)
        mine = whole[rank * new : (rank + 1) * new]
        part[: len(mine)] = mine
        parts.append(part)
    return torch.cat(parts)
