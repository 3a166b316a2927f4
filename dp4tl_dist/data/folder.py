"""A folder of class folders as samples: what is an image, what leads nowhere, and what is left out and why."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dp4tl_dist.data.encode import Sample, is_image
from dp4tl_dist.data.walk import Found, scan
from dp4tl_dist.errors import UserError

TOLD_SUFFIXES = 8


@dataclass(frozen=True)
class ImageFolder:
    """What `read_folder` finds."""

    samples: list[Sample]
    classes: list[str]
    broken: list[tuple[str, str]]
    """(path, reason) of each name that leads nowhere: a link to what is gone."""
    left_out: dict[str, int]
    """How many names are no images, by reason."""


def folder_samples(images: Path) -> tuple[list[Sample], list[str]]:
    """The samples of images/<class>/.../<image>, sorted, and the class names; `read_folder` has the rest."""
    found = read_folder(images)
    return found.samples, found.classes


def read_folder(images: Path) -> ImageFolder:
    """What images/<class>/.../<image> holds: samples by path, classes by name.

    Files whose suffix is no image's are looked into: what is an image by its content is one. Raises UserError for a
    folder that is not of this form, or cannot be read.
    """
    if not images.is_dir():
        raise UserError(f"{images} is not a folder: give one that holds a folder of images for each class")
    tree = scan(images)
    others: Counter[str] = Counter()
    for path, status, fault in tree.loose:
        if status is None:  # it may have been a class
            raise UserError(f"{path} is {fault}: mend it or remove it")
    loose = [found.path for found in _only_images(tree.loose, others)]
    if loose:
        raise UserError(f"{loose[0]} is not in a class folder ({len(loose)} such images): move it to {images}/<class>/")
    if not tree.folders:
        raise UserError(f"{images} has no class folders: it should hold a folder of images for each class")
    samples: list[Sample] = []
    broken: list[tuple[str, str]] = []
    for label, (name, files) in enumerate(tree.folders.items()):
        taken = list(_only_images(files, others))
        if not taken:
            raise UserError(f"{images / name} holds no images: add some or remove the folder")
        samples += [Sample(path, label) for path, status, _ in taken if status]
        broken += [(str(path), fault) for path, status, fault in taken if not status]
    told = {f"not images ({suffix})": count for suffix, count in others.most_common(TOLD_SUFFIXES)}
    if rest := others.total() - sum(told.values()):
        told["not images (other suffixes)"] = rest
    return ImageFolder(samples, list(tree.folders), broken, {**told, **tree.left_out})


def check_broken(found: ImageFolder, *, skip_bad: bool) -> None:
    """Raise UserError for what will stop `write` and is known before any image is read."""
    check_skipped(found.broken, len(found.samples) + len(found.broken), skip_bad=skip_bad)


def _only_images(files: list[Found], others: Counter[str]) -> Iterator[Found]:
    """Those that are images, by suffix or content, and those that lead nowhere: what they were is not known."""
    for found in files:
        if found.status is None or is_image(found.path):
            yield found
        else:
            others[found.path.suffix.lower() or "without suffix"] += 1


def check_skipped(skipped: Sequence[tuple[str, str]], total: int, *, skip_bad: bool) -> None:
    """Raise UserError for images that cannot be read, unless they are to be skipped and some are left."""
    if skipped and (not skip_bad or len(skipped) == total):
        path, reason = skipped[0]
        remedy = "" if skip_bad else ", or skip them with --skip-bad"
        raise UserError(f"{len(skipped)} of {total} images cannot be read, first {path} ({reason}): mend them{remedy}")
