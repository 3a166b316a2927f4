"""From an arm's name to the stages that choose its samples."""

from pathlib import Path
from typing import TYPE_CHECKING

from dp4tl_dist.arm_name import AUTO, INFLUENCE, OF_LOSSES, OF_TARGETS, RANDOM, ArmName, parse_arm
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

    def use(option: str, made: list[tuple[Path, tuple[str, ...]]]) -> None:
        """Pass files on, with the stages that they took."""
        argv.extend([option, *(str(path) for path, _ in made)])
        inputs.extend(path for path, _ in made)
        for path, stages in made:
            selection.extend(name for name in (*stages, path.stem) if name not in selection)

    if found.is_random:
        argv += ["--random", RANDOM[found.method], "--seed", str(seed)]
    targets = list(graph.targets) if found.is_joint else [target]
    if found.votes:
        use("--votes", [_vote(graph, found, each) for each in targets])
        argv += _together(graph) if found.is_joint else []
    if found.base == INFLUENCE:
        path = _influence(graph, target)
        argv += ["--influence", str(path)]
        inputs.append(path)
        selection.append(path.stem)
    for method in found.scores:
        use("--scores", [_score(graph, found, method, targets)])
    argv += ["--reverse"] if found.is_reverse else []
    leader = graph.config.leader(found) if found.is_random and found.keep == AUTO else None
    keep, inside = found.shares
    if leader:
        like, _ = select(graph, leader, target, seed)
        assert like is not None
        argv += ["--like", str(like)]
        inputs.append(like)
    else:
        argv += ["--keep", keep]
    argv += ["--within-class", f"{found.within}:{inside}"] if found.within else []
    argv += ["--seed", str(seed)] if found.of_chance and not found.is_random else []
    output = graph.out / "subsets" / f"{name.removeprefix('prune-')}.npz"
    also: tuple[Path, ...] = ()
    if graph.source_val:
        argv += ["--apply-to", str(graph.source_val)]
        inputs.append(graph.source_val)
        also = (output.with_suffix(".val.npz"),)
    graph.add(Stage(name, (*argv, "--out", str(output)), tuple(inputs), output, also=also))
    return output, (*selection, name)


def whose(arm: ArmName, target: str, seed: int) -> list[str]:
    """Whose choice it is: a target's where the arm looks at one or has its size, a seed's where chance decides."""
    at_a_targets_size = arm.is_random and arm.keep == AUTO
    return [*([target] if arm.of_target or at_a_targets_size else []), *([f"s{seed}"] if arm.of_chance else [])]


def _influence(graph: "Graph", target: str) -> Path:
    """What each class does for a target, by brute force; a resumed stage goes on with the models that are left."""
    name, train = f"{INFLUENCE}-{target}", graph.targets[target][0]
    output = graph.out / INFLUENCE / f"{name}.npz"
    content = {
        **graph.config.influence.model_dump(mode="json"), "source": str(graph.source), "target": str(train),
        "seed": graph.config.seeds[0], "engine": graph.config.engine.model_dump(mode="json"),
    }  # fmt: skip
    argv = (INFLUENCE, "--config", str(graph.config_path(name)), "--out", str(output))
    init = (Path(graph.config.influence.model.init),) if graph.config.influence.model.init else ()
    return graph.add(Stage(name, argv, (graph.source, train, *init), output, config=content))


def _together(graph: "Graph") -> list[str]:
    """How the votes of all targets count in a joint arm."""
    weights = [table.weight for table in graph.config.targets.values()]
    told = ["--weights", ",".join(f"{weight:g}" for weight in weights)] if len(set(weights)) > 1 else []
    return ["--combine", graph.config.combine, *told]


def _surrogate(graph: "Graph", arm: ArmName) -> tuple[Path, str]:
    """The surrogate of an arm, and the name of the stage that trains it."""
    seed = graph.config.seeds[0]
    table = graph.config.surrogates[arm.surrogate] if arm.surrogate else graph.config.surrogate
    name = f"surrogate{arm.by.replace('+', '-')}"
    others = [other for text in graph.config.arms if (other := parse_arm(text)) and other.surrogate == arm.surrogate]
    logs_losses = any(method in OF_LOSSES for other in others for method in other.scores)
    source, val = graph.source, graph.source_val
    return graph.train(name, table, source, val, None, None, seed, losses=logs_losses), name


def _vote(graph: "Graph", arm: ArmName, target: str) -> tuple[Path, tuple[str, ...]]:
    """The votes of an arm on a target, and the names of the stages before: the surrogate's, and the clusters'."""
    surrogate, *before = _surrogate(graph, arm)
    method = arm.base
    output = graph.out / "votes" / f"vote-{method}{arm.by}-{target}.npz"
    train = graph.targets[target][0]
    argv = ["vote", "--method", method, "--surrogate", str(surrogate), "--target", str(train), "--out", str(output)]
    inputs = [surrogate, train]
    if method == "fm" and graph.config.clusters.count:
        clusters = _clusters(graph, arm, surrogate)
        argv += ["--clusters", str(clusters)]
        inputs.append(clusters)
        before.append(clusters.stem)
    elif method == "fm":
        argv += ["--source", str(graph.source)]
        inputs.append(graph.source)
    graph.add(Stage(output.stem, tuple(argv), tuple(inputs), output, distributed=True))
    return output, tuple(before)


def _clusters(graph: "Graph", arm: ArmName, surrogate: Path) -> Path:
    """The clusters that fm arms of one surrogate vote for."""
    table = graph.config.clusters
    output = graph.out / "clusters" / f"cluster{arm.by.replace('+', '-')}.npz"
    argv = ["cluster", "--surrogate", str(surrogate), "--source", str(graph.source), "--clusters", str(table.count)]
    for key in ("init", "iterations", "tolerance", "store_precision", "seed"):
        argv += [f"--{key.replace('_', '-')}", str(getattr(table, key))]
    stage = Stage(output.stem, (*argv, "--out", str(output)), (surrogate, graph.source), output, distributed=True)
    return graph.add(stage)


def _score(graph: "Graph", arm: ArmName, method: str, targets: list[str]) -> tuple[Path, tuple[str, ...]]:
    """The scores that an arm chooses samples by, and the name of the stage that trains its surrogate."""
    surrogate, name = _surrogate(graph, arm)
    wanted = targets if method in OF_TARGETS else []
    whose = ["joint"] if len(wanted) > 1 else wanted
    output = graph.out / "scores" / f"{'-'.join([f'score-{method}{arm.by}', *whose])}.npz"
    inputs = [surrogate, graph.source, *(graph.targets[each][0] for each in wanted)]
    argv = ["score", "--method", method, "--surrogate", str(surrogate), "--source", str(graph.source)]
    argv += [part for each in wanted for part in ("--target", str(graph.targets[each][0]))]
    graph.add(Stage(output.stem, (*argv, "--out", str(output)), tuple(inputs), output, distributed=True))
    return output, (name,)
