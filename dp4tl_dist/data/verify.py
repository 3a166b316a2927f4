"""`dp4tl info --verify`: every byte of a beton held against its checksums."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from dp4tl_dist.data.beton import Beton, open_beton
from dp4tl_dist.data.rows import DIFFERS, another, describe_sample, read_names, read_rows, rows_path
from dp4tl_dist.errors import UserError

EVERY = 256


def verify(path: Path, report: Callable[[int, int], None]) -> list[str]:
    """Read every sample of a beton; a line for each that is not what was written, in file order, and for its tables.

    `report(done, total)` is called now and then. Raises UserError where there are no checksums, or another beton's.
    """
    beton = open_beton(path, described=False)  # whatever its labels are now: a changed one is to be found
    rows = read_rows(beton)
    if rows is None:
        raise UserError(f"{path} has no checksums ({rows_path(path).name}): it was not written by this `dp4tl`")
    wrong = []
    with open(path, "rb") as handle:
        for done, position in enumerate(np.argsort(beton.pointers, kind="stable").tolist()):
            handle.seek(int(beton.pointers[position]))
            if not rows.proves(beton, position, handle.read(int(beton.sizes[position]))):
                wrong.append(position)
            if done % EVERY == 0:
                report(done, beton.num_samples)
    changed = rows.fingerprint != beton.fingerprint
    if changed and len(wrong) == beton.num_samples:
        raise another(beton, rows.fingerprint)
    return _lines(beton, sorted(wrong)) + ["its tables are not those that were written"] * changed


def _lines(beton: Beton, wrong: list[int]) -> list[str]:
    names = read_names(beton)
    return [f"the sample at {describe_sample(beton, position, names)}: {DIFFERS}" for position in wrong]
