"""One name, one thing: whatever targets and surrogates are called, trials share what is the same, and nothing else."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dp4tl_dist.arm_name import METHODS, RANDOM, SCORES, normalised, parse_arm
from dp4tl_dist.config import validate
from dp4tl_dist.errors import UserError
from dp4tl_dist.run_config import TAKEN, RunConfig
from dp4tl_dist.stage import Stage, Trial
from dp4tl_dist.stages import Graph
from dp4tl_dist.sweep import Axes, arms_of

OUT = Path("runs/x")
PARTS = ["pets", "long", "r18", "s3", "s4", "dense", "lm", "fm", "joint", "random", "auto", "0.5", "train", "test",
         "val", "steps", "source", "surrogate", "npz", "json", "run", "vote", "pretrain", "_", "a"]  # fmt: skip
NAMES = st.lists(st.sampled_from(PARTS), min_size=1, max_size=4).flatmap(
    lambda parts: st.lists(st.sampled_from(["-", ".", "", "_", "--"]), min_size=len(parts), max_size=len(parts)).map(
        lambda joints: "".join(a + b for a, b in zip(parts, joints, strict=True)).rstrip("-")
    )
)
SHARES = st.sampled_from(["0.5", ".5", "0.50", "0.25", ".250", "1", "1.0", "0.3"])
Content = dict[str, Any]


@st.composite
def runs(draw: st.DrawFn) -> tuple[Content, Content]:
    """The same run twice: with odd names, and with names that cannot be taken for one another."""
    targets = draw(st.lists(NAMES, min_size=1, max_size=3, unique=True).filter(lambda names: not set(names) & {*TAKEN}))
    surrogates = draw(st.lists(NAMES.filter(lambda name: name != "steps"), max_size=2, unique=True))
    arms = ["dense"]
    for _ in range(draw(st.integers(1, 5))):
        method, within = draw(st.sampled_from(METHODS)), ""
        if method in ("lm", "fm", "random", "lm-joint") and draw(st.booleans()):
            within = f"+{draw(st.sampled_from([*SCORES, 'random']))}"
        auto = not within and (method in RANDOM or method[:2] in ("lm", "fm")) and draw(st.booleans())
        arm = f"{method}{within}@{'auto' if auto else draw(SHARES)}"
        found = parse_arm(arm)
        assert found is not None
        if found.asks_surrogate and surrogates and draw(st.booleans()):
            arm += f"+SURROGATE{draw(st.integers(0, len(surrogates) - 1))}"
        arms.append(arm + draw(st.sampled_from(["", "", "+steps"])))
    content = {
        "source": {"train": "images/train", "val": draw(st.sampled_from(["", "images/val"]))},
        "seeds": draw(st.sampled_from([[3], [3, 4], [0, 3]])),
        "compact": draw(st.booleans()),
        "clusters": {"count": draw(st.sampled_from([0, 5]))},
        "surrogate": {"train": {"epochs": 19}},
        "transfer": {"modes": ["lp", "ff"]},
    }

    def named(targets: list[str], surrogates: list[str]) -> Content:
        whole = [*arms]
        for i, name in enumerate(surrogates):
            whole = [arm.replace(f"SURROGATE{i}", name) for arm in whole]
        return {
            **content, "arms": whole,
            "targets": {name: {"train": f"t{i}/train", "test": f"t{i}/test"} for i, name in enumerate(targets)},
            "surrogates": {name: {"train": {"epochs": 20 + i}} for i, name in enumerate(surrogates)},
        }  # fmt: skip

    return named(targets, surrogates), named([f"T{i}" for i in range(len(targets))], ["Ra", "Rb"][: len(surrogates)])


def graph_of(content: Content) -> Graph:
    return Graph(validate(RunConfig, content, source="test"), OUT)


def meaning(graph: Graph) -> dict[str, str]:
    """Of each stage what it does to what: its command and config, with the meaning of what it reads in place of it."""
    known: dict[str, str] = {}

    def told(value: Any, own: set[str]) -> Any:
        if isinstance(value, dict):
            return {key: told(item, own) for key, item in value.items()}
        return "its own" if value in own else known.get(value, value) if isinstance(value, str) else value

    found = {}
    for name, stage in graph.stages.items():
        own = {str(stage.output), str(graph.config_path(name))}
        found[name] = json.dumps([[told(part, own) for part in stage.argv], told(stage.config, own)])
        known |= {str(path): f"{i} of {found[name]}" for i, path in enumerate((stage.output, *stage.also))}
    return found


def stages_of(trial: Trial) -> list[str]:
    return [*trial.selection, trial.pretrain, *trial.transfers.values()]


@settings(max_examples=150, deadline=None)
@given(runs())
def test_trials_share_what_is_the_same_and_nothing_else(run: tuple[Content, Content]) -> None:
    try:
        plain = graph_of(run[1])
    except UserError:  # arms that lack something, or are one
        assume(False)
    try:
        odd = graph_of(run[0])
    except UserError as error:
        assert "would both make" in str(error)  # X.val.npz of a target X, and X.npz of a target X.val
        assert any(other == f"{name}.val" for name in run[0]["targets"] for other in run[0]["targets"])
        return
    # Whatever the names are, the same trials share the same stages.
    pairs = list(zip(odd.trials, plain.trials, strict=True))
    assert len(odd.stages) == len(plain.stages)
    same = {(a, b) for one, other in pairs for a, b in zip(stages_of(one), stages_of(other), strict=True)}
    assert len(same) == len({a for a, _ in same}) == len({b for _, b in same})
    # Two stages of two names do two different things, and each file has one maker.
    for graph in (odd, plain):
        assert len(set(meaning(graph).values())) == len(graph.stages)
        files = [path for stage in graph.stages.values() for path in (stage.output, *stage.also)]
        assert len(set(files)) == len(files)
        assert all("/" not in name and len(name) < 200 for name in graph.stages)
    for trial in odd.trials:
        assert (OUT / "configs" / f"{trial.pretrain}.json") == odd.config_path(trial.pretrain)


def test_names_that_met_once() -> None:
    targets = {name: {"train": f"{name}.beton", "test": f"{name}-test.beton"} for name in ("pets", "long-pets")}
    graph = graph_of({"source": {"train": "s.beton"}, "targets": targets, "arms": ["lm@0.5+r18", "lm@0.5+r18-long"],
                      "surrogates": {"r18": {}, "r18-long": {"train": {"epochs": 90}}}})  # fmt: skip
    assert len({trial.pretrain for trial in graph.trials}) == 4
    assert "prune-lm@0.5+r18-long-pets" in graph.stages and "prune-lm@0.5+r18~long-pets" in graph.stages
    assert graph.stages["surrogate-r18~long"].config != graph.stages["surrogate-r18"].config
    with pytest.raises(UserError, match="'joint' cannot name a target"):
        graph_of({"source": {"train": "s.beton"}, "targets": {"joint": {"train": "a", "test": "b"}}})


def test_a_graph_takes_one_content_a_name_and_one_maker_a_file() -> None:
    graph = graph_of({"source": {"train": "s.beton"}, "targets": {"t": {"train": "a.beton", "test": "b.beton"}}})
    first = Stage("x", ("write",), (Path("a"),), OUT / "a.beton")
    assert graph.add(first) == graph.add(first) == first.output
    others = [Stage("x", ("prune",), first.inputs, first.output), Stage("x", first.argv, (), first.output),
              Stage("x", first.argv, first.inputs, OUT / "b.beton"),
              Stage("x", first.argv, first.inputs, first.output, config={"seed": 1})]  # fmt: skip
    for other in others:
        with pytest.raises(UserError, match="two different stages are called x"):
            graph.add(other)
    with pytest.raises(UserError, match="x and y would both make"):
        graph.add(Stage("y", ("write",), (), OUT / "c.beton", also=(first.output,)))
    with pytest.raises(UserError, match="too long"):
        graph.add(Stage("y" * 300, ("write",), (), OUT / "d.beton"))


SPELLINGS = [
    ("lm@0.5", "lm@.5", "lm@0.50", "lm@.500"), ("random@1", "random@1.0", "random@1."),
    ("lm+moderate:0.5@0.3", "lm+moderate:.50@.30"), ("fm@0.5+big+steps", "fm@.5+steps+big"),
]  # fmt: skip


@pytest.mark.parametrize("names", SPELLINGS, ids=lambda names: names[0])
def test_an_arm_has_one_spelling(names: tuple[str, ...]) -> None:
    assert {normalised(name) for name in names} == {names[0]}
    base = {"source": {"train": "s.beton"}, "targets": {"t": {"train": "a.beton", "test": "b.beton"}},
            "surrogates": {"big": {}}}  # fmt: skip
    graphs = [graph_of({**base, "arms": [name]}) for name in names]
    assert all(graph.stages == graphs[0].stages and graph.trials == graphs[0].trials for graph in graphs)
    for one, other in combinations(names, 2):
        with pytest.raises(UserError, match="are one arm"):
            graph_of({**base, "arms": [one, other]})


def test_a_share_that_is_the_default_makes_no_other_arm() -> None:
    base = {"source": {"train": "s.beton"}, "targets": {"t": {"train": "a.beton", "test": "b.beton"}}}
    with pytest.raises(UserError, match="are one arm"):
        graph_of({**base, "arms": ["lm+moderate@0.25", "lm+moderate:0.5@0.25"]})


def test_who_asks_a_surrogate() -> None:
    base = {"source": {"train": "s.beton"}, "targets": {"t": {"train": "a.beton", "test": "b.beton"}},
            "surrogates": {"big": {}}}  # fmt: skip
    for arm in ("influence@0.5+big", "random@0.5+big", "random+random@0.5+big"):
        with pytest.raises(UserError, match="needs none"):
            graph_of({**base, "arms": [arm]})
    axes = Axes(methods=("random+el2n", "influence", "random", "lm"), dense=False)
    arms = arms_of(axes, ["big"])
    assert arms == ["random+el2n@0.5+big", "influence@0.5", "random@0.5", "lm@0.5+big"]
    assert "score-el2n+big" in graph_of({**base, "arms": arms}).stages
