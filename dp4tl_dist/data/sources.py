"""torchvision's datasets as samples for `write_samples`: paths, or pixels where one file holds all images."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dp4tl_dist.data.encode import Sample
from dp4tl_dist.errors import UserError, one_of


@dataclass(frozen=True)
class Source:
    name: str
    """The class in torchvision.datasets."""
    layout: str
    """What `root` holds, for the message when it does not."""
    splits: Mapping[str, Mapping[str, Any]]
    """Split names of the command line, and what torchvision's constructor is told."""
    images: str = "_image_files"
    """The dataset's list of paths or pixels, or of (path, label) pairs where `labels` is empty."""
    labels: str = "_labels"
    downloads: bool = True


def _splits(*names: str) -> dict[str, dict[str, Any]]:
    return {name: {"split": name} for name in names}


_CIFAR_SPLITS = {"train": {"train": True}, "test": {"train": False}}

SOURCES: dict[str, Source] = {
    "flowers102": Source(
        "Flowers102", "flowers-102/ with jpg/, imagelabels.mat and setid.mat", _splits("train", "val", "test")
    ),
    "dtd": Source("DTD", "dtd/dtd/ with images/ and labels/", _splits("train", "val", "test")),
    "oxfordpets": Source(
        "OxfordIIITPet", "oxford-iiit-pet/ with images/ and annotations/", _splits("trainval", "test"), images="_images"
    ),
    "food101": Source("Food101", "food-101/ with images/ and meta/", _splits("train", "test")),
    "stanfordcars": Source(
        "StanfordCars",
        "stanford_cars/ with cars_train/, cars_test/, devkit/ and cars_test_annos_withlabels.mat",
        _splits("train", "test"),
        images="_samples",
        labels="",
        downloads=False,
    ),
    "sun397": Source("SUN397", "SUN397/ with ClassName.txt and a/, b/, ...", {"all": {}}),
    "cifar10": Source("CIFAR10", "cifar-10-batches-py/", _CIFAR_SPLITS, images="data", labels="targets"),
    "cifar100": Source("CIFAR100", "cifar-100-python/", _CIFAR_SPLITS, images="data", labels="targets"),
    "imagenet": Source(
        "ImageNet",
        "ILSVRC2012_devkit_t12.tar.gz, and train/ and val/ or their archives",
        _splits("train", "val"),
        images="samples",
        labels="",
        downloads=False,
    ),
}


def open_source(name: str, split: str, root: Path, *, download: bool = False) -> tuple[list[Sample], list[str]]:
    """The samples of one split, in a fixed order, and the class names.

    Downloads into `root` only when asked. Missing data is a UserError that says what `root` should hold.
    """
    source = SOURCES[one_of("dataset", name, list(SOURCES))]
    one_of(f"split of {name}", split, list(source.splits))
    if download and not source.downloads:
        raise UserError(f"{name} cannot be downloaded automatically: put {source.layout} into {root}")
    dataset = _construct(name, source, split, root, download=download)
    images = getattr(dataset, source.images)
    if source.labels:
        pairs = list(zip(images, getattr(dataset, source.labels), strict=True))
    else:
        pairs = list(images)
    if source.images != "data":
        # Some of these lists come in the order of the file system.
        pairs = sorted((Path(path), label) for path, label in pairs)
    # ImageNet's names in words are not unique ("crane" is a bird and a machine).
    classes = getattr(dataset, "wnids", None) or getattr(dataset, "classes", None)
    if classes is None:
        classes = range(max(label for _, label in pairs) + 1)
    return [Sample(image, int(label)) for image, label in pairs], [str(each) for each in classes]


def _construct(name: str, source: Source, split: str, root: Path, *, download: bool) -> Any:
    import torchvision.datasets  # takes a second, and most commands do without it

    arguments = dict(source.splits[split]) | ({"download": True} if download else {})
    try:
        return getattr(torchvision.datasets, source.name)(str(root), **arguments)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name} to read its labels: pip install {error.name}") from error
    except Exception as error:  # archives, label files and servers fail in many ways; all mean the same here
        reason = " ".join(str(error).split())
        if "scipy" in reason.lower() and "install" in reason:
            raise UserError(f"{name} needs scipy to read its labels: pip install scipy") from error
        if download:
            raise UserError(
                f"{name} cannot be downloaded into {root} ({reason}): try again, or fetch it yourself"
            ) from error
        remedy = ", or add --download" if source.downloads else ""
        raise UserError(f"{root} holds no readable {name} ({reason}): put {source.layout} into it{remedy}") from error
