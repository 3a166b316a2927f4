"""The stage graph is in an order that works and shares what it can; a stage is re-done when, and only when, needed."""

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from dp4tl_dist.config import TrainConfig, validate
from dp4tl_dist.errors import UserError
from dp4tl_dist.recipes import TransferConfig
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.slurm_config import SlurmConfig, minutes
from dp4tl_dist.stages import Graph

OUT = Path("runs/x")
Content = dict[str, Any]


def config_of(**content: Any) -> RunConfig:
    whole: Content = {
        "source": {"train": "images/train", "val": "images/val"},
        "targets": {"pets": {"train": "p/train", "test": "p/test"}, "dtd": {"train": "d.beton", "test": "e.beton"}},
        "arms": ["dense", "lm@0.5", "fm@.25", "lm-reverse@0.5", "random@0.5", "random-samples@0.5"],
        "seeds": [3, 4],
        "transfer": {"modes": ["lp", "ff"], "cached": True, "lp": {"epochs": 7}},
        "pretrain": {"model": {"arch": "resnet50"}, "train": {"lr": 0.25}},
    }
    return validate(RunConfig, whole | content, source="test")


def graph_of(**content: Any) -> Graph:
    return Graph(config_of(**content), OUT)


def refused(**content: Any) -> str:
    with pytest.raises(UserError) as caught:
        graph_of(**content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- the graph


@pytest.mark.parametrize("compact", [False, True])
def test_what_a_stage_reads_is_made_before(compact: bool) -> None:
    graph = graph_of(compact=compact)
    made: set[Path] = set()
    for stage in graph.stages.values():
        for path in stage.inputs:
            assert path in made or not path.is_relative_to(OUT), f"{stage.name} reads {path}"
        for path in (stage.output, *stage.also):
            assert path not in made and path.is_relative_to(OUT)
            made.add(path)
        given = [*stage.argv, *_strings(stage.config or {})]
        assert all(str(path) in given for path in stage.inputs), "a stage is told what it reads"
        mine = {str(path) for path in (*stage.inputs, stage.output, graph.config_path(stage.name))}
        assert {text for text in given if text.startswith(str(OUT))} <= mine, "and reads what it is told"


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return list(chain.from_iterable(_strings(item) for item in value.values()))
    return [value] if isinstance(value, str) else []


def test_names_of_stages() -> None:
    names = list(graph_of(seeds=[3], arms=["dense", "lm@0.5", "random@0.5"]).stages)
    assert names == [
        "write-source-train", "write-source-val", "write-pets-train", "write-pets-test",
        "surrogate", "vote-lm-pets", "prune-lm@0.5-pets", "prune-random@0.5-s3", "vote-lm-dtd", "prune-lm@0.5-dtd",
        "pretrain-dense-s3", "transfer-lp-dense-pets-s3", "transfer-ff-dense-pets-s3",
        "pretrain-lm@0.5-pets-s3", "transfer-lp-lm@0.5-pets-s3", "transfer-ff-lm@0.5-pets-s3",
        "pretrain-random@0.5-s3", "transfer-lp-random@0.5-pets-s3", "transfer-ff-random@0.5-pets-s3",
        "transfer-lp-dense-dtd-s3", "transfer-ff-dense-dtd-s3",
        "pretrain-lm@0.5-dtd-s3", "transfer-lp-lm@0.5-dtd-s3", "transfer-ff-lm@0.5-dtd-s3",
        "transfer-lp-random@0.5-dtd-s3", "transfer-ff-random@0.5-dtd-s3",
    ]  # fmt: skip


def test_what_is_shared_and_what_is_not() -> None:
    graph = graph_of()
    names = set(graph.stages)
    count = {word: sum(name.startswith(word) for name in names) for word in ("surrogate", "vote", "prune", "pretrain")}
    # lm and fm votes for each target (reversing needs no votes of its own); random subsets for each seed.
    assert count["surrogate"] == 1 and count["vote"] == 4
    assert count["prune"] == 3 * 2 + 2 * 2
    # dense and random are trained once a seed, the others once for each target and seed.
    assert count["pretrain"] == 3 * 2 + 3 * 2 * 2
    assert len(graph.trials) == 6 * 2 * 2
    subsets = {(trial.arm, trial.target, trial.seed): trial.subset for trial in graph.trials}
    for arm in ("random@0.5", "random-samples@0.5"):
        assert subsets[arm, "pets", 3] == subsets[arm, "dtd", 3] != subsets[arm, "pets", 4]
    for arm in ("lm@0.5", "fm@0.25", "lm-reverse@0.5"):
        assert subsets[arm, "pets", 3] == subsets[arm, "pets", 4] != subsets[arm, "dtd", 3]
    assert {subsets["dense", target, seed] for target in ("pets", "dtd") for seed in (3, 4)} == {None}


def test_arms_at_auto_of_a_surrogate_and_in_steps() -> None:
    arms = ["dense", "lm@auto", "random@auto", "random-samples@auto", "fm@auto+big", "random@auto+big", "lm@0.5+big",
            "lm@0.5+big+steps", "random@0.5+steps"]  # fmt: skip
    surrogates = {"big": {"model": {"arch": "resnet34"}}}
    graph = graph_of(arms=arms, seeds=[3], surrogates=surrogates, compact=True)
    argv = {name: list(stage.argv) for name, stage in graph.stages.items()}
    assert argv["prune-lm@auto-pets"][3:7] == ["--votes", "runs/x/votes/vote-lm-pets.npz", "--keep", "auto"]
    # A random arm at auto is as large as the arm that votes, on the same target and by the same surrogate.
    likes = {
        f"prune-{arm}-{target}-s3": f"runs/x/subsets/{leader}-{target}.npz"
        for target in ("pets", "dtd")
        for arm, leader in (
            ("random@auto", "lm@auto"), ("random-samples@auto", "lm@auto"), ("random@auto+big", "fm@auto+big")
        )
    }  # fmt: skip
    assert {name: line[line.index("--like") + 1] for name, line in argv.items() if "--like" in line} == likes
    assert graph.stages["prune-random@auto-dtd-s3"].inputs[1] == OUT / "subsets" / "lm@auto-dtd.npz"
    assert "pretrain-random@auto-pets-s3" in argv and "pretrain-random@auto-dtd-s3" in argv
    # Each surrogate is trained once, and its votes have its name; steps change the training alone.
    assert [name for name in argv if name.startswith("surrogate")] == ["surrogate", "surrogate-big"]
    assert (graph.stages["surrogate-big"].config or {})["model"]["arch"] == "resnet34"
    trials = {trial.arm: trial for trial in graph.trials if trial.target == "pets"}
    assert trials["lm@0.5+big"].selection == trials["lm@0.5+big+steps"].selection
    assert trials["lm@0.5+big"].selection[:2] == ("surrogate-big", "vote-lm+big-pets")
    assert trials["lm@0.5+big"].subset == trials["lm@0.5+big+steps"].subset
    assert trials["lm@0.5+big"].pretrain == "pretrain-lm@0.5+big-pets-s3"
    assert trials["lm@0.5+big+steps"].pretrain == "pretrain-lm@0.5+big+steps-pets-s3"
    assert trials["random@auto"].selection == ("prune-random@auto-pets-s3", "compact-random@auto-pets-s3")
    for name, stage in graph.stages.items():
        if stage.argv[0] == "train":
            given = (stage.config or {})["data"]["steps_of"]
            assert given == (str(graph.source) if "+steps" in name else "")
            assert (graph.source in stage.inputs) == ("+steps" in name or "@" not in name)


def test_arms_that_lack_something() -> None:
    assert "another arm at auto" in refused(arms=["lm@0.5", "random@auto"])
    assert "[surrogates] lacks" in refused(arms=["lm@0.5+big"])
    assert "chance needs none" in refused(arms=["random@0.5+big"], surrogates={"big": {}})
    assert "cannot name a surrogate" in refused(surrogates={"steps": {}})
    for arm in ("lm@0.5+a+b", "lm@0.5+steps+steps", "lm@0.5+", "lm@automatic"):
        assert "METHOD@KEEP" in refused(arms=[arm])


def test_selection_counts_what_it_took() -> None:
    taken = {trial.arm: trial.selection for trial in graph_of(seeds=[3], compact=True).trials if trial.target == "pets"}
    assert taken["dense"] == ()
    assert taken["lm@0.5"] == ("surrogate", "vote-lm-pets", "prune-lm@0.5-pets", "compact-lm@0.5-pets")
    assert taken["lm-reverse@0.5"][1:3] == ("vote-lm-pets", "prune-lm-reverse@0.5-pets")
    assert taken["fm@0.25"][1] == "vote-fm-pets"
    assert taken["random@0.5"] == ("prune-random@0.5-s3", "compact-random@0.5-s3")


def test_stages_without_a_use_are_left_out() -> None:
    assert "surrogate" not in graph_of(arms=["dense", "random@0.5"]).stages
    target = {"train": "a.beton", "test": "b.beton"}
    graph = graph_of(source={"train": "s.beton"}, targets={"t": target}, arms=["dense"])
    assert [name.split("-")[0] for name in graph.stages] == ["pretrain", "transfer", "transfer"] * 2
    pretrain = graph.stages["pretrain-dense-s3"].config
    assert pretrain is not None and pretrain["data"]["val"] == pretrain["data"]["val_subset"] == ""


@pytest.mark.parametrize("compact", [False, True])
def test_configs_of_training_stages(compact: bool) -> None:
    graph = graph_of(compact=compact)
    for name, stage in graph.stages.items():
        if stage.argv[0] != "train":
            continue
        config = validate(TrainConfig, stage.config or {}, source=name)
        is_pruned = "@" in name
        assert config.model.arch == ("resnet18" if name == "surrogate" else "resnet50")
        assert config.train.lr == (0.5 if name == "surrogate" else 0.25)
        assert config.seed == (3 if name == "surrogate" else int(name[-1]))
        # Validation samples of the pruned classes go, too; a compact file needs no indices.
        assert bool(config.data.subset) == (is_pruned and not compact)
        assert bool(config.data.val_subset) == is_pruned
        assert (Path(config.data.train) == graph.source) == (not is_pruned or not compact)
        assert stage.distributed


def test_configs_of_transfers() -> None:
    for name, stage in graph_of().stages.items():
        if stage.argv[0] == "transfer":
            config = validate(TransferConfig, stage.config or {}, source=name)
            is_probe = "-lp-" in name
            assert config.cached == is_probe and config.train.epochs == (7 if is_probe else 200)
            assert stage.argv[stage.argv.index("--mode") + 1] == ("lp" if is_probe else "ff")
            assert config.seed == int(name[-1])


@pytest.mark.parametrize(
    "arm", ["lm", "lm@0", "lm@0.0", "lm@1.5", "lm@-1", "lm@nan", "best@0.5", "lm@0.5@2", "", "random@1e-1"]
)
def test_arms_that_are_none(arm: str) -> None:
    assert "METHOD@KEEP" in refused(arms=[arm])


def test_configs_that_cannot_be() -> None:
    assert "are one arm" in refused(arms=["dense", "dense"]) and "at least one arm" in refused(arms=[])
    assert "at least one target" in refused(targets={})
    for name in ("a/b", "", "..", ".x", "a b"):
        assert "cannot name a target" in refused(targets={name: {"train": "a", "test": "b"}})
    # The files of a target "source" would be the source's.
    assert "cannot name a target" in refused(targets={"source": {"train": "a", "test": "b"}})
    assert "seed" in refused(seeds=[]) and "seed" in refused(seeds=[1, 1])
    assert "unknown key 'transfer.lp.epoch'" in refused(transfer={"lp": {"epoch": 3}})


# ---------------------------------------------------------------- what a cluster is asked for


def test_resources_of_stages_are_overridden_by_kind_name_and_pattern() -> None:
    slurm = SlurmConfig.model_validate(
        {"nodes": 2, "gpus": 4, "partition": "main", "extras": {"exclusive": True}, "stages": {
            "pretrain": {"time": "1-00:00:00", "extras": {"mail-type": "FAIL"}},
            "pretrain-dense*": {"nodes": 8},
            "write": {"cpus": 16},
        }}
    )  # fmt: skip
    dense = slurm.resources("pretrain-dense-s0", distributed=True, nproc=3)
    assert (dense.nodes, dense.tasks, dense.gpus, dense.time) == (8, 4, 4, "1-00:00:00")
    assert dense.extras == {"exclusive": True, "mail-type": "FAIL"}
    other = slurm.resources("pretrain-lm@0.5-small-s0", distributed=True, nproc=3)
    assert (other.nodes, other.partition, other.max_restarts) == (2, "main", 20)
    write = slurm.resources("write-source-train", distributed=False, nproc=3)
    assert (write.nodes, write.tasks, write.gpus, write.cpus, write.time) == (1, 1, 0, 16, "4:00:00")
    assert SlurmConfig().resources("vote-lm-small", distributed=True, nproc=3).tasks == 3


@pytest.mark.parametrize(
    ("time", "expected"), [("90", 90), ("0:30:00", 30), ("1-02:03:04", 1564), ("10:00", 0), ("later", 0), ("1:2", 0)]
)
def test_time_limits(time: str, expected: int) -> None:
    assert minutes(time) == expected
