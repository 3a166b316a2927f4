"""What identifies the content of a stage's input or output, wherever it lies. Read without torch."""

import hashlib
import json
from pathlib import Path
from typing import Any

from dp4tl_dist.data.beton import fingerprint as beton_fingerprint
from dp4tl_dist.data.walk import listing_digest
from dp4tl_dist.errors import UserError
from dp4tl_dist.files import digest_file, read_json


def content_digest(path: Path) -> str:
    """What identifies the content of an input or output; "absent" where there is nothing."""
    if path.suffix == ".beton" and path.is_file():
        try:
            return beton_fingerprint(path)
        except UserError:
            return "damaged"
    if path.is_file():
        return digest_file(path)
    if meta := checkpoint_meta(path) or newest_meta(path):
        return hashlib.blake2b(json.dumps(meta.get("digests")).encode(), digest_size=16).hexdigest()
    if path.is_dir():
        return listing_digest(path)
    return "absent"


def checkpoint_meta(folder: Path) -> dict[str, Any]:
    """The meta of a checkpoint's folder, {} for any other. Reads JSON alone, no weights."""
    if not (folder / "weights.safetensors").is_file() or not (folder / "meta.json").is_file():
        return {}
    found = read_json(folder / "meta.json")
    return found if isinstance(found, dict) else {}


def newest_meta(run_folder: Path) -> dict[str, Any]:
    """The meta of a training run's newest checkpoint, {} where there is none. Reads JSON alone, no weights."""
    metas = sorted((run_folder / "checkpoints").glob("step_*/meta.json"))
    found = read_json(metas[-1]) if metas else {}
    return found if isinstance(found, dict) else {}
