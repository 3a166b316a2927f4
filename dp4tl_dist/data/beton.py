"""Datasets in FFCV's file format (.beton): opened and validated here, laid out in `beton_format`.

Stock FFCV reads what is written here, and files of stock FFCV with an image and a label field read here.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton_format import (
    ALLOCATION,
    FIELD,
    HEADER,
    IMAGE,
    JPEG,
    MAX_CLASSES,
    RAW,
    damaged,
    digest,
    find_roles,
    metadata_dtype,
    payload_sizes,
    read_array,
    read_head,
    sidecar,
)
from dp4tl_dist.data.beton_writer import BetonWriter
from dp4tl_dist.data.rows import rows_path
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import read_json
from dp4tl_dist.inputs import open_plain
from dp4tl_dist.revisions import check_format

__all__ = [
    "ALLOCATION", "FIELD", "HEADER", "IMAGE", "JPEG", "RAW",
    "Beton", "BetonWriter", "describe", "fingerprint", "open_beton", "sidecar",
]  # fmt: skip


@dataclass(frozen=True, eq=False)
class Beton:
    """An opened and validated file. Arrays are read-only, one row a sample, in file order."""

    path: Path
    page_size: int
    fingerprint: str
    classes: tuple[str, ...]
    labels: NDArray[np.int64]
    identifiers: NDArray[np.int64]
    heights: NDArray[np.uint16]
    widths: NDArray[np.uint16]
    modes: NDArray[np.uint8]
    pointers: NDArray[np.uint64]
    sizes: NDArray[np.uint64]
    fields: tuple[str, ...]
    meta: dict[str, Any] = field(default_factory=dict)
    """What its sidecar says of how it was made."""

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def class_sizes(self) -> NDArray[np.int64]:
        """How many samples each class has, int64 (classes,)."""
        return np.bincount(self.labels[self.labels >= 0], minlength=self.num_classes).astype(np.int64)

    @property
    def pages(self) -> NDArray[np.int64]:
        """The page that holds each sample's payload, int64 (samples,)."""
        return (self.pointers // np.uint64(self.page_size)).astype(np.int64)

    def labels_for(self, what: str, kept: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The labels (samples,), for `what`, which needs them: UserError where a sample (of those `kept`) has none."""
        some = self.labels if kept is None else self.labels[kept]
        if without := int((some < 0).sum()):
            raise UserError(
                f"{self.path}: {without} of {len(some)} samples have no label (-1), and {what} needs them: use a "
                "labelled file; cluster, vote --clusters and task.kind moco need none"
            )
        return self.labels

    @property
    def num_unlabelled(self) -> int:
        """How many samples have the label -1."""
        return int((self.labels < 0).sum())

    def payload(self, index: int) -> bytes:
        """The stored bytes of one image: a JPEG file, or raw RGB rows."""
        with open(self.path, "rb") as handle:
            handle.seek(int(self.pointers[index]))
            return handle.read(int(self.sizes[index]))


def fingerprint(path: Path) -> str:
    """blake2b over everything but the payloads, so that it is cheap at any size."""
    return open_beton(path).fingerprint


def open_beton(path: Path, *, described: bool = True) -> Beton:
    """Open and validate a file of this project or of stock FFCV (an image and a label field; JPEG or raw).

    The label -1 says that a sample has none. Without a sidecar, or not `described` by it, classes are called "0", "1",
    ...; without an identifier field identifiers are positions.
    Raises UserError for anything else, before allocating more than the file's own size.
    """
    try:
        with open_plain(path) as handle:
            header, table = read_head(path, handle, os.fstat(handle.fileno()).st_size)
            metadata = read_array(handle, metadata_dtype(table["type"].tolist()), int(header["num_samples"]))
            start = handle.tell()
            handle.seek(int(header["allocation"]))
            allocation = read_array(handle, ALLOCATION, int(header["num_samples"]))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): pass a .beton file") from error
    found = digest(header, table, metadata, allocation)
    names, image, label, identifier = find_roles(path, table)
    columns = {name: np.ascontiguousarray(metadata[image][name]) for name in ("height", "width", "mode", "pointer")}
    sizes = payload_sizes(path, columns, allocation, start=start, header=header)
    labels = np.ascontiguousarray(metadata[label], np.int64)
    identifiers = np.arange(len(labels)) if identifier is None else np.ascontiguousarray(metadata[identifier], np.int64)
    if identifiers.min() < 0 or (np.diff(np.sort(identifiers)) == 0).any():
        damaged(path, "identifiers are negative or repeat")
    for array in (labels, identifiers, *columns.values(), sizes):
        array.setflags(write=False)
    classes, meta = _classes(path, labels, found if described else None)
    return Beton(
        path=path,
        page_size=int(header["page_size"]),
        fingerprint=found,
        classes=classes,
        labels=labels,
        identifiers=identifiers,
        heights=columns["height"],
        widths=columns["width"],
        modes=columns["mode"],
        pointers=columns["pointer"],
        sizes=sizes,
        fields=names,
        meta=meta,
    )


def check_apart(train: Path, test: Path, *, same: bool) -> None:
    """Refuse a test set that is the training set, or a copy of it: of the same content (fingerprints)."""
    if same:
        raise UserError(
            f"{test} holds the samples of {train}: a test on what was trained on tells nothing; pass the "
            "target's own test set"
        )


def _classes(path: Path, labels: NDArray[np.int64], expected: str | None) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of the classes, and the meta of the sidecar that has them."""
    low, high = int(labels.min()), int(labels.max())
    if low < -1 or high >= MAX_CLASSES:
        damaged(path, f"labels from {low} to {high}")
    described = sidecar(path)
    if expected is None or not described.exists():
        return tuple(str(i) for i in range(high + 1)), {}
    content = read_json(described)
    names = content.get("classes") if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f"{described} lists no class names: write {path} again, or remove it to use numbers as names")
    if content.get("fingerprint") != expected:
        raise UserError(
            f"{described} describes another beton ({content.get('fingerprint')}) than {path} ({expected}): "
            "copy the two files together, or write them again"
        )
    if isinstance(meta := content.get("meta"), dict):
        check_format(path, "dataset", meta)
    if high >= len(names):
        raise UserError(f"{path} has the label {high}, and {described} names {len(names)} classes: write it again")
    meta = content.get("meta")
    return tuple(names), meta if isinstance(meta, dict) else {}


def describe(beton: Beton) -> dict[str, Any]:
    """What `dp4tl info` shows of a dataset; plain JSON types."""
    sides = {"height": beton.heights, "width": beton.widths}
    per_class = np.bincount(beton.labels[beton.labels >= 0], minlength=max(1, beton.num_classes))
    described = sidecar(beton.path)
    return {
        "kind": "dataset",
        "path": str(beton.path),
        "fingerprint": beton.fingerprint,
        "num_samples": beton.num_samples,
        "num_classes": beton.num_classes,
        "classes_with_samples": int(np.count_nonzero(per_class)),
        "num_unlabelled": beton.num_unlabelled,
        "classes": list(beton.classes),
        "samples_per_class": {"min": int(per_class.min()), "max": int(per_class.max())},
        "fields": list(beton.fields),
        "page_size": beton.page_size,
        "num_pages": len(np.unique(beton.pages)),
        "payload_bytes": int(beton.sizes.sum()),
        "file_bytes": beton.path.stat().st_size,
        "jpeg_samples": int((beton.modes == JPEG).sum()),
        **{name: {"min": int(a.min()), "mean": float(a.mean()), "max": int(a.max())} for name, a in sides.items()},
        "checksums": rows_path(beton.path).is_file(),
        "meta": read_json(described).get("meta") if described.exists() else None,
    }
