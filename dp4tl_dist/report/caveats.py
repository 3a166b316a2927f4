"""What a reader should know before believing the page: skipped images, restarts, faults, stages not done, chance."""

import statistics
from collections.abc import Iterator

from dp4tl_dist.arm_name import RANDOM
from dp4tl_dist.data.beton import Beton, sidecar
from dp4tl_dist.files import read_json
from dp4tl_dist.marks import MARK
from dp4tl_dist.report.collect import Metrics, Run

MUCH_WAITING = 0.3
SHOWN_LINES = 20


def caveats(run: Run) -> Iterator[tuple[str, str]]:
    """(what about, what) for all that a reader should know before believing the page."""
    for name, beton in run.betons.items():
        yield from _skipped(run, name, beton)
    for stage, meta in run.metas.items():
        if restarts := meta.get("restarts"):
            yield stage, f"was cut off and continued {restarts} time{'s' if restarts != 1 else ''}"
    for stage in run.graph.stages:
        if run.status(stage) in ("stopped", "failed"):
            yield stage, f"{run.status(stage)}: {run.records[stage].get('error', 'it does not say why')}"
        if run.status(stage) == "started":
            yield stage, "has started and not ended: it is going on, or was cut off (the same command continues it)"
        if bad := sum(_bad_samples(run.trainings.get(stage, []))):
            yield stage, f"images that could not be decoded, seen and left out of the loss: {bad}"
        waits = [share for line in run.trainings.get(stage, []) if isinstance(share := line.get("data_wait"), float)]
        share = statistics.median(waits) if waits and run.graph.stages[stage].argv[0] == "train" else 0
        if share > MUCH_WAITING:
            yield stage, f"waited for data {100 * share:.0f} % of the time: more cores or num_workers would help"
        yield from ((stage, text) for text in _logged_warnings(run, stage))
    for arm in run.arms:
        yield from ((f"{arm.name} on {arm.target} {MARK}", line) for line in arm.marks)
    methods = {arm.method for arm in run.arms}
    if len(run.config.arms) > 1 and not methods & RANDOM.keys():
        yield "arms", "there is no random arm: without one of the same size, no gain can be told from chance"
    if len(run.config.seeds) == 1:
        yield "seeds", "one seed only: small differences between arms may be chance"
    yield from (("files", text) for text in run.problems)


def _bad_samples(lines: Metrics) -> Iterator[int]:
    """As many as each step line counted; a line stands for the steps since the one before."""
    yield from (bad for line in lines if isinstance(bad := line.get("bad_samples"), int))


def _skipped(run: Run, name: str, beton: Beton) -> Iterator[tuple[str, str]]:
    content = run.attempt(read_json, sidecar(beton.path)) if sidecar(beton.path).exists() else None
    meta = content.get("meta") if isinstance(content, dict) else None
    left_out = meta.get("left_out") if isinstance(meta, dict) else None
    if isinstance(left_out, dict) and left_out:
        yield name, "left out: " + ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    skipped = meta.get("skipped", []) if isinstance(meta, dict) else []
    if not isinstance(skipped, list) or not skipped:
        return
    yield name, f"unreadable images left out: {len(skipped)}"
    yield from ((name, ": ".join(map(str, item))) for item in skipped[:SHOWN_LINES] if isinstance(item, list))


def _logged_warnings(run: Run, stage: str) -> list[str]:
    path = run.out / "logs" / f"{stage}.log"
    text = run.attempt(path.read_text, errors="replace") if path.exists() else ""
    lines = [line.partition("warning:")[2].strip() for line in (text or "").splitlines() if "warning:" in line[:12]]
    return [line for line in dict.fromkeys(lines) if not line.startswith("skipped ")][:SHOWN_LINES]
