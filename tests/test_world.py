"""Who a process is among the ranks, and what ranks can be trusted to find together."""

import os
import subprocess
import sys

import numpy as np
import pytest
from ranks import run_ranks

from dp4tl_dist.errors import UserError
from dp4tl_dist.world import (
    World,
    all_max,
    all_sum,
    barrier,
    detect,
    expand_nodes,
    gather_rows,
    joined,
    on_main,
    place,
    slurm_port,
    threads_asked,
)

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "7",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "123", "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[07-08]",
}  # fmt: skip


# ---------------------------------------------------------------- detection


def test_torchrun() -> None:
    world = detect({**TORCHRUN, **SRUN})  # torchrun started by srun: the inner one counts
    assert world == World(5, 8, 1, 4, launcher="torchrun", master="n1:7")
    assert not world.is_main and detect({**TORCHRUN, "RANK": "0"}).is_main


def test_srun() -> None:
    world = detect(SRUN)
    assert world == World(5, 8, 1, 4, launcher="slurm", master=f"n07:{slurm_port(SRUN)}")
    assert detect({**SRUN, "MASTER_ADDR": "x", "MASTER_PORT": "9"}).master == "x:9"
    array = {"SLURM_ARRAY_JOB_ID": "120", "SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "9"}
    assert detect({**SRUN, **array, "SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "64"}) == world
    one_node = {**SRUN, "SLURM_STEP_NODELIST": "n07"}
    assert detect(one_node) == World(5, 8, 1, 8, launcher="slurm", master=f"127.0.0.1:{slurm_port(SRUN)}")


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"PATH": "/bin"},
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # inside salloc, and no step
        {**SRUN, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # a shell in an allocation of 8 tasks
    ],
)
def test_single_processes(environ: dict[str, str]) -> None:
    assert detect(environ) == World()


# ---------------------------------------------------------------- threads


@pytest.mark.parametrize(
    ("text", "found"), [("", None), ("3", 3), ("2,4", 2), ("0", None), ("-1", None), ("many", None), ("1", 1)]
)
def test_threads_that_were_asked_for(text: str, found: int | None) -> None:
    assert threads_asked({"OMP_NUM_THREADS": text}) == found
    assert threads_asked({"OMP_NUM_THREADS": text, "SLURM_JOB_ID": "1"}) == found
    assert threads_asked({}) is None


def test_the_one_thread_that_torchrun_sets_is_not_asked_for() -> None:
    """torchrun changes its environment once it runs: what it was started with is what somebody asked for."""
    child = "from dp4tl_dist.world import threads_asked; import os; print(threads_asked(os.environ))"
    line = f"OMP_NUM_THREADS=1 TORCHELASTIC_RUN_ID=x {sys.executable} -c '{child}'; true"  # `true`: the shell stays
    plain = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    for given, found in (({}, "None"), ({"OMP_NUM_THREADS": "1"}, "1")):
        done = subprocess.run(["bash", "-c", line], env={**plain, **given}, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == found


def test_ranks_compute_on_the_threads_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        for asked, found in (("3", 3), ("", len(os.sched_getaffinity(0)))):
            monkeypatch.setenv("OMP_NUM_THREADS", asked)
            with joined("cpu"):
                assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("complete", [TORCHRUN, SRUN])
def test_a_partial_environment_names_what_is_missing(complete: dict[str, str]) -> None:
    for name in complete:
        if name in ("SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_STEP_ID"):
            continue  # without these it is no step at all
        partial = {key: value for key, value in complete.items() if key != name}
        with pytest.raises(UserError) as caught:
            detect(partial)
        assert f"{name} missing" in str(caught.value) and "\n" not in str(caught.value)
    for name in ("RANK", "LOCAL_WORLD_SIZE"):
        with pytest.raises(UserError, match=f"{name} is 'x'"):
            detect({**TORCHRUN, name: "x"})
    with pytest.raises(UserError, match="WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT missing"):
        detect({"RANK": "0"})


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("a[1-3,7],b", ["a1", "a2", "a3", "a7", "b"]),
        ("gpu[008-011]", ["gpu008", "gpu009", "gpu010", "gpu011"]),
        ("a[1-2]x[3,5]", ["a1x3", "a1x5", "a2x3", "a2x5"]),
        ("rack-1-node[9-10].domain", ["rack-1-node9.domain", "rack-1-node10.domain"]),
        ("a1,b[2],c[3-3]", ["a1", "b2", "c3"]),
        ("", []),
    ],
)
def test_node_lists(text: str, hosts: list[str]) -> None:
    assert expand_nodes(text) == hosts


def test_a_requeued_job_gets_another_port() -> None:
    def port(job: int, step: int, restarts: int) -> int:
        environ = {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step), "SLURM_RESTART_COUNT": str(restarts)}
        return slurm_port(environ)

    for job in (1, 123, 9_999_999):
        ports = [port(job, 0, restarts) for restarts in range(20)]
        assert len(set(ports)) == 20 and all(20_000 <= item < 40_000 for item in ports)
        assert port(job, 0, 1) not in {port(job + 1, 0, 0), port(job, 1, 0)}
    assert slurm_port({"SLURM_JOB_ID": "5", "SLURM_STEP_ID": "2"}) == port(5, 2, 0)


def test_workers_share_the_cores_of_a_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    assert [World(ranks_per_node=ranks).num_workers() for ranks in (1, 4, 5, 12, 50)] == [12, 3, 2, 1, 1]
    assert World(ranks_per_node=4).num_workers(7) == 7


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert place(World(), "cpu").device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert place(World(), "auto").device == "cpu"
    with pytest.raises(UserError, match="CUDA was asked for"):
        place(World(), "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert place(World(1, 2, 1, 2), "auto").device == "cuda:1"
    with pytest.raises(UserError, match="needs GPU 2, and 2 are visible"):
        place(World(2, 4, 2, 4), "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)  # narrowed by the launcher
    assert place(World(3, 4, 3, 4), "cuda").device == "cuda:0"


# ---------------------------------------------------------------- collectives


def sums(world: World) -> tuple[list[int], list[float], list[int]]:
    """Each rank's part is a function of its rank."""
    barrier(world)
    whole = np.arange(4) * (world.rank + 1) + (1 << 60)
    whole[0] = world.rank
    exact = all_sum(world, whole)
    real = all_sum(world, np.array([[0.5 * world.rank, 1.0]]))
    return exact.tolist(), real.ravel().tolist(), all_max(world, np.array([world.rank, -world.rank])).tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_sums_and_maxima(num_ranks: int) -> None:
    ranks = range(num_ranks)
    whole = [sum(ranks)] + [sum(i * (rank + 1) + (1 << 60) for rank in ranks) for i in (1, 2, 3)]
    expected = (whole, [0.5 * sum(ranks), float(num_ranks)], [num_ranks - 1, 0])
    assert run_ranks(sums, num_ranks) == [expected] * num_ranks


def gathered(world: World, spoil: str) -> str | list[list[float]]:
    """17 rows dealt out unevenly and in disorder; the last rank of several may hold none."""
    rows = np.linspace(-1, 1, 34, dtype=np.float32).reshape(17, 2)
    order = np.random.default_rng(0).permutation(17)
    cuts = {1: [0, 17], 2: [0, 5, 17], 3: [0, 5, 17, 17]}[world.num_ranks]
    mine = order[cuts[world.rank] : cuts[world.rank + 1]]
    if spoil and world.is_main:
        mine = {
            "missing": mine[1:],
            "double": np.append(mine, mine[:1]),
            "outside": mine,
            "twice": np.append(mine[1:], mine[1]),
        }[spoil]
    values = rows[mine]
    if spoil == "outside" and world.is_main:
        mine = np.append(mine[1:], 17)
    try:
        return gather_rows(world, mine, values, 17).tolist()
    except RuntimeError as error:
        return str(error)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_rows_are_gathered_in_place(num_ranks: int) -> None:
    expected = np.linspace(-1, 1, 34, dtype=np.float32).reshape(17, 2).tolist()
    assert run_ranks(gathered, num_ranks, "") == [expected] * num_ranks


@pytest.mark.parametrize("spoil", ["missing", "double", "twice", "outside"])
def test_a_row_missing_or_doubled_is_found_on_every_rank(spoil: str) -> None:
    for num_ranks in (1, 2):
        for message in run_ranks(gathered, num_ranks, spoil):
            told = "1 positions are not among the 17 rows" if spoil == "outside" else "were not written exactly once"
            assert isinstance(message, str) and told in message


def shared(world: World, fails: bool) -> object:
    def action() -> str:
        if fails:
            raise UserError("no room here")
        return "done"

    try:
        return on_main(world, action)
    except UserError as error:
        return f"refused: {error}"


def test_what_the_main_rank_refuses_all_refuse() -> None:
    assert run_ranks(shared, 3, False) == ["done", None, None]
    assert run_ranks(shared, 3, True) == ["refused: no room here"] * 3
    assert shared(World(), True) == "refused: no room here"
