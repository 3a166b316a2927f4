"""The command `dp4tl`: one verb a stage. Here is how it ends; the `verbs_*` modules have what it takes."""

import argparse
import errno
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from types import FrameType

from dp4tl_dist import __version__, streams, verbs_data, verbs_select, verbs_study, verbs_train
from dp4tl_dist.arguments import Parser
from dp4tl_dist.children import die_with_parent
from dp4tl_dist.errors import (
    EXIT_BAD_INPUT,
    EXIT_DONE,
    EXIT_FAILURE,
    EXIT_STOPPED,
    LostRank,
    Stopped,
    UserError,
    one_line,
)
from dp4tl_dist.launcher import report_error
from dp4tl_dist.log import warn
from dp4tl_dist.siblings import end_hung, stopped_ranks
from dp4tl_dist.world import leave, lost_others

# What is wrong with a path that was given, whoever met it first.
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit code: 0 done, 2 bad input, 75 stopped and saved, 1 a failure of its own."""
    listens = threading.current_thread() is threading.main_thread()
    # A rank among others may be waiting for them in a call that no handler reaches: SIGTERM is to end it at once.
    alone = all(os.environ.get(name, "1") == "1" for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    numbers = [signal.SIGUSR2, *([signal.SIGTERM] if alone else [])]
    before = {number: signal.signal(number, stop_at_once) for number in numbers} if listens else {}
    try:
        return carry_out(argv)
    finally:
        # Of a process of its own, how it ends is decided: nothing is left that could be stopped.
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if argv is None else handler)
        leave()


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """What a cluster's stop signal means to a verb, or a moment, without a step to finish: its outputs are whole or not
    there. Training listens for itself."""
    raise Stopped("stopped with nothing half-written: run it again")


def carry_out(argv: Sequence[str] | None) -> int:
    """Run one verb, and tell how it ended."""
    # Threads that spin while they wait slow each other down many times over where cores are shared. Read by OpenMP when
    # torch loads it, which no import above does.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        streams.keep()
        if "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent()  # torchrun starts ranks that would outlive it
        args = build_parser().parse_args(argv)
        args.run(args)
        check_output_was_seen(args)
    except UserError as error:
        return fail(EXIT_BAD_INPUT, str(error))
    except Stopped as stop:
        return fail(EXIT_STOPPED, str(stop), kind="stopped")
    except (RuntimeError, FloatingPointError, OSError, MemoryError) as error:
        if lost_others(error):
            time.sleep(1)  # the rank that is the cause speaks first
            line = str(error).strip().splitlines()[0]
            if hung := ", ".join(map(str, stopped_ranks())):
                text = f"rank {hung} is stopped (SIGSTOP, or a debugger) and did not answer ({line})"
                return fail(EXIT_FAILURE, text, lost=True)
            text = f"another rank ended, or does not answer any more ({line})"
            return fail(EXIT_FAILURE, text, consequence=True, lost=True)
        if isinstance(error, LostRank):
            return fail(EXIT_FAILURE, str(error), lost=True)
        if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE:
            short = UserError(f"cannot use {os.fsdecode(error.filename)} ({error.strerror})")
            return fail(EXIT_BAD_INPUT, str(short))
        return fail(EXIT_FAILURE, out_of_memory(error) or f"{error or type(error).__name__}")
    except Exception as error:  # a defect: show where, and still tell whoever started this rank
        traceback.print_exc()
        return fail(EXIT_FAILURE, f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        return fail(130, "interrupted", kind="stopped")
    return EXIT_DONE


def check_output_was_seen(args: argparse.Namespace) -> None:
    """What a verb prints may be all that it makes; beside a file it is a courtesy, and its loss is told once."""
    if reason := streams.lost_output():
        if getattr(args, "out", None) is None or getattr(args, "dry_run", False):
            raise UserError(f"stdout could not be written ({reason}): send it elsewhere")
        warn(f"stdout could not be written ({reason}): what it was told is lost, and all else is done")


RELIEF = (
    "raise train.accumulate or set engine.activation_checkpointing, which leave the recipe as it is, "
    "or lower train.batch_size or data.num_workers"
)


def out_of_memory(error: BaseException) -> str:
    """What to tell where memory was the reason, the host's or the GPU's; empty where it was not."""
    text = str(error).strip().partition("\n")[0]
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return f"out of memory ({text or type(error).__name__}): {RELIEF}"
    return ""


def fail(code: int, message: str, *, kind: str = "error", consequence: bool = False, lost: bool = False) -> int:
    """Print one line, leave it for whoever started this rank, and return the code."""
    message = one_line(message)
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    report_error(code, message, rank=rank, consequence=consequence, lost=lost)
    # Bad input is bad on every rank alike, and a stop is agreed: one line is enough.
    if rank != "0" and code == EXIT_BAD_INPUT:
        time.sleep(1)  # the first rank to end has the others ended: let rank 0 speak
    if rank == "0" or code == EXIT_FAILURE:
        where = f"dp4tl [rank {rank}]" if rank != "0" else "dp4tl"
        print(f"{where}: {kind}: {message}", file=sys.stderr, flush=True)
    if code == EXIT_FAILURE:
        end_hung()
    return code


VERBS = (
    verbs_data.write, verbs_data.info, verbs_train.train, verbs_select.cluster, verbs_select.vote, verbs_select.score,
    verbs_select.prune, verbs_data.compact, verbs_train.transfer, verbs_train.run, verbs_train.report,
    verbs_study.advise, verbs_study.sweep, verbs_study.influence, verbs_data.doctor,
)  # fmt: skip


def build_parser() -> Parser:
    parser = Parser(
        prog="dp4tl", description="Prune a source dataset for a target, pretrain on what is left, and measure it."
    )
    parser.add_argument("--version", action="version", version=f"dp4tl {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for add in VERBS:
        add(verbs)
    return parser
