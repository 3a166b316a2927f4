"""Whether two datasets of a run have one content, told before they are written.

A beton's fingerprint is made of its tables: each sample's label, sides and size, in the file's order. What a stage will
write is encoded here as it does, one by one, and no further than the first sample that differs: of two datasets that
are no copies that is nearly always the first one. File names and folders have no part in it.
"""

import filecmp
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from dp4tl_dist.data.beton import JPEG, Beton
from dp4tl_dist.data.encode import Sample, encode_samples
from dp4tl_dist.data.write import WriteOptions, written_order

Row = tuple[int, int, int, int, int]
"""Mode, label, height, width and bytes of a stored sample."""


@dataclass(frozen=True, eq=False)
class Content:
    """The samples of a beton that is there, or those that one will be written from."""

    beton: Beton | None = None
    samples: Sequence[Sample] = ()
    options: WriteOptions = field(default_factory=WriteOptions)
    _found: dict["Content", bool] = field(default_factory=dict)

    def same(self, other: "Content") -> bool:
        """Whether the two betons have, or will have, one fingerprint. Each question is answered once."""
        if other not in self._found:
            self._found[other] = self._same(other)
        return self._found[other]

    def _same(self, other: "Content") -> bool:
        if self.beton is not None and other.beton is not None:
            return self.beton.fingerprint == other.beton.fingerprint
        return self._copied(other) or all(one == two for one, two in zip_longest(self._rows(), other._rows()))

    def _copied(self, other: "Content") -> bool:
        """Whether file by file the bytes are the same: cheaper than to encode all of two large copies."""
        pairs = zip_longest(self.samples, other.samples)
        return self.options == other.options and all(one and two and _equal(one, two) for one, two in pairs)

    def _rows(self) -> Iterator[Row]:
        """The rows in the file's order. What cannot be read has none: `write` leaves it out, or refuses."""
        if (beton := self.beton) is not None:
            columns = (beton.modes, beton.labels, beton.heights, beton.widths, beton.sizes)
            yield from zip(*(column.tolist() for column in columns), strict=True)
            return
        how = self.options
        for i in written_order(len(self.samples), how.seed):
            source, label = self.samples[i]
            (found,) = encode_samples([source], max_side=how.max_side, quality=how.quality, reencode=how.reencode)
            if not isinstance(found, str):
                yield JPEG, label, found.height, found.width, len(found.payload)


def _equal(one: Sample, two: Sample) -> bool:
    if one.label != two.label or not (isinstance(one.source, Path) and isinstance(two.source, Path)):
        return False
    try:
        return filecmp.cmp(one.source, two.source, shallow=False)
    except OSError:  # `write` will tell of it
        return False
