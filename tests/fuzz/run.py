"""Mutated files for every reader: `python tests/fuzz/run.py --cases 20000 --out FILE.json` makes the recorded run.

A case is a function of (reader, seed, number): `--reader NAME --first NUMBER --cases 1 --keep DIR` runs one again and
leaves its files in DIR.
"""

import argparse
import datetime
import json
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "benchmarks")]

SLOWER = {"report": 10}
"""Readers that are given so many times fewer cases: one reads a whole folder, and some draw a page."""
COLUMNS = ("cases", "read", "refused", "crashes", "hangs", "other", "seconds")
NAMES = ("beton", "votes", "subset", "scores", "clusters", "losses", "rows", "checkpoint", "train-config", "run-config",
         "transfer-config", "resume", "report", "record", "list", "metrics", "info")  # fmt: skip


def main() -> int:
    args = parse()
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        if args.one:
            print(json.dumps(one(args, Path(folder))))
            return 0
        print(f"{'reader':<14}" + "".join(f"{name:>10}" for name in COLUMNS), flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            results = list(pool.map(lambda name: start(args, name), args.reader or NAMES))
    if args.out:
        args.out.write_text(json.dumps(record(args, results), indent=2) + "\n")
    return int(any(result["crashes"] or result["hangs"] or result["other"] for result in results))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="for each reader (default: 20000)")
    parser.add_argument("--reader", action="append", choices=NAMES, help="may be repeated (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time")
    parser.add_argument("--first", type=int, default=0, help="number of the first case (default: 0)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the files of the first case in DIR")
    parser.add_argument("--out", type=Path, help="a JSON file for the record")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def start(args: argparse.Namespace, name: str) -> dict[str, object]:
    """One reader in a process of its own, which forks: it must not have threads."""
    options = [
        "--cases",
        str(max(1, args.cases // SLOWER.get(name, 1))),
        "--seed",
        str(args.seed),
        "--first",
        str(args.first),
    ]
    options += ["--keep", str(args.keep)] if args.keep else []
    command = [sys.executable, __file__, "--one", "--reader", name, *options]
    result: dict[str, object] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    print(f"{name:<14}" + "".join(f"{result[column]!s:>10}" for column in COLUMNS), flush=True)
    for finding in result["findings"]:  # type: ignore[attr-defined]
        print("   ", json.dumps(finding), flush=True)
    return result


def one(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    import torch
    from fuzz_engine import case, fuzz, write_files
    from fuzz_readers import READERS

    torch.set_num_threads(1)
    reader = READERS[args.reader[0]]
    if args.keep:
        write_files(args.keep, case(reader, reader.seeds(folder), args.seed, args.first))
    return asdict(fuzz(reader, cases=args.cases, seed=args.seed, folder=folder, first=args.first))


def record(args: argparse.Namespace, results: list[dict[str, object]]) -> dict[str, object]:
    import harness

    return {
        "name": "fuzz",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "tests/fuzz/run.py", *sys.argv[1:]]),
        "seed": args.seed,
        "machine": harness.machine(),
        "versions": harness.versions(),
        "git": harness.git(),
        "readers": results,
    }


if __name__ == "__main__":
    sys.exit(main())
