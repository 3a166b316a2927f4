"""stdout and stderr that outlive whoever reads them: a closed, full or broken one costs its text, not the work."""

import errno
import io
import os
import select
import sys
from typing import Any


class Stream(io.FileIO):
    """A descriptor to write to. What it does not take is dropped, and the reason kept."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        while True:
            try:
                written = super().write(data)
            except OSError as error:
                self.refused = self.refused or error
                return len(data)
            if written is not None:
                return written
            select.select([], [self.fileno()], [])  # whoever shares it has set it not to block


def keep() -> None:
    """Have this process write to `Stream`s. A descriptor that was closed goes nowhere, and is no file's to get."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(handle, True)
    os.close(handle)
    for handle, name in ((1, "stdout"), (2, "stderr")):
        stream, original = getattr(sys, name), getattr(sys, f"__{name}__")
        if stream is not original or isinstance(getattr(getattr(stream, "buffer", None), "raw", None), Stream):
            continue  # a test's, or done before
        encoding = stream.encoding if stream else "utf-8"
        buffer = io.BufferedWriter(Stream(handle, "w", closefd=False))
        by_line = handle == 2 or bool(stream and stream.line_buffering)
        # Names of files need not be text: show them, whatever they hold.
        kept = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=by_line)
        setattr(sys, name, kept)
        setattr(sys, f"__{name}__", kept)


def lost_output() -> str:
    """Why a part of stdout is lost; empty where all went well, or whoever read it has seen enough."""
    sys.stdout.flush()
    raw = getattr(getattr(sys.stdout, "buffer", None), "raw", None)
    refused = raw.refused if isinstance(raw, Stream) else None
    return "" if refused is None or refused.errno == errno.EPIPE else str(refused.strerror)
