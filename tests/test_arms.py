"""What an arm's name asks for, where it is more than one verb."""

from pathlib import Path

from dp4tl_dist.config import validate
from dp4tl_dist.run_config import RunConfig
from dp4tl_dist.stages import Graph


def test_fm_arms_vote_for_clusters_where_they_are_asked_for() -> None:
    content = {
        "source": {"train": "images/train"}, "clusters": {"count": 50, "seed": 7},
        "targets": {"pets": {"train": "p/train", "test": "p/test"}, "dtd": {"train": "d.beton", "test": "e.beton"}},
        "arms": ["dense", "lm@0.5", "fm@0.25", "fm-reverse@0.5"],
    }  # fmt: skip
    graph = Graph(validate(RunConfig, content, source="test"), Path("runs/x"))
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
