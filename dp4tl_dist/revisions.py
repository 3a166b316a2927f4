"""What a finished stage is held against when the program changes: numbers, and not the release.

Raise a verb's number in RESULTS when the same command makes other *results* from the same inputs than before: other
pixels, another order, view, recipe or count. Every run then makes that verb's stages again, and what follows from them.
Raise a format's number in FORMATS when the file itself changes; what the older ones hold is still read, and a file of
a later number is refused. `tests/test_revisions.py` holds the results of a tiny run of each verb, and fails where they
change and the number does not.
"""

from pathlib import Path
from typing import Any

from dp4tl_dist.errors import UserError

RESULTS = {
    "write": 2,
    "train": 3,
    "cluster": 2,
    "vote": 2,
    "score": 2,
    "prune": 1,
    "compact": 1,
    "transfer": 4,
    "influence": 4,
}
"""The number of each verb's results."""

FORMATS = {
    "dataset": 1,  # a beton with its sidecar
    "rows": 1,
    "checkpoint": 1,
    "clusters": 1,
    "votes": 1,
    "scores": 1,
    "subset": 1,
    "transfer": 1,
    "influence": 1,
    "record": 1,  # of a stage, in RUN_DIR/stages
}
"""The number of each kind of file. Files of 0.1 carry none, which counts as 0."""

MAKES = {
    "write": "dataset",
    "train": "checkpoint",
    "cluster": "clusters",
    "vote": "votes",
    "score": "scores",
    "prune": "subset",
    "compact": "dataset",
    "transfer": "transfer",
    "influence": "influence",
}
"""The kind of file that each verb makes."""


def revision(verb: str) -> list[int]:
    """What a stage's key holds of the program: the numbers of the verb's results and of the files it makes."""
    return [RESULTS[verb], FORMATS[MAKES[verb]]]


def check_format(path: Path, kind: str, meta: dict[str, Any]) -> None:
    """Refuse a file of a later format than this program knows."""
    found, known = meta.get("format", 0), FORMATS.get(kind, 0)
    if isinstance(found, int) and found > known:
        raise UserError(
            f"{path} was made by a later dp4tl (format {found} of {kind} files; this one reads up to {known}): upgrade"
        )
