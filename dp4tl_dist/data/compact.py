"""Copies a subset of a beton into a beton of its own: payloads byte by byte, in new pages, in a new order."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dp4tl_dist.data.beton import Beton, BetonWriter, open_beton
from dp4tl_dist.data.order import epoch_order
from dp4tl_dist.data.rows import DIFFERS, check_beton_output, describe_sample, load_rows, read_names, warn_unchecked
from dp4tl_dist.data.subset import load_subset
from dp4tl_dist.data.write import WRITE_EPOCH
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, make_meta

RUN_BYTES = 64 << 20


def compact(source: Path, subset: Path, out: Path, *, seed: int = 0, force: bool = False) -> int:
    """Write the samples of `subset` from `source` to `out`, shuffled with `seed`; returns their number.

    Identifiers, labels, class and file names stay as they are, so results by identifier still refer to `source`.
    Payloads are held against their checksums. Memory is bounded by `RUN_BYTES`. Raises UserError for a subset of
    another file, a damaged sample or an output that exists.
    """
    beton = open_beton(source)
    chosen = load_subset(subset, beton=beton)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed {seed} is not possible: use 0 to 2**63 - 1")
    check_beton_output(out, force=force, inputs=[source, subset])
    order = epoch_order(chosen.indices, seed=seed, epoch=WRITE_EPOCH)
    inputs = {"source": beton.fingerprint, "subset": digest_file(subset)}
    rows, names = load_rows(beton), read_names(beton)
    if rows is None:
        warn_unchecked(source)
    with BetonWriter(out, capacity=len(order)) as writer:
        for index, payload in _payloads(beton, order):
            if rows is not None and not rows.proves(beton, index, payload):
                raise UserError(
                    f"{source}: the sample at {describe_sample(beton, index, names)} is damaged, as {DIFFERS}: "
                    "write the file again, or leave the sample out of the subset"
                )
            writer.add(
                payload,
                height=int(beton.heights[index]),
                width=int(beton.widths[index]),
                label=int(beton.labels[index]),
                identifier=int(beton.identifiers[index]),
                mode=int(beton.modes[index]),
                name=names[index] if names else "",
            )
        origin, made_from = {"origin": str(source)}, [chosen.meta, beton.meta]
        meta = make_meta("dataset", config=origin, seed=seed, inputs=inputs, made_from=made_from)
        writer.finish(beton.classes, meta)
    return len(order)


def _payloads(beton: Beton, order: NDArray[np.int64]) -> Iterator[tuple[int, bytes]]:
    """(index, payload) in `order`. Runs of `RUN_BYTES` are read in file order: far faster where seeking costs."""
    with open(beton.path, "rb") as handle:
        ends = np.cumsum(beton.sizes[order])
        for run in np.split(order, np.flatnonzero(np.diff(ends // RUN_BYTES)) + 1):
            payloads = {}
            for index in run[np.argsort(beton.pointers[run])].tolist():
                handle.seek(int(beton.pointers[index]))
                payloads[index] = handle.read(int(beton.sizes[index]))
            for index in run.tolist():
                yield index, payloads.pop(index)
