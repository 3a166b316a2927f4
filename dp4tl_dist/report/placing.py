"""Where the names of points go, so that none lies on another or on a point."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

STEPS = 10


class Box(NamedTuple):
    """A rectangle in shares of the axes."""

    left: float
    bottom: float
    right: float
    top: float

    def overlap(self, other: "Box") -> float:
        """The area that both cover."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(0.0, width) * max(0.0, height)

    @property
    def outside(self) -> float:
        """How far it reaches out of the axes."""
        return sum(max(0.0, way) for way in (-self.left, -self.bottom, self.right - 1, self.top - 1))


def place(points: Sequence[tuple[float, float]], sizes: Sequence[tuple[float, float]], mark: float) -> list[Box]:
    """A box of each of `sizes` (width, height) beside its point, as near as it finds room; all in shares of the axes.

    mark: how far a drawn point reaches to each side. Where there is no room, the place that covers least.
    """
    taken = [Box(x - mark, y - 1.5 * mark, x + mark, y + 1.5 * mark) for x, y in points]
    found: dict[int, Box] = {}
    for i in sorted(range(len(points)), key=lambda i: -points[i][1]):
        best = min(_beside(points[i], sizes[i], mark), key=lambda box: _cost(box, taken))
        taken.append(best)
        found[i] = best
    return [found[i] for i in range(len(points))]


def _beside(point: tuple[float, float], size: tuple[float, float], mark: float) -> Iterator[Box]:
    """The places to try, the nearest first: right, left, above and below, then further up and down."""
    (x, y), (width, height) = point, size
    starts = (x + 1.4 * mark, x - 1.4 * mark - width, x - width / 2)
    for step in range(STEPS):
        for way in (1, -1):
            middle = y + way * (0.3 + 0.5 * step) * height
            for left in starts if step > 1 else starts[:2]:
                yield Box(left, middle - height / 2, left + width, middle + height / 2)


def _cost(box: Box, taken: Sequence[Box]) -> float:
    return 10 * box.outside + sum(box.overlap(other) for other in taken)
