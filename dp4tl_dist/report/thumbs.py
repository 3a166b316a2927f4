"""Images for the page, straight from the betons, and few enough that the page stays small."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dp4tl_dist.data.beton import JPEG, Beton
from dp4tl_dist.report.collect import Run

THUMB_SIDE = 96
AS_IT_IS_BYTES = 4096
ALL_THUMBS_BYTES = 2 << 20
"""Of all images on a page."""


@dataclass(frozen=True)
class Thumb:
    """One image for the page."""

    uri: str
    caption: str


@dataclass(frozen=True)
class ClassSample:
    """A group with the images that stand for it."""

    name: str
    note: str
    thumbs: tuple[Thumb, ...]


class Thumbs:
    """Makes small data URIs, up to so many bytes in all."""

    def __init__(self, run: Run, num_bytes: int) -> None:
        self.run, self.left = run, num_bytes
        self.made: dict[tuple[Path, int], str | None] = {}

    def __call__(self, beton: Beton, index: int, caption: str) -> Thumb | None:
        """The image at a position; None where it cannot be read or the page is full."""
        key = (beton.path, index)
        if key not in self.made:
            self.made[key] = self.run.attempt(data_uri, beton, index)
        uri = self.made[key]
        if uri is None or len(uri) > self.left:
            return None
        self.left -= len(uri)
        return Thumb(uri, caption)

    def of(self, beton: Beton, positions: Iterable[int]) -> tuple[Thumb, ...]:
        """The images at these positions, each with its class's name."""
        names = (*beton.classes, "unlabelled")  # the label -1 is its place
        found = [self(beton, int(i), names[beton.labels[i]]) for i in positions]
        return tuple(thumb for thumb in found if thumb)


def data_uri(beton: Beton, index: int) -> str:
    """The stored JPEG itself where it is small; larger and raw images are shrunk first."""
    payload, height, width = beton.payload(index), int(beton.heights[index]), int(beton.widths[index])
    jpeg = int(beton.modes[index]) == JPEG
    if not jpeg or len(payload) > AS_IT_IS_BYTES:
        image = Image.open(io.BytesIO(payload)) if jpeg else Image.frombytes("RGB", (width, height), payload)
        image.draft("RGB", (2 * THUMB_SIDE, 2 * THUMB_SIDE))  # lets libjpeg decode at a fraction of the size
        image.thumbnail((THUMB_SIDE, THUMB_SIDE))
        small = io.BytesIO()
        image.convert("RGB").save(small, "JPEG", quality=80)
        payload = small.getvalue()
    return f"data:image/jpeg;base64,{base64.b64encode(payload).decode()}"
