"""Writing checkpoints: at once, or in the background, so that a step on the GPU does not wait for the disk."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from dp4tl_dist.errors import UserError
from dp4tl_dist.log import warn


class Saver:
    """One checkpoint at a time. A full disk is warned about; what that means for the run is for the caller to say."""

    def __init__(self, *, background: bool) -> None:
        self.background = background
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[str] | str = ""

    def save(self, folder: Path, write: Callable[[dict[str, Any]], None], content: dict[str, Any]) -> None:
        """Have `write(content)` make `folder`. In the background it is given a copy, and the next save waits for it."""
        self.wait()
        if not self.background:
            self._last = _attempt(folder, write, content)
            return
        content = snapshot(content)
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # the copies have arrived
        self._last = self._pool.submit(_attempt, folder, write, content)

    def wait(self) -> str:
        """Wait for the last save to end, and return what it failed of; empty where the checkpoint is whole."""
        if isinstance(self._last, Future):
            self._last = self._last.result()
        return self._last

    def close(self) -> None:
        self._pool.shutdown()


def _attempt(folder: Path, write: Callable[[dict[str, Any]], None], content: dict[str, Any]) -> str:
    try:
        write(content)
    except (OSError, RuntimeError, SafetensorError, UserError) as error:
        failure = f"could not save {folder} ({' '.join(str(error).split())})"
        warn(failure + ": the last good checkpoint stays")
        return failure
    return ""


def snapshot(tree: Any) -> Any:
    """A copy of nested dicts, lists and tensors in the CPU's memory. From the GPU it travels while the host goes on:
    synchronise before reading it."""
    if isinstance(tree, Tensor):
        copy = torch.empty_like(tree, device="cpu", pin_memory=tree.is_cuda)
        return copy.copy_(tree.detach(), non_blocking=True)
    if isinstance(tree, dict):
        return {key: snapshot(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [snapshot(value) for value in tree]
    return tree
