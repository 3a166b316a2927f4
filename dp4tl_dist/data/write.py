"""Writes image folders, or any sequence of samples, into a beton: shuffled once, encoded by several processes.

The file depends on the samples and the options alone, not on the number of processes.
"""

import contextlib
import itertools
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dp4tl_dist.data.beton import BetonWriter
from dp4tl_dist.data.encode import Encoded, Sample, Source, encode_samples, prepare_worker
from dp4tl_dist.data.folder import ImageFolder, check_broken, check_skipped, folder_samples, read_folder
from dp4tl_dist.data.order import epoch_order
from dp4tl_dist.data.rows import check_beton_output
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import make_meta
from dp4tl_dist.limits import MAX_WORKERS, MOST
from dp4tl_dist.machine import num_cores

__all__ = ["ImageFolder", "Sample", "WriteReport", "folder_samples", "read_folder", "write_folder", "write_samples"]

WRITE_EPOCH = 2**63
"""The shuffle at write time has a key of its own, apart from every epoch's."""
CHUNK = 16
CHUNKS_AHEAD = 3
"""For each process: enough that none waits, and a bound on the payloads held in memory."""
WORTH_PROCESSES = 2.0
"""Seconds of encoding below which processes take longer to start than they save."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WriteReport:
    num_samples: int
    num_classes: int
    skipped: list[tuple[str, str]]
    """(path, reason) of each unreadable image, by path."""
    left_out: dict[str, int]
    """How many files and folders were no images to begin with, by reason."""
    seconds: float


@dataclass(frozen=True)
class WriteOptions:
    max_side: int = 400
    """Longest stored side in pixels; 0 keeps every size."""
    quality: int = 90
    seed: int = 0
    num_workers: int = 0
    """Encoding processes; 0 takes what this process's cores and the amount of work suggest."""
    skip_bad: bool = False
    force: bool = False
    reencode: bool = False
    """Encode the JPEGs anew that could be kept as they are."""

    def __post_init__(self) -> None:
        if self.max_side < 0 or 0 < self.max_side < 8 or self.max_side > MOST:
            raise UserError(f"max_side {self.max_side} is not possible: use 8 to {MOST} pixels, or 0 for no limit")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality {self.quality} is not possible: use 1 to 100")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} is not possible: use 0 to {2**63 - 1}")
        if not 0 <= self.num_workers <= MAX_WORKERS:
            raise UserError(f"num_workers {self.num_workers} is not possible: use 0 to {MAX_WORKERS}")


def write_folder(
    images: Path,
    out: Path,
    *,
    max_side: int = 400,
    quality: int = 90,
    seed: int = 0,
    num_workers: int = 0,
    skip_bad: bool = False,
    force: bool = False,
    reencode: bool = False,
    progress: Progress | None = None,
) -> WriteReport:
    """Write images/<class>/.../<image> to `out`. See `write_samples`; class names are the sorted folder names."""
    options = WriteOptions(max_side, quality, seed, num_workers, skip_bad, force, reencode)
    found = read_folder(images)
    return write_images(found, out, options=options, origin=str(images), root=images, progress=progress)


def write_images(
    found: ImageFolder, out: Path, *, options: WriteOptions, origin: str, root: Path, progress: Progress | None = None
) -> WriteReport:
    """`write_samples` for a folder that was read. What leads nowhere counts as unreadable."""
    check_broken(found, skip_bad=options.skip_bad)
    return write_samples(
        found.samples, found.classes, out, options=options, origin=origin, root=root, progress=progress,
        broken=found.broken, left_out=found.left_out,
    )  # fmt: skip


def write_samples(
    samples: Sequence[Sample],
    classes: Sequence[str],
    out: Path,
    *,
    options: WriteOptions | None = None,
    origin: str = "",
    root: Path | None = None,
    progress: Progress | None = None,
    broken: Sequence[tuple[str, str]] = (),
    left_out: Mapping[str, int] = MappingProxyType({}),
) -> WriteReport:
    """Encode `samples` in a seeded random order; identifiers are their positions in the file.

    `origin` is kept in the file's meta, and each file's name below `root` in its rows; `progress(done, total)` is
    called now and then. `broken` (path, reason) count among the skipped; `left_out` is told. Raises UserError for
    unreadable files (unless options.skip_bad), RuntimeError when an encoding process dies; either way nothing is left
    at `out`.
    """
    options = options or WriteOptions()
    start = time.monotonic()
    if not samples:
        raise UserError(f"{origin or out}: there are no images to write")
    check_beton_output(out, force=options.force)
    order = written_order(len(samples), options.seed)
    skipped = list(broken)
    with BetonWriter(out, capacity=len(samples)) as writer:
        encoded = _encode_all((samples[i].source for i in order), options)
        with contextlib.closing(encoded):
            for done, (i, result) in enumerate(zip(order, encoded, strict=True), 1):
                if isinstance(result, str):
                    skipped.append((str(samples[i].source), result))
                elif options.skip_bad or not skipped:
                    payload, height, width = result
                    label, place = samples[i].label, writer.num_samples
                    name = _name(samples[i].source, root)
                    writer.add(payload, height=height, width=width, label=label, identifier=place, name=name)
                if progress and (done % CHUNK == 0 or done == len(order)):
                    progress(done, len(order))
        skipped.sort()
        check_skipped(skipped, len(order) + len(broken), skip_bad=options.skip_bad)
        config = asdict(options) | {"origin": origin}
        meta = make_meta("dataset", config=config, seed=options.seed)
        writer.finish(classes, meta | {"skipped": skipped, "left_out": dict(left_out)})
    return WriteReport(writer.num_samples, len(classes), skipped, dict(left_out), time.monotonic() - start)


def written_order(count: int, seed: int) -> list[int]:
    """Which of so many samples is the first in the file, the second, ..."""
    return [int(i) for i in epoch_order(np.arange(count), seed=seed, epoch=WRITE_EPOCH)]


def _name(source: Source, root: Path | None) -> str:
    """A file's name, below `root` where it lies there; "" for what is no file."""
    if not isinstance(source, Path):
        return ""
    return str(source.relative_to(root) if root is not None and source.is_relative_to(root) else source)


# ---------------------------------------------------------------- processes


def _encode_all(sources: Iterator[Source], options: WriteOptions) -> Generator[Encoded | str, None, None]:
    """The results for `sources`, in order."""
    encode: Any = partial(encode_samples, max_side=options.max_side, quality=options.quality, reencode=options.reencode)
    chunks = iter(lambda: list(itertools.islice(sources, CHUNK)), [])
    num_workers = options.num_workers or num_cores()
    if options.num_workers == 0 or num_workers == 1:
        started = time.monotonic()
        for chunk in chunks:
            yield from encode(chunk)
            # Small jobs are done before processes would have started.
            if num_workers > 1 and time.monotonic() - started > WORTH_PROCESSES:
                break
        else:
            return
    # "spawn": a fork of a process with threads (torch, gloo) may deadlock.
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn"), initializer=prepare_worker) as pool:
        waiting: deque[Future[list[Encoded | str]]] = deque()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(encode, chunk))
                if len(waiting) > CHUNKS_AHEAD * num_workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                "an encoding process died (out of memory?): use fewer workers, or 1 to see why"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
