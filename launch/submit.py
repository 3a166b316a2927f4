#!/usr/bin/env python3
"""A whole run as SLURM jobs: one job a stage, chained by what they need of each other.

    launch/submit.py --config F.toml --out RUN_DIR [--cluster slurm|local] [--dry-run] [--wait] [--max-parallel N]
    launch/submit.py --out RUN_DIR --cancel

The stages and their records are `dp4tl run`'s: what is done is not submitted again, whoever did it. A job is told a
command line, and runs `dp4tl VERB` on each of its ranks; dp4tl_dist.stage_job does what comes before and after.
The only file that knows submitit.
"""
# ruff: noqa: E402  (the project is imported once its own Python is found)

import hashlib
import json
import os
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
try:
    import submitit
    from submitit.slurm.slurm import SlurmExecutor
except ImportError:
    python = ROOT / ".venv" / "bin" / "python"
    if not python.exists() or Path(sys.prefix) == ROOT / ".venv":
        sys.exit("submit.py: error: submitit is not installed here: run ./launch/setup.sh")
    os.execv(python, [str(python), *sys.argv])

from dp4tl_dist import stage_job
from dp4tl_dist.arguments import Parser, add_config
from dp4tl_dist.children import python
from dp4tl_dist.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILURE, UserError
from dp4tl_dist.files import write_json
from dp4tl_dist.jobs import REPORT, SavedJobs, cancel, follow, in_queue, lanes, needs, run_all
from dp4tl_dist.log import say
from dp4tl_dist.pipeline import conclude
from dp4tl_dist.plan import check_plan
from dp4tl_dist.records import open_folder, plan
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.slurm_config import minutes
from dp4tl_dist.stage import Stage
from dp4tl_dist.stages import Graph
from dp4tl_dist.sweep import read_run
from dp4tl_dist.version import PACKAGE, code_digest


class Executor(SlurmExecutor):  # type: ignore[misc]
    """submitit's, whose text can be made where there is no SLURM."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def text(self) -> str:
        """What would be given to sbatch."""
        return str(self._make_submission_file_text(self._submitit_command_str, "dry-run"))


@dataclass(frozen=True)
class Submission:
    """What every job of one submission has in common."""

    graph: Graph
    config: Path
    """The resolved config that the jobs read: theirs alone, as a later submission writes its own."""
    code: str
    """The package's digest at the time of the submission."""
    snapshot: Path | None
    """A copy of the package that the jobs run instead of the checkout."""

    def executor(self, stage: Stage, dependency: str) -> Executor:
        """submitit's executor for one stage's job."""
        given = self.graph.config.slurm.resources(stage.name, distributed=stage.distributed,
                                                  nproc=self.graph.config.nproc)  # fmt: skip
        extras: dict[str, Any] = {"requeue": True, "kill-on-invalid-dep": "yes", **given.extras}
        if given.memory:
            extras["mem"] = given.memory
        named = {
            "partition": given.partition, "account": given.account, "qos": given.qos, "constraint": given.constraint,
            "cpus_per_task": given.cpus, "gpus_per_node": given.gpus or None, "dependency": dependency or None,
        }  # fmt: skip
        executor = Executor(self.graph.out / "jobs")
        executor.update_parameters(
            job_name=stage.name, nodes=given.nodes, ntasks_per_node=given.tasks, time=minutes(str(given.time)),
            signal_delay_s=given.stop_before_s, additional_parameters=extras, wckey="dp4tl",
            srun_args=["--kill-on-bad-exit=1"], stderr_to_stdout=True,
            setup=self._setup(stage, given.stop_before_s or 0), teardown=self._teardown(stage, given.max_restarts or 0),
            **{key: value for key, value in named.items() if value is not None},
        )  # fmt: skip
        return executor

    def _call(self, action: str, stage: Stage) -> str:
        line = python("dp4tl_dist.stage_job", action, "--config", str(self.config), "--out", str(self.graph.out),
                      "--stage", stage.name)  # fmt: skip
        return shlex.join(line)

    def _setup(self, stage: Stage, stop_before_s: int) -> list[str]:
        errors = shlex.quote(str(self.graph.out / "jobs" / "error"))
        lines = [
            f"source {shlex.quote(str(ROOT / 'slurm' / 'env.sh'))}",
            f"export DP4TL_STOP_BEFORE_S={stop_before_s} {stage_job.CODE}={self.code}",
            f'export DP4TL_ERROR_FILE={errors}."$SLURM_JOB_ID.${{SLURM_RESTART_COUNT:-0}}".json',
        ]
        if self.snapshot:
            lines.append(f'export PYTHONPATH={shlex.quote(str(self.snapshot))}"${{PYTHONPATH:+:$PYTHONPATH}}"')
        if stage.name != REPORT:
            done_before = f"exit $((code == {stage_job.EXIT_DONE_BEFORE} ? 0 : code))"
            lines.append(f"{self._call('begin', stage)} || {{ code=$?; {done_before}; }}")
        return lines

    def _teardown(self, stage: Stage, max_restarts: int) -> list[str]:
        if stage.name == REPORT:
            return []
        return ["code=$?", f"{self._call('end', stage)} --code $code --max-restarts {max_restarts}", "exit $?"]


def submit(
    config: RunConfig, out: Path, *, max_parallel: int = 0, snapshot: bool = False, dry_run: bool = False
) -> dict[str, str]:
    """Submit a job for every stage that is neither done nor in the queue, and one for the table and the report.

    max_parallel: how many jobs may run at once; 0 for as many as the cluster gives.
    Returns the job id of each stage that is in the queue, by its name.
    """
    out = out.resolve()
    if not dry_run and not shutil.which("sbatch"):
        raise UserError("there is no sbatch here: log in to a submit node, or use --cluster local (or --dry-run)")
    if set(str(out)) & set("%\\\n"):
        raise UserError(
            f"{out}: SLURM gives '%', '\\' and line ends in a log's path another meaning: choose another --out"
        )
    graph = Graph(config, out)
    check_plan(graph, ranks=lambda stage: config.slurm.ranks(stage, config.nproc), here=False)
    saved, resolved = SavedJobs(out), config.model_dump(mode="json")
    digest = hashlib.blake2b(json.dumps(resolved, sort_keys=True).encode(), digest_size=6).hexdigest()
    waiting = {} if dry_run else in_queue(saved.ids())
    saved.refuse_other(digest, waiting, out)
    todo = [stage for stage, why in plan(graph) if why != "skip"]
    what = Submission(
        graph, out / "configs" / f"run-{digest}.json", code_digest(), copied(out, dry_run) if snapshot else None
    )
    if not dry_run:
        write_json(what.config, resolved)
        open_folder(graph)
        (out / "jobs").mkdir(exist_ok=True)
    last = Stage(REPORT, ("report", str(out)), tuple(stage.output for stage in todo), out / "report.html")
    jobs: dict[str, str] = {}
    throttle = lanes([*todo, last], max_parallel)
    for stage in [*todo, last]:
        job = saved.job(stage.name)
        if job in waiting:
            say(f"{stage.name:<32} {job:>8}  in the queue already")
        elif stage is last and not todo and (out / "report.html").exists():
            continue
        else:
            first = [jobs[name] for name in needs(stage, todo)]
            dependency = ",".join(
                ["afterok:" + ":".join(first)] * bool(first)
                + [f"afterany:{jobs[before]}" for before in throttle[stage.name]]
            )
            job = start(what, stage, dependency, dry_run=dry_run)
            if not dry_run:
                saved.add(stage.name, job, digest)
        jobs[stage.name] = job
    if not jobs:
        say(f"every stage is done: see {out / 'report.html'}")
    return jobs


def start(what: Submission, stage: Stage, dependency: str, *, dry_run: bool) -> str:
    """Submit one stage's job, or print what would be submitted. Returns the job's id."""
    executor = what.executor(stage, dependency)
    if dry_run:
        say(f"==== {stage.name}" + (f" (after {dependency})" if dependency else "") + f"\n{executor.text()}")
        return stage.name
    if stage.name == REPORT:
        line = ["report", "--config", str(what.config), "--out", str(what.graph.out)]
        job = executor.submit(stage_job.become, "dp4tl_dist.stage_job", line)
    else:
        job = executor.submit(stage_job.become, "dp4tl_dist", stage.working_argv)
    say(f"{stage.name:<32} {job.job_id:>8}  {job.paths.stdout}")
    return str(job.job_id)


def copied(out: Path, dry_run: bool) -> Path:
    """A copy of the package in the run folder, by its digest; made once."""
    place = out / "code" / code_digest()
    if not dry_run and not place.exists():
        shutil.copytree(PACKAGE, place / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def run_here(config: RunConfig, out: Path, *, max_parallel: int, dry_run: bool) -> int:
    """The same jobs on this machine: each a process of submitit's, started when what it needs is done."""
    graph = Graph(config, out)
    check_plan(graph, ranks=lambda stage: config.nproc if stage.distributed else 1)

    def launch(stage: Stage) -> Any:
        executor = submitit.LocalExecutor(out / "jobs")
        executor.update_parameters(timeout_min=minutes(str(config.slurm.time)), stderr_to_stdout=True)
        return executor.submit(stage_job.run_here, str(out / "config.json"), str(out), stage.name)

    if dry_run:
        for stage, why in plan(graph):
            say(f"{why:>7}  {stage.name:<32} after {', '.join(needs(stage, list(graph.stages.values()))) or '-'}")
        return EXIT_DONE
    todo = [stage for stage, why in plan(graph) if why != "skip"]
    open_folder(graph)
    failed = run_all(graph, todo, launch, max_parallel=max_parallel or 1)
    if failed:
        return EXIT_FAILURE
    conclude(graph)
    return EXIT_DONE


def main() -> int:
    parser = Parser(prog="submit.py", description="A whole run as SLURM jobs, one a stage.")
    add_config(parser, required=False)
    parser.add_argument("--out", type=Path, required=True, help="the run folder; all nodes must see it")
    parser.add_argument("--cluster", choices=("slurm", "local"), default="slurm")
    parser.add_argument("--max-parallel", type=int, default=0, help="jobs that may run at once; 0 sets no limit")
    parser.add_argument("--snapshot", action="store_true", help="run a copy of the package as it is now")
    parser.add_argument("--dry-run", action="store_true", help="print every sbatch text and the graph, and do nothing")
    parser.add_argument("--wait", action="store_true", help="follow the jobs to the end; exit code 0 if all are done")
    parser.add_argument("--cancel", action="store_true", help="end what is in the queue")
    try:
        args = parser.parse_args()
        out = args.out.resolve()
        if args.cancel:
            say(f"cancelled: {', '.join(cancel(SavedJobs(out))) or 'nothing was in the queue'}")
            return EXIT_DONE
        name = args.config or (str(out / "config.json") if (out / "config.json").exists() else None)
        if name is None:
            raise UserError("--config is missing: pass the run's config")
        config = read_run(name, args.set)  # a sweep, too: `dp4tl sweep --tables` sums it up
        if args.cluster == "local":
            return run_here(config, out, max_parallel=args.max_parallel, dry_run=args.dry_run)
        submit(config, out, max_parallel=args.max_parallel, snapshot=args.snapshot, dry_run=args.dry_run)
        return follow(Graph(config, out), SavedJobs(out)) if args.wait and not args.dry_run else EXIT_DONE
    except UserError as error:
        print(f"submit.py: error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
