"""launch/submit.py where there is no SLURM: the texts that it would submit, its refusals, and the same jobs locally."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from dp4tl_dist.stage_job import ended, may_go_on

ODD = """it's "odd" ü $HOME `x` & more"""
CONFIG = """
arms = ["dense", "random@0.5"]
seeds = [0, 1]
nproc = 2
[source]
train = "synthetic:source/train"
[targets.objects]
train = "synthetic:target/train"
test = "synthetic:target/test"
[slurm]
nodes = 2
gpus = 4
cpus = 6
memory = "48G"
time = "1-00:00:00"
partition = "main"
account = "lab"
constraint = "a100|h100"
extras = {exclusive = true, "mail-type" = "FAIL"}
[slurm.stages.write]
time = "30"
partition = "cpu"
[slurm.stages."pretrain-dense*"]
nodes = 8
qos = "long"
max_restarts = 3
stop_before_s = 300
"""


def submit(folder: Path, *argv: object, root: Path, **environ: str) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, str(root / "launch" / "submit.py"), *(str(item) for item in argv)]
    return subprocess.run(line, capture_output=True, text=True, cwd=folder, timeout=280, env={**os.environ, **environ})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


def texts(output: str) -> dict[str, str]:
    """The sbatch text of each stage."""
    parts = re.split(r"^==== (\S+).*\n", output, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def options(text: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in text.splitlines() if line.startswith("#SBATCH")]
    return {name: shlex.split(value)[0] if value else "" for name, _, value in (line.partition("=") for line in lines)}


def test_the_texts_ask_for_what_the_config_says(config: Path, tmp_path: Path, root: Path) -> None:
    done = submit(tmp_path, "--config", config, "--out", "run", "--dry-run", root=root, PATH="/usr/bin:/bin")
    assert done.returncode == 0, done.stderr
    found = texts(done.stdout)
    assert list(found)[-1] == "report" and len(found) == 14
    dense, other, write = (options(found[f"{name}"]) for name in
                           ("pretrain-dense-s1", "pretrain-random@0.5-s0", "write-source-train"))  # fmt: skip
    assert dense == {
        "job-name": "pretrain-dense-s1", "nodes": "8", "ntasks-per-node": "4", "gpus-per-node": "4",
        "cpus-per-task": "6", "mem": "48G", "time": "1440", "partition": "main", "account": "lab", "qos": "long",
        "constraint": "a100|h100", "exclusive": "", "mail-type": "FAIL", "requeue": "", "signal": "USR2@300",
        "open-mode": "append", "kill-on-invalid-dep": "yes", "wckey": "dp4tl",
        "dependency": "afterok:write-source-train",
        "output": str(tmp_path / "run/jobs/%j_0_log.out"),
    }  # fmt: skip
    assert (other["nodes"], other["signal"], "qos" in other) == ("2", "USR2@120", False)
    assert other["dependency"] == "afterok:write-source-train:prune-random@0.5-s0"
    assert [write.get(name) for name in ("nodes", "ntasks-per-node", "gpus-per-node", "time", "partition")] == [
        "1", "1", None, "30", "cpu",
    ]  # fmt: skip
    assert "dependency" not in write
    assert "--kill-on-bad-exit=1" in found["pretrain-dense-s1"]
    assert "--max-restarts 3" in found["pretrain-dense-s1"] and "--max-restarts 20" in found["write-source-train"]
    assert not (tmp_path / "run").exists()


def test_the_texts_are_shell_for_any_path(config: Path, tmp_path: Path, root: Path) -> None:
    place = tmp_path / ODD
    place.mkdir()
    done = submit(place, "--config", config, "--out", "run", "--dry-run", root=root)
    assert done.returncode == 0, done.stderr
    for name, text in texts(done.stdout).items():
        assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
        assert options(text)["output"] == f"{place}/run/jobs/%j_0_log.out"
        if name != "report":
            (call,) = [line.partition(" || ")[0] for line in text.splitlines() if " begin " in line]
            words = shlex.split(call)
            assert words[words.index("--out") + 1] == f"{place}/run" and words[words.index("--stage") + 1] == name
    refused = submit(tmp_path, "--config", config, "--out", "100%", "--dry-run", root=root)
    assert refused.returncode == 2 and "choose another --out" in refused.stderr


def test_no_more_run_at_once_than_asked(config: Path, tmp_path: Path, root: Path) -> None:
    done = submit(tmp_path, "--config", config, "--out", "run", "--dry-run", "--max-parallel", 2, root=root)
    kinds = re.compile("afterok|afterany")
    after = {name: re.findall(r"[^:,]+", kinds.sub("", options(text).get("dependency", "")))
             for name, text in texts(done.stdout).items()}  # fmt: skip
    before: dict[str, set[str]] = {}
    for name, direct in after.items():  # jobs are listed after what they wait for
        before[name] = set(direct).union(*(before[other] for other in direct))
    names = list(before)
    free = lambda a, b: a not in before[b] and b not in before[a]  # noqa: E731
    trios = [(a, b, c) for i, a in enumerate(names) for j, b in enumerate(names[:i]) for c in names[:j]]
    assert not [trio for trio in trios if free(trio[0], trio[1]) and free(trio[0], trio[2]) and free(trio[1], trio[2])]
    assert any(free(a, b) for a in names for b in names if a != b)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (("--config", "run.toml"), "there is no sbatch here"),
        (("--config", "missing.toml"), "cannot read the config"),
        ((), "--config is missing"),
        (("--config", "run.toml", "--set", "slurm.time='10:00'"), "slurm.time: not a time limit"),
        (("--config", "run.toml", "--set", "slurm.gpu=4"), "unknown key 'slurm.gpu'"),
    ],
)
def test_refusals_are_one_line(config: Path, tmp_path: Path, root: Path, argv: tuple[str, ...], expected: str) -> None:
    done = submit(tmp_path, *argv, "--out", "run", root=root, PATH="/nowhere")
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2 and line.startswith("submit.py: error: ") and expected in line
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_same_jobs_without_slurm(tmp_path: Path, root: Path) -> None:
    config = tmp_path / "run.toml"
    training = "{model.arch = 'resnet_tiny', train = {epochs = 1, peak_epoch = 1, batch_size = 256, resolution = 16}}"
    config.write_text(
        "arms = ['random@0.1']\npretrain = " + training + "\n[source]\ntrain = 'synthetic:source/train'\n"
        "[targets.objects]\ntrain = 'synthetic:target/train'\ntest = 'synthetic:target/test'\n"
        "[transfer]\ncached = true\n"
        "[transfer.lp]\nepochs = 1\nbatch_size = 64\nresolution = 16\nval_resolution = 16\n[engine]\ndevice = 'cpu'\n"
        "[log]\ntensorboard = false\n"
    )
    argv = ("--config", config, "--out", "run", "--cluster", "local", "--max-parallel", 3)
    changes = [part for key in ("lr=1e30", "peak_epoch=0", "epochs=4") for part in ("--set", f"pretrain.train.{key}")]
    failing = submit(tmp_path, *argv, *changes, root=root)
    assert failing.returncode == 1
    told = [line for line in failing.stdout.splitlines() if "failed" in line or "not run" in line]
    assert told[0].startswith("pretrain-random@0.1-s0 failed: ") and "the loss became" in told[0]
    assert "not run: transfer-lp-random@0.1-objects-s0" in told[1]
    done = submit(tmp_path, *argv, root=root)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "write-source-train" not in done.stdout  # done the first time
    assert json.loads((tmp_path / "run/results.json").read_text())[0]["arm"] == "random@0.1"
    again = subprocess.run(
        [sys.executable, "-m", "dp4tl_dist", "run", "--config", config, "--out", "run"],
        cwd=tmp_path, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert again.returncode == 0 and again.stdout.count("done before, skipped") == 6


@pytest.mark.parametrize(
    ("code", "error", "ends", "again"),
    [
        (0, {}, 0, False),
        (75, {"code": 75}, 75, True),
        (143, {"code": 75}, 75, True),  # srun ended the second rank when the first had saved
        (143, {"code": 2, "lost": False}, 2, False),  # ... when the first had failed
        (140, {}, 75, True),  # the stop signal met Python on its way up
        (137, {}, 137, True),
        (1, {"code": 1, "lost": True}, 1, True),
        (1, {"code": 1, "lost": False}, 1, False),
        (127, {}, 127, False),
    ],
)
def test_which_jobs_go_back_to_the_queue(code: int, error: dict[str, object], ends: int, again: bool) -> None:
    assert ended(code, error) == ends
    assert may_go_on(ends, error) == again
