"""Puts the page together: charts, tables and text into one file that needs nothing else."""

import base64
import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path

import jinja2
from markupsafe import Markup

from dp4tl_dist import __version__
from dp4tl_dist.files import atomic_file
from dp4tl_dist.machine import num_cores, processor
from dp4tl_dist.report import sections, tables
from dp4tl_dist.report.caveats import caveats
from dp4tl_dist.report.collect import Run, read_run
from dp4tl_dist.report.selection import selections

PAGE = Path(__file__).parent / "page"
PACKAGES = ("torch", "torchvision", "ffcv", "deepspeed", "numpy", "pillow")


def write_report(out: Path) -> Path:
    """Write `out`/report.html from what the run folder `out` holds so far, and return its path.

    A folder without a run's config is a UserError. Damaged files are named on the page and left out.
    """
    page = render(read_run(out))
    path = out / "report.html"
    with atomic_file(path) as temporary:
        # File names that are not text reach Python as lone surrogates, which no encoding takes.
        temporary.write_text(page, encoding="utf-8", errors="replace")
    return path


def render(run: Run) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(PAGE), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    script = (PAGE / "page.js").read_text(encoding="utf-8")
    now = datetime.now(timezone.utc).timestamp()
    found = list(selections(run))
    states = [run.status(stage) for stage in run.graph.stages]
    return environment.get_template("page.html.j2").render(
        run=run,
        name=run.out.resolve().name,
        # The browser itself refuses everything but what is in the file, and every script but this one.
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=Markup((PAGE / "page.css").read_text(encoding="utf-8")),
        written=clock(now),
        last_sign=clock(run.last_sign()),
        states={state: states.count(state) for state in ("done", "started", "pending")},
        sentences=list(sections.sentences(run)),
        results=tables.results(run),
        cards=sections.cards(run, found),
        headline=list(sections.headline(run)),
        selections=[(item, sections.chosen(item), tables.affinities(item)) for item in found],
        curves=list(sections.all_curves(run)),
        stages=tables.stages(run),
        datasets=tables.datasets(run),
        fingerprints=tables.fingerprints(run),
        config=json.dumps(run.config.model_dump(mode="json"), indent=2),
        configs=list(stage_configs(run)),
        commands=list(commands(run)),
        machine=machine(),
        warnings=list(caveats(run)),
    )


def clock(seconds: float | None) -> str:
    """A moment as people read it, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC") if seconds else "never"


def stage_configs(run: Run) -> Iterator[tuple[str, str]]:
    """(stage, its resolved config) of each training stage that has one."""
    for name, meta in run.metas.items():
        if config := meta.get("config"):
            yield name, json.dumps(config, indent=2, sort_keys=True)


def commands(run: Run) -> Iterator[tuple[str, str, str]]:
    """(stage, anchor, command line) of every stage."""
    for name, stage in run.graph.stages.items():
        yield name, tables.anchor(name), shlex.join(["dp4tl", *stage.argv])


def machine() -> dict[str, str]:
    """The machine and the packages that this page is written with."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return {
        "processor": f"{processor()}, {num_cores()} cores for this process",
        "memory": f"{memory:.0f} GiB",
        "system": platform.platform(),
        "Python": platform.python_version(),
        "dp4tl": __version__,
        **versions,
    }
