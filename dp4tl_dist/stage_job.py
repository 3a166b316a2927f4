"""What a cluster's job does around a stage: `begin` before its ranks start, `end` after them, on the job's first node.

The batch scripts call it as `python -m dp4tl_dist.stage_job`; launch/submit.py writes such scripts, slurm/*.sbatch are
such scripts. The ranks themselves run `dp4tl VERB`, like everywhere. A job goes back to the queue here and nowhere
else: by one process, once, when its ranks stopped with everything saved or lost one of theirs.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dp4tl_dist.children import die_with_parent, python
from dp4tl_dist.config import load_config
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, EXIT_STOPPED, UserError
from dp4tl_dist.files import read_json, write_json
from dp4tl_dist.jobs import REPORT
from dp4tl_dist.launcher import ERROR_FILE
from dp4tl_dist.log import say, warn
from dp4tl_dist.nodes import life
from dp4tl_dist.pipeline import carry_out, conclude
from dp4tl_dist.records import finish, finished, is_done, prepare, read_record, record_path, settle, skip, stage_key
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph, Stage
from dp4tl_dist.version import code_digest

EXIT_DONE_BEFORE = 3
CODE = "DP4TL_CODE"
MAX_RESTARTS = "DP4TL_MAX_RESTARTS"
# How ranks end that SIGUSR2 or SIGTERM met before they could listen: while Python starts.
STOPPED = (EXIT_STOPPED, 128 + 12, 128 + 15)
CANNOT_START = (126, 127)


def become(module: str, argv: Sequence[str]) -> None:
    """Go on as `python -m MODULE ARGS...`: a rank of a stage is the same process as under any launcher."""
    os.execv(sys.executable, python(module, *argv))


def run_here(config: str, out: str, name: str) -> None:
    """One stage of a run on this machine, with its record: a job where there is no SLURM."""
    die_with_parent()
    graph = Graph(load_config(RunConfig, config), Path(out))
    stage = graph.stages[name]
    try:
        carry_out(graph, stage, settle(graph, stage), stage_key(graph, stage), name)
    except (UserError, RuntimeError) as error:
        write_json(record_path(graph, stage), {**read_record(graph, stage), "status": "failed", "error": str(error)})
        raise


def begin(graph: Graph, stage: Stage) -> int:
    """Make way for the stage and record that it runs; EXIT_DONE_BEFORE where there is nothing to do."""
    submitted, now = os.environ.get(CODE, ""), code_digest()
    if submitted and submitted != now:
        warn(
            f"the code has changed since the submission ({submitted}, now {now}), and this job runs what is there now: "
            "submit again, or with --snapshot"
        )
    record, key = settle(graph, stage), stage_key(graph, stage)
    if is_done(stage, finished(record), key):
        skip(graph, stage, record)
        say(f"{stage.name}: done before, skipped")
        return EXIT_DONE_BEFORE
    record = prepare(graph, stage, record, key)
    write_json(record_path(graph, stage), {**record, "job": life(os.environ), "began": time.time()})
    return EXIT_DONE


def end(graph: Graph, stage: Stage, code: int, *, max_restarts: int) -> int:
    """Record how the stage's ranks ended, put the job back into the queue where it may go on, and return its code."""
    record, own = read_record(graph, stage), life(os.environ)
    if record.get("job") != own:
        warn(f"{stage.name}: job {record.get('job')} goes on with it; {own} was left behind, and ends")
        return EXIT_FAILURE
    seconds = float(record.get("seconds", 0.0)) + time.time() - float(record.get("began", time.time()))
    seconds = round(seconds, 3)
    if code == EXIT_DONE:
        try:
            finish(graph, stage, record, seconds=seconds, nproc=int(os.environ.get("SLURM_NTASKS", "1")))
            return EXIT_DONE
        except RuntimeError as problem:
            write_json(record_path(graph, stage), {**record, "status": "failed", "error": str(problem)})
            return EXIT_FAILURE
    write_json(record_path(graph, stage), {**record, "seconds": seconds})
    error = read_error()
    code = ended(code, error)
    if may_go_on(code, error) and requeue(max_restarts, error):
        return code
    message = str(error.get("message") or f"its ranks ended with exit code {code}")
    status = "running" if code == EXIT_STOPPED else "failed"
    write_json(record_path(graph, stage), {**record, "seconds": seconds, "status": status, "error": message})
    print(
        f"dp4tl: {'stopped' if code == EXIT_STOPPED else 'error'}: {stage.name}: {message}", file=sys.stderr, flush=True
    )
    return code


def read_error() -> dict[str, Any]:
    """What the first failing rank left, {} where none could."""
    path = Path(os.environ.get(ERROR_FILE, ""))
    if not path.is_file():
        return {}
    found = read_json(path)
    path.unlink()
    return found if isinstance(found, dict) else {}


def ended(code: int, error: Mapping[str, Any]) -> int:
    """What the ranks ended with. What the first of them said counts: srun ends the others, and may tell of those."""
    if error:
        return int(error.get("code", EXIT_FAILURE))
    return EXIT_STOPPED if code in STOPPED else code


def may_go_on(code: int, error: Mapping[str, Any]) -> bool:
    """Whether the same job may do better in another life: it was stopped, or it lost a rank that said nothing.

    code: as `ended` tells it.
    """
    if code == EXIT_STOPPED:
        return True
    return code not in (EXIT_DONE, *CANNOT_START) and (not error or bool(error.get("lost")))


def requeue(max_restarts: int, error: Mapping[str, Any]) -> bool:
    """Put this job back into SLURM's queue, unless it has been there too often. True when it is there."""
    if "SLURM_JOB_ID" not in os.environ:
        return False
    job, restarts = os.environ["SLURM_JOB_ID"], int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    why = " ".join(str(error.get("message") or "a rank was lost").split())
    if restarts >= max_restarts:
        warn(f"job {job} is not put back into the queue: max_restarts = {max_restarts} is reached ({why})")
        return False
    if lives_on(job, restarts):
        warn(f"job {job} is in a later life than this one ({restarts} restarts), which was left behind, and ends")
        return False
    say(f"job {job} goes back to the queue (restart {restarts + 1} of at most {max_restarts}): {why}")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        warn(f"scontrol requeue {job} failed: {done.stderr.strip()}")
    return done.returncode == 0


def lives_on(job: str, restarts: int) -> bool:
    """Whether SLURM requeued the job since, as it does when it misses the node that this runs on: the batch script of a
    node that was only cut off would stop its own successor."""
    done = subprocess.run(["scontrol", "show", "job", "--oneliner", job], capture_output=True, text=True)
    found = re.search(r"\bRestarts=(\d+)", done.stdout)
    return found is not None and int(found[1]) != restarts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dp4tl_dist.stage_job", description="What a batch script calls.")
    parser.add_argument("action", choices=("begin", "end", "report", "requeue"))
    parser.add_argument("--code", type=int, default=0, help="what the ranks ended with")
    parser.add_argument("--max-restarts", type=int, default=int(os.environ.get(MAX_RESTARTS, "20")))
    parser.add_argument("--config", help="the run's config")
    parser.add_argument("--out", type=Path, help="the run folder")
    parser.add_argument("--stage", default=REPORT)
    args = parser.parse_args(argv)
    if args.action == "requeue":
        error = read_error()
        code = ended(args.code, error)
        if may_go_on(code, error):
            requeue(args.max_restarts, error)
        return code
    try:
        graph = Graph(load_config(RunConfig, args.config), args.out)
        if args.action == "report":
            conclude(graph)
            return EXIT_DONE
        stage = graph.stages[args.stage]
        return begin(graph, stage) if args.action == "begin" else end(
            graph, stage, args.code, max_restarts=args.max_restarts
        )  # fmt: skip
    except UserError as problem:
        print(f"dp4tl: error: {args.stage}: {problem}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
