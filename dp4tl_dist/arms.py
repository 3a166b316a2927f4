"""From an arm's name to the stages that choose its samples."""

from pathlib import Path
from typing import TYPE_CHECKING

from dp4tl_dist.run_config import AUTO, ArmName, parse_arm
from dp4tl_dist.stage import Stage

if TYPE_CHECKING:
    from dp4tl_dist.stages import Graph


def select(graph: "Graph", arm: str, target: str, seed: int) -> tuple[Path | None, tuple[str, ...]]:
    """The subset of an arm (None for dense) and the stages it took."""
    found = parse_arm(arm)
    if not found:
        return None, ()
    name = "-".join(["prune", found.chosen, *whose(found, target, seed)])
    selection: list[str] = []
    argv = ["prune", "--source", str(graph.source)]
    inputs = [graph.source]
    if found.is_random:
        argv += ["--random", "samples" if found.method == "random-samples" else "classes", "--seed", str(seed)]
    else:
        votes, surrogate = _vote(graph, found, target)
        selection += [surrogate, votes.stem]
        argv += ["--votes", str(votes), *(["--reverse"] if found.method.endswith("-reverse") else [])]
        inputs.append(votes)
    leader = graph.config.leader(found) if found.is_random and found.keep == AUTO else None
    if leader:
        like, _ = select(graph, leader, target, seed)
        assert like is not None
        argv += ["--like", str(like)]
        inputs.append(like)
    else:
        argv += ["--keep", found.keep]
    output = graph.out / "subsets" / f"{name.removeprefix('prune-')}.npz"
    also: tuple[Path, ...] = ()
    if graph.source_val:
        argv += ["--apply-to", str(graph.source_val)]
        inputs.append(graph.source_val)
        also = (output.with_suffix(".val.npz"),)
    graph.add(Stage(name, (*argv, "--out", str(output)), tuple(inputs), output, also=also))
    return output, (*selection, name)


def whose(arm: ArmName, target: str, seed: int) -> list[str]:
    """Whose choice an arm's subset is: one a target, or one a seed where chance decides; both at a target's size."""
    return [*([] if arm.is_random and arm.keep != AUTO else [target]), *([f"s{seed}"] if arm.is_random else [])]


def _vote(graph: "Graph", arm: ArmName, target: str) -> tuple[Path, str]:
    """The votes of an arm on a target, and the name of the stage that trains its surrogate."""
    seed, method = graph.config.seeds[0], arm.method.removesuffix("-reverse")
    table = graph.config.surrogates[arm.surrogate] if arm.surrogate else graph.config.surrogate
    name = "surrogate" + (f"-{arm.surrogate}" if arm.surrogate else "")
    surrogate = graph.train(name, table, graph.source, graph.source_val, None, None, seed)
    by = f"{method}+{arm.surrogate}" if arm.surrogate else method
    output = graph.out / "votes" / f"vote-{by}-{target}.npz"
    train = graph.targets[target][0]
    argv = ["vote", "--method", method, "--surrogate", str(surrogate), "--target", str(train), "--out", str(output)]
    inputs = [surrogate, train]
    if method == "fm":
        argv += ["--source", str(graph.source)]
        inputs.append(graph.source)
    graph.add(Stage(output.stem, tuple(argv), tuple(inputs), output, distributed=True))
    return output, name
