"""Wild configs of whole runs: `python tests/fuzz/plans.py --configs 2000 --out FILE.json` makes the recorded run.

What the plan accepts must not end with exit code 2: every accepted config is carried out here, each stage up to its
first step; of the accepted ones, the first `--whole N` of few stages are also run in full through the command line. A
config is a function of its number: `--first NUMBER --configs 1` draws one again.
"""

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1]), str(HERE.parents[1] / "benchmarks")]

import harness  # noqa: E402
import torch  # noqa: E402
from plan_runs import Draw, first_steps, make_place, told  # noqa: E402

from dp4tl_dist.config import validate  # noqa: E402
from dp4tl_dist.errors import EXIT_BAD_INPUT, UserError  # noqa: E402
from dp4tl_dist.plan import check_plan  # noqa: E402
from dp4tl_dist.run_config import RunConfig  # noqa: E402
from dp4tl_dist.stages import Graph  # noqa: E402

MOST_STAGES = 10
"""Of what is run in full: each stage is a process, or several, and takes seconds to start."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Wild configs: what the plan accepts can be carried out.")
    parser.add_argument("--configs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--whole", type=int, default=0, help="run so many accepted ones through the command line")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts, faults, started = Counter[str](), [], time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        place = make_place(root / "place")
        for number in range(args.first, args.first + args.configs):
            outcome, text = one(number, place, root / str(number), whole=counts["whole"] < args.whole)
            counts.update(outcome)
            if "fault" in outcome:
                faults.append({"number": number, "error": text})
                print(f"{number}: {text}", flush=True)
            shutil.rmtree(root / str(number), ignore_errors=True)
    about = {"name": "plans", "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
             "command": shlex.join(["python", "tests/fuzz/plans.py", *sys.argv[1:]]), "machine": harness.machine(),
             "versions": harness.versions(), "git": harness.git()}  # fmt: skip
    found = {"first": args.first, "configs": args.configs, **counts, "faults": faults,
             "seconds": round(time.monotonic() - started, 1)}  # fmt: skip
    print(json.dumps({key: value for key, value in found.items() if key != "faults"}))
    if args.out:
        args.out.write_text(json.dumps({**about, **found}, indent=2) + "\n")
    return int(bool(faults))


def one(number: int, place: Path, out: Path, *, whole: bool) -> tuple[list[str], str]:
    """What became of a config, and the error if it is a fault."""
    content = Draw(number, place).config()
    try:
        config = validate(RunConfig, content, source="config")
        graph = Graph(config, out)
        check_plan(graph, ranks=lambda stage: config.nproc if stage.distributed else 1)
    except UserError as error:
        return (["refused"] if told(error) and not out.exists() else ["refused", "fault"]), str(error)
    try:
        first_steps(config, out)
    except Exception as error:
        return ["accepted", "fault"], f"{type(error).__name__}: {error}"
    if not whole or len(graph.stages) > MOST_STAGES:
        return ["accepted"], ""
    file, run = out.with_suffix(".json"), out.with_name(f"{out.name}-whole")
    file.write_text(json.dumps(content))
    line = [sys.executable, "-m", "dp4tl_dist", "run", "--config", str(file), "--out", str(run)]
    done = subprocess.run(line, capture_output=True, text=True, cwd=HERE.parents[1])
    shutil.rmtree(run, ignore_errors=True)
    bad = done.returncode == EXIT_BAD_INPUT or "Traceback" in done.stderr
    return ["accepted", "whole", f"exit {done.returncode}", *(["fault"] if bad else [])], done.stderr[-400:]


if __name__ == "__main__":
    sys.exit(main())
