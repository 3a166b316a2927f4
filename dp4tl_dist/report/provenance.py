"""The tables of where everything comes from: stages, datasets and fingerprints."""

from pathlib import Path

from dp4tl_dist.report.collect import Run
from dp4tl_dist.report.tables import Cell, Link, Table


def anchor(stage: str) -> str:
    """The id of a stage's row on the page."""
    return f"stage-{stage}"


def short(run: Run, path: Path) -> str:
    """A path as seen from the run folder, where it lies inside."""
    return str(path.relative_to(run.out) if path.is_relative_to(run.out) else path)


def stages(run: Run) -> Table:
    """Every stage with its state, in the order of the run."""
    rows: list[tuple[Cell, ...]] = []
    for name, stage in run.graph.stages.items():
        ranks = run.records[name].get("nproc")
        restarts = run.metas[name].get("restarts")
        rows.append((Link(name, f"#{anchor(name)}"), run.status(name), run.seconds(name),
                     ranks if isinstance(ranks, int) else None,
                     restarts if isinstance(restarts, int) else None,
                     hardware(run.metas[name].get("hardware")), short(run, stage.output)))  # fmt: skip
    heads = (("stage", ""), ("state", ""), ("seconds", ".1f"), ("ranks", "d"), ("restarts", "d"), ("made on", ""))
    return Table("stages", (*heads, ("output", "")), rows)


def hardware(found: object) -> str | None:
    """A meta's hardware as people say it; None where it tells none."""
    if not isinstance(found, dict):
        return None
    listed = found.get("gpus")
    gpus = [str(name) for name in listed] if isinstance(listed, list) else []
    counts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    instructions = [str(found["instructions"])] if found.get("instructions") else []
    return ", ".join([*counts, str(found.get("processor")), *instructions, f"{found.get('cores')} cores"])


def datasets(run: Run) -> Table:
    rows: list[tuple[Cell, ...]] = [
        (
            name,
            beton.num_samples,
            beton.num_classes,
            int(beton.sizes.sum()) / 2**20,
            beton.fingerprint,
            short(run, beton.path),
        )
        for name, beton in run.betons.items()
    ]
    heads = (("dataset", ""), ("samples", "d"), ("classes", "d"), ("images, MiB", ".1f"), ("fingerprint", ""))
    return Table("datasets", (*heads, ("file", "")), rows)


def fingerprints(run: Run) -> Table:
    """What each model, votes file, subset and result was made from, by the digests that they carry."""
    rows: list[tuple[Cell, ...]] = []
    for name, stage in run.graph.stages.items():
        record, meta = run.records[name], run.metas[name]
        inputs = meta.get("inputs")
        made = str(record.get("output", ""))
        if made:
            commit, plus, _ = str(meta.get("commit") or "").partition("+")
            code = f"{meta.get('version') or ''} {commit[:10]}{plus and ' + changes'}".strip()
            given = ", ".join(f"{what} {digest}" for what, digest in inputs.items()) if isinstance(inputs, dict) else ""
            rows.append((Link(name, f"#{anchor(name)}"), code, made, given, stage.output.name))
    heads = (("stage", ""), ("code", ""), ("output's digest", ""), ("inputs", ""), ("output", ""))
    return Table("fingerprints", heads, rows)
