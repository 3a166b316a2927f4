"""Writes datasets in FFCV's file format, payload by payload."""

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dp4tl_dist.atomic import atomic_file
from dp4tl_dist.data.beton_format import (
    ALLOCATION,
    FIELD,
    HEADER,
    JPEG,
    MAX_PAGE_SIZE,
    MIN_PAGE_SIZE,
    VERSION,
    digest,
    metadata_dtype,
    sidecar,
)
from dp4tl_dist.data.rows import checksum, save_rows
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import write_json

PAGE_SIZE = 8 << 20
SMALL_FILE = 64 << 20
"""Up to this many bytes of payloads go in the smallest pages: a window of shuffled pages needs some pages to shuffle,
and the gap before the first page would outweigh the data. Larger files get `PAGE_SIZE`, one cheap sequential read."""
FIELDS = (("image", 2), ("label", 1), ("identifier", 1))


class BetonWriter:
    """Writes a beton sample by sample; it and the files beside it appear when the block ends after `finish`, or never.

    The same samples give the same bytes. `capacity` is the largest number of samples that will be added.
    """

    def __init__(self, path: Path, *, capacity: int) -> None:
        self.path = path
        self.num_samples = 0
        self._metadata = np.zeros(capacity, metadata_dtype(kind for _, kind in FIELDS))
        self._allocation = np.zeros(capacity, ALLOCATION)
        self._page_size = 0  # chosen once enough payloads are pending
        self._crc: list[int] = []
        self._names: list[str] = []
        self._pending: list[bytes] = []
        self._pending_bytes = 0
        self._position = HEADER.itemsize + len(FIELDS) * FIELD.itemsize + self._metadata.nbytes
        self._stack = ExitStack()
        self._finished = False

    def __enter__(self) -> "BetonWriter":
        with ExitStack() as stack:
            self._file = stack.enter_context(open(stack.enter_context(atomic_file(self.path)), "wb"))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        if error is None and not self._finished:
            error = RuntimeError(f"{self.path} was not finished")
            self._stack.__exit__(RuntimeError, error, None)
            raise error
        return self._stack.__exit__(kind, error, trace)

    def add(
        self, payload: bytes, *, height: int, width: int, label: int, identifier: int, mode: int = JPEG, name: str = ""
    ) -> None:
        """Append one image: a JPEG file, or height * width * 3 bytes of RGB rows with mode=RAW. name: of its file."""
        self._metadata[self.num_samples] = ((mode, width, height, 0), label, identifier)
        self._crc.append(checksum(payload, label=label, identifier=identifier))
        self._names.append(name)
        self.num_samples += 1
        self._pending.append(payload)
        self._pending_bytes += len(payload)
        if self._page_size or self._pending_bytes > SMALL_FILE:
            self._place_pending()

    def finish(self, classes: Sequence[str], meta: Mapping[str, Any]) -> str:
        """Write the tables, the rows and the sidecar; returns the fingerprint."""
        self._place_pending()
        header, table = np.zeros(1, HEADER), np.zeros(len(FIELDS), FIELD)
        for row, (name, kind) in zip(table, FIELDS, strict=True):
            row["type"] = kind
            row["name"][: len(name)] = np.frombuffer(name.encode("ascii"), np.uint8)
        metadata, allocation = self._metadata[: self.num_samples], self._allocation[: self.num_samples]
        header[0] = (VERSION, len(FIELDS), self._page_size, self.num_samples, self._position)
        self._file.seek(self._position)
        self._file.write(allocation.tobytes())
        self._file.seek(0)
        self._file.writelines(part.tobytes() for part in (header, table, metadata))
        # On disk before the sidecar is, so that a full disk leaves neither.
        self._file.flush()
        os.fsync(self._file.fileno())
        found = digest(header, table, metadata, allocation)
        save_rows(self.path, self._crc, self._names, fingerprint=found)
        write_json(sidecar(self.path), {"classes": list(classes), "meta": dict(meta), "fingerprint": found})
        self._finished = True
        return found

    def _place_pending(self) -> None:
        if not self._page_size:
            largest = max(map(len, self._pending), default=0)
            smallest = PAGE_SIZE if self._pending_bytes > SMALL_FILE else MIN_PAGE_SIZE
            self._page_size = min(MAX_PAGE_SIZE, max(smallest, 1 << (largest - 1).bit_length()))
            self._position += -self._position % self._page_size
        first = self.num_samples - len(self._pending)
        for i, payload in enumerate(self._pending, first):
            if len(payload) > self._page_size:
                raise UserError(
                    f"{self.path}: an image takes {len(payload)} bytes, more than a page of {self._page_size}: "
                    "use a smaller max_side or quality"
                )
            if len(payload) > self._page_size - self._position % self._page_size:
                self._position += -self._position % self._page_size
            self._file.seek(self._position)
            self._file.write(payload)
            self._metadata["f0"]["pointer"][i] = self._position
            self._allocation[i] = (i, self._position, len(payload))
            self._position += len(payload)
        self._pending.clear()
        self._pending_bytes = 0
