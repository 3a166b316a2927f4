"""Run a function under N real ranks that talk by gloo, and get what each returned."""

import importlib.util
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# A server process does the slow imports once; forking a rank from it takes milliseconds, and is safe as they start no
# threads.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torchvision", "dp4tl_dist.prune.surrogate", "dp4tl_dist.train.checkpoint"])


def run_ranks(
    function: Callable[..., Any], num_ranks: int, *args: Any, timeout_s: float = 60.0, patience_s: float = 30.0
) -> list[Any]:
    """[function(world, *args) on rank 0, on rank 1, ...]. `function` stands at the top level of a test file.

    patience_s: how long their collectives wait.
    A rank that raises or dies ends all of them, with a RuntimeError that holds its trace.
    """
    path, name = sys.modules[function.__module__].__file__, function.__qualname__
    assert path is not None
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(num_ranks)]
    processes = [
        CONTEXT.Process(
            target=_rank, args=(pipes[rank][1], path, name, args, rank, num_ranks, port, patience_s), daemon=True
        )
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    for _, writer in pipes:
        writer.close()
    try:
        return _collect([reader for reader, _ in pipes], time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _collect(readers: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(readers):
        waiting = [reader for rank, reader in enumerate(readers) if rank not in results]
        ready = multiprocessing.connection.wait(waiting, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError(f"{len(waiting)} of {len(readers)} ranks are still running")
        for reader in ready:
            rank = readers.index(reader)  # type: ignore[arg-type]
            try:
                done, value = reader.recv()  # type: ignore[union-attr]
            except EOFError as error:
                raise RuntimeError(f"rank {rank} died") from error
            if not done:
                raise RuntimeError(f"rank {rank} failed:\n{value}")
            results[rank] = value
    return [results[rank] for rank in range(len(readers))]


def _rank(
    pipe: Connection,
    path: str,
    name: str,
    args: tuple[Any, ...],
    rank: int,
    num_ranks: int,
    port: int,
    patience_s: float,
) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(num_ranks),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1",
    )  # fmt: skip
    try:
        from dp4tl_dist.world import joined

        # Test files are not importable by name; the path finds them.
        spec = importlib.util.spec_from_file_location(f"rank_{Path(path).stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        with joined("cpu", timeout_s=patience_s) as world:
            value = getattr(module, name)(world, *args)
        pipe.send((True, value))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
