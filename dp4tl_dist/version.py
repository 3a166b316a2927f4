"""Which code runs: the commit of its checkout, and a digest of the package's own files."""

import functools
import hashlib
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parent


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """The checkout's commit, with "+changes" where the package differs from it; empty outside of a git checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return ""
    try:
        head, changes = (
            subprocess.run(["git", "-C", PACKAGE, *line], capture_output=True, text=True, timeout=20, check=True).stdout
            for line in (("rev-parse", "HEAD"), ("status", "--porcelain", "--", "."))
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a checkout that another user owns
        return ""
    return head.strip() + ("+changes" if changes.strip() else "")


def code_digest(package: Path = PACKAGE) -> str:
    """A digest of the package's source files: it changes with every edit, committed or not."""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
