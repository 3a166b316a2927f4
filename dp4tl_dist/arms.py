"""From an arm's name to the stages that choose its samples."""

from pathlib import Path
from typing import TYPE_CHECKING

from dp4tl_dist.run_config import ARM
from dp4tl_dist.stage import Stage

if TYPE_CHECKING:
    from dp4tl_dist.stages import Graph


def select(graph: "Graph", arm: str, target: str, seed: int) -> tuple[Path | None, tuple[str, ...]]:
    """The subset of an arm (None for dense) and the stages it took."""
    found = ARM.fullmatch(arm)
    if not found:
        return None, ()
    method, keep = found["method"], found["keep"]
    random = method.startswith("random")
    name = f"prune-{arm}-s{seed}" if random else f"prune-{arm}-{target}"
    selection: list[str] = []
    argv = ["prune", "--source", str(graph.source), "--keep", keep]
    inputs = [graph.source]
    if random:
        argv += ["--random", "samples" if method == "random-samples" else "classes", "--seed", str(seed)]
    else:
        votes = _vote(graph, method.removesuffix("-reverse"), target)
        selection += ["surrogate", votes.stem]
        argv += ["--votes", str(votes), *(["--reverse"] if method.endswith("-reverse") else [])]
        inputs.append(votes)
    output = graph.out / "subsets" / f"{name.removeprefix('prune-')}.npz"
    also: tuple[Path, ...] = ()
    if graph.source_val:
        argv += ["--apply-to", str(graph.source_val)]
        inputs.append(graph.source_val)
        also = (output.with_suffix(".val.npz"),)
    graph.add(Stage(name, (*argv, "--out", str(output)), tuple(inputs), output, also=also))
    return output, (*selection, name)


def _vote(graph: "Graph", method: str, target: str) -> Path:
    seed = graph.config.seeds[0]
    surrogate = graph.train("surrogate", graph.config.surrogate, graph.source, graph.source_val, None, None, seed)
    output = graph.out / "votes" / f"vote-{method}-{target}.npz"
    train = graph.targets[target][0]
    argv = ["vote", "--method", method, "--surrogate", str(surrogate), "--target", str(train), "--out", str(output)]
    inputs = [surrogate, train]
    if method == "fm":
        argv += ["--source", str(graph.source)]
        inputs.append(graph.source)
    graph.add(Stage(output.stem, tuple(argv), tuple(inputs), output, distributed=True))
    return output
