"""Arms by name: what each one runs, what is shared between targets and seeds, and which names are refused."""

import math
from pathlib import Path
from typing import Any

import pytest

from dp4tl_dist.arm_name import METHODS, RANDOM, SCORES, fault, parse_arm
from dp4tl_dist.cli import build_parser
from dp4tl_dist.config import validate
from dp4tl_dist.data.losses import NAME
from dp4tl_dist.errors import UserError
from dp4tl_dist.influence_config import InfluenceConfig
from dp4tl_dist.prune.choice import parse_within
from dp4tl_dist.prune.score import METHODS as SCORE_METHODS
from dp4tl_dist.report.canvas import COLOURS, C
from dp4tl_dist.report.charts import MARKERS
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph

OUT = Path("runs/x")


def graph_of(*arms: str, **content: Any) -> Graph:
    whole = {
        "source": {"train": "s.beton", "val": "v.beton"},
        "targets": {"pets": {"train": "p.beton", "test": "q.beton"}, "dtd": {"train": "d.beton", "test": "e.beton"}},
        "arms": arms,
        "seeds": [3, 4],
    }
    return Graph(validate(RunConfig, whole | content, source="test"), OUT)


def option(argv: tuple[str, ...], name: str) -> list[str]:
    """What follows `--name` up to the next option."""
    if name not in argv:
        return []
    rest = argv[argv.index(name) + 1 :]
    return list(rest[: next((i for i, part in enumerate(rest) if part.startswith("--")), len(rest))])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_makes_commands_that_parse(method: str) -> None:
    graph = graph_of(f"{method}@0.5")
    parser = build_parser()
    for stage in graph.stages.values():
        parser.parse_args(stage.argv)
    made = {path for stage in graph.stages.values() for path in (stage.output, *stage.also)}
    read = {path for stage in graph.stages.values() for path in stage.inputs if path.is_relative_to(OUT)}
    assert read <= made
    assert len(graph.trials) == 4 and all(trial.subset in made for trial in graph.trials)


def test_tables_agree() -> None:
    assert tuple(SCORE_METHODS) == SCORES
    score = build_parser()._subparsers._group_actions[0].choices["score"]  # type: ignore[union-attr, index, call-overload]
    assert next(action.choices for action in score._actions if action.dest == "method") == SCORES
    for method in METHODS:
        assert C[method] in COLOURS.values() and MARKERS[method]
    assert len(set(COLOURS.values())) == len(COLOURS)
    assert C["lm+moderate:0.5"] == C["lm"] and MARKERS["retrieval-joint"] == MARKERS["retrieval"]


@pytest.mark.parametrize("method", SCORES)
def test_scores_are_made_once(method: str) -> None:
    graph = graph_of(f"{method}@0.5", f"{method}@0.2", f"{method}-reverse@0.5")
    scores = [stage for stage in graph.stages.values() if stage.argv[0] == "score"]
    assert len(scores) == (2 if method == "retrieval" else 1)
    pretrains = [name for name in graph.stages if name.startswith("pretrain")]
    assert len(pretrains) == 3 * 2 * (2 if method == "retrieval" else 1)
    for stage in graph.stages.values():
        if stage.argv[0] == "prune":
            assert Path(option(stage.argv, "--scores")[0]) in [score.output for score in scores]
            assert ("--reverse" in stage.argv) == ("-reverse@" in stage.name)
    trial = graph.trials[0]
    assert trial.selection[0] == "surrogate" and trial.selection[1].startswith(f"score-{method}")


def test_the_surrogate_logs_losses_where_they_are_needed() -> None:
    for arms, logs in ((("lm@0.5", "cld@0.5"), True), (("lm+forgetting@0.5",), True), (("el2n@0.5",), False)):
        stage = graph_of(*arms).stages["surrogate"]
        assert stage.config is not None and stage.config["log"]["sample_losses"] == logs
        assert stage.also == ((OUT / "surrogate" / NAME,) if logs else ())


def test_a_joint_arm_has_one_subset_for_all_targets() -> None:
    targets = {"pets": {"train": "p.beton", "test": "q.beton", "weight": 2}, "dtd": {"train": "d", "test": "e.beton"}}
    graph = graph_of("lm@0.5", "lm-joint@0.5", "retrieval-joint@0.5", "random@0.5", targets=targets, combine="max")
    joint, apart = graph.stages["prune-lm-joint@0.5"], graph.stages["prune-lm@0.5-pets"]
    assert [Path(path).stem for path in option(joint.argv, "--votes")] == ["vote-lm-pets", "vote-lm-dtd"]
    assert option(joint.argv, "--weights") == ["2,1"] and option(joint.argv, "--combine") == ["max"]
    assert len(option(apart.argv, "--votes")) == 1 and "--weights" not in apart.argv
    assert option(graph.stages["score-retrieval-joint"].argv, "--target") == ["p.beton"]
    assert graph.stages["score-retrieval-joint"].argv.count("--target") == 2
    by = {(trial.arm, trial.target, trial.seed): trial for trial in graph.trials}
    for arm in ("lm-joint@0.5", "retrieval-joint@0.5"):
        assert len({by[arm, target, seed].subset for target in targets for seed in (3, 4)}) == 1
        assert by[arm, "pets", 3].pretrain == by[arm, "dtd", 3].pretrain != by[arm, "dtd", 4].pretrain
        assert by[arm, "pets", 3].transfers != by[arm, "dtd", 3].transfers
    assert by["lm@0.5", "pets", 3].pretrain != by["lm@0.5", "dtd", 3].pretrain
    assert "--weights" not in graph_of("lm-joint@0.5").stages["prune-lm-joint@0.5"].argv


@pytest.mark.parametrize(
    ("arm", "keep", "within"),
    [
        ("lm+moderate:0.5@0.2", 0.4, 0.5), ("fm+grand@0.25", 0.5, 0.5), ("random+el2n:0.8@0.4", 0.5, 0.8),
        ("lm-reverse+cld@0.3", math.sqrt(0.3), math.sqrt(0.3)), ("lm+random:1@0.4", 0.4, 1),
        ("lm-joint+herding@1", 1, 1.0),
    ],
)  # fmt: skip
def test_hybrids_keep_what_their_name_says(arm: str, keep: float, within: float) -> None:
    graph = graph_of(arm)
    for stage in graph.stages.values():
        if stage.argv[0] != "prune":
            continue
        (text,) = option(stage.argv, "--within-class")
        found = parse_within(text)
        assert found is not None and found[0] == arm.split("@")[0].split("+")[1].split(":")[0]
        assert float(option(stage.argv, "--keep")[0]) == pytest.approx(keep, rel=1e-5)
        assert found[1] == pytest.approx(within, rel=1e-5)
        assert ("--scores" in stage.argv) == (found[0] != "random") and bool(option(stage.argv, "--seed")) == (
            "random" in arm
        )


def test_whose_a_hybrid_is() -> None:
    count = {arm: len({trial.subset for trial in graph_of(arm).trials}) for arm in (
        "lm+moderate@0.5", "lm+random@0.5", "random+moderate@0.5", "random+retrieval@0.5", "lm-joint+moderate@0.5",
        "lm-joint+retrieval@0.5", "moderate@0.5", "random-balanced@0.5",
    )}  # fmt: skip
    assert list(count.values()) == [2, 4, 2, 4, 1, 1, 1, 2]


def test_a_surrogate_of_its_own() -> None:
    graph = graph_of("grand@0.5+big", "lm+moderate@0.5+big", surrogates={"big": {"model": {"arch": "resnet50"}}})
    assert "surrogate" not in graph.stages and "surrogate-big" in graph.stages
    assert {"score-grand+big", "score-moderate+big", "vote-lm+big-pets"} <= graph.stages.keys()


@pytest.mark.parametrize(
    ("arm", "says"),
    [
        ("el2n", "METHOD@KEEP"), ("el3n@0.5", "METHOD@KEEP"), ("el2n@0", "METHOD@KEEP"), ("el2n-joint@0.5", "METHOD"),
        ("el2n@auto", "auto reads"), ("lm+lm@0.5", "a hybrid is"), ("moderate+grand@0.5", "a hybrid is"),
        ("random-samples+grand@0.5", "a hybrid is"), ("lm+moderate:0@0.5", "share of each class"),
        ("lm+moderate:2@0.5", "share of each class"), ("lm+moderate@auto", "share of each class"),
        ("lm+moderate:0.3@0.5", "raise SHARE"), ("lm+@0.5", "METHOD@KEEP"), ("dense+moderate@0.5", "METHOD@KEEP"),
    ],
)  # fmt: skip
def test_names_that_are_refused(arm: str, says: str) -> None:
    assert says in fault(arm)
    with pytest.raises(UserError, match=says):
        graph_of(arm)


def test_good_names_have_no_fault() -> None:
    for method in METHODS:
        assert fault(f"{method}@.5") == "" and parse_arm(f"{method}@.5") is not None
    assert not any(fault(f"{name}@auto") for name in ("lm", "fm-reverse", "lm-joint", *RANDOM))
    assert fault("lm+moderate:0.5@auto") == ""


def test_brute_force_is_a_choice_of_a_target() -> None:
    content = {"influence": {"masks": 8, "train": {"epochs": 3}, "lp": {"epochs": 5}}, "seeds": [3]}
    graph = graph_of("influence@0.5", "influence-reverse@0.25", "influence@0.5+steps", **content)
    stage = graph.stages["influence-pets"]
    config = validate(InfluenceConfig, stage.config or {}, source="test")
    assert (config.masks, config.train.epochs, config.lp, config.seed) == (8, 3, {"epochs": 5}, 3)
    assert (Path(config.source), Path(config.target)) == (graph.source, graph.targets["pets"][0])
    assert stage.inputs == (graph.source, graph.targets["pets"][0]) and not stage.distributed
    argv = list(graph.stages["prune-influence-reverse@0.25-pets"].argv)
    assert argv[argv.index("--influence") + 1] == str(stage.output) and "--reverse" in argv
    assert not [name for name in graph.stages if name.startswith("surrogate")], "it needs none"
    trial = next(trial for trial in graph.trials if (trial.arm, trial.target) == ("influence@0.5+steps", "pets"))
    assert trial.selection == ("influence-pets", "prune-influence@0.5-pets")
    with pytest.raises(UserError, match="casts none"):
        graph_of("influence@auto")


def test_fm_arms_vote_for_clusters_where_they_are_asked_for() -> None:
    content = {
        "source": {"train": "images/train"}, "clusters": {"count": 50, "seed": 7},
        "targets": {"pets": {"train": "p/train", "test": "p/test"}, "dtd": {"train": "d.beton", "test": "e.beton"}},
        "arms": ["dense", "lm@0.5", "fm@0.25", "fm-reverse@0.5"],
    }  # fmt: skip
    graph = Graph(validate(RunConfig, content, source="test"), OUT)
    made = {name: stage for name, stage in graph.stages.items() if name.startswith(("cluster", "vote", "prune"))}
    assert sorted(made) == ["cluster", *sorted(
        f"{what}-{target}" for target in ("pets", "dtd")
        for what in ("vote-lm", "vote-fm", "prune-lm@0.5", "prune-fm@0.25", "prune-fm-reverse@0.5")
    )]  # fmt: skip
    cluster = made["cluster"]
    argv = " ".join(cluster.argv)
    assert cluster.distributed and "--clusters 50" in argv and "--seed 7" in argv and cluster.output.suffix == ".npz"
    assert cluster.output in made["vote-fm-pets"].inputs and "--source" not in made["vote-fm-pets"].argv
    selections = {trial.arm: trial.selection for trial in graph.trials if trial.target == "pets"}
    assert selections["fm@0.25"] == ("surrogate", "cluster", "vote-fm-pets", "prune-fm@0.25-pets")
    assert "cluster" not in selections["lm@0.5"]
