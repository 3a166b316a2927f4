"""`dp4tl run`: carry out the stage graph. A stage is skipped when it is done and nothing it depends on has changed."""

import time
from pathlib import Path
from typing import Any

from dp4tl_dist.errors import UserError
from dp4tl_dist.files import folder_lock, write_json
from dp4tl_dist.launcher import StageProcess
from dp4tl_dist.log import say, warn
from dp4tl_dist.plan import check_plan
from dp4tl_dist.records import (
    check_folder,
    finish,
    finished,
    is_done,
    open_folder,
    plan,
    prepare,
    record_path,
    settle,
    skip,
    stage_key,
)
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph, Stage
from dp4tl_dist.table import collect, write_table


def run(config: RunConfig, *, out: Path, dry_run: bool = False) -> None:
    """Do every stage that is not done yet, in order, and end with the table of results."""
    graph = Graph(config, out)
    check_plan(graph, ranks=lambda stage: config.nproc if stage.distributed else 1)
    if dry_run:
        for stage, why in plan(graph):
            say(f"{why:>7}  {stage.name:<32} dp4tl {' '.join(stage.argv)}")
        return
    with folder_lock(out):
        check_folder(graph)
        open_folder(graph)
        stages = list(graph.stages.values())
        for i, stage in enumerate(stages):
            label = f"[{i + 1:>{len(str(len(stages)))}}/{len(stages)}] {stage.name}"
            record = settle(graph, stage)
            key = stage_key(graph, stage)
            if is_done(stage, finished(record), key):
                skip(graph, stage, record)
                say(f"{label}: done before, skipped")
            else:
                carry_out(graph, stage, record, key, label)
        conclude(graph)


def conclude(graph: Graph) -> None:
    """Write the table of results and the report."""
    write_table(collect(graph), graph.out)
    from dp4tl_dist.report.html import write_report  # drawing takes a second to import: not for --dry-run

    say(f"report: {write_report(graph.out)}")


def carry_out(graph: Graph, stage: Stage, record: dict[str, Any], key: str, label: str) -> None:
    """Run one stage as processes of its own, and record how it went."""
    record = prepare(graph, stage, record, key)
    before, started = float(record["seconds"]), time.monotonic()
    nproc = graph.config.nproc if stage.distributed else 1
    log = graph.out / "logs" / f"{stage.name}.log"
    try:
        StageProcess(stage.working_argv, nproc=nproc, log=log, label=label).run()
    except (UserError, RuntimeError) as error:
        record = {**record, "error": str(error)}  # it still counts as running: the next run goes on with it
        raise
    finally:
        seconds = round(before + time.monotonic() - started, 3)
        try:
            write_json(record_path(graph, stage), {**record, "seconds": seconds})
        except UserError as problem:  # what the stage itself ended with is what matters
            warn(str(problem))
    finish(graph, stage, record, seconds=seconds, nproc=nproc)
