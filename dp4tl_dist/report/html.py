"""Puts the page together: charts, tables and text into one file that needs nothing else."""

import base64
import hashlib
import importlib.metadata
import itertools
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
from dp4tl_dist.atomic import atomic_file
from dp4tl_dist.files import keep_inputs
from dp4tl_dist.machine import num_cores, processor
from dp4tl_dist.report import provenance, sections, tables
from dp4tl_dist.report.brute_force import forces
from dp4tl_dist.report.caveats import caveats
from dp4tl_dist.report.collect import STATES, Run, read_run
from dp4tl_dist.report.selection import selections
from dp4tl_dist.report.studies import sweep_tables

ALL_ROWS = 6000
ALL_CONFIG_BYTES = 400_000
PAGE = Path(__file__).parent / "page"
PACKAGES = ("torch", "torchvision", "ffcv", "deepspeed", "numpy", "pillow")


def write_report(out: Path) -> Path:
    """Write `out`/report.html from what the run folder `out` holds so far, and return its path.

    A folder without a run's config is a UserError. Damaged files are named on the page and left out.
    """
    page = render(read_run(out))
    path = out / "report.html"
    keep_inputs([path], [out / "config.json", *out.glob("stages/*.json"), *out.glob("*/*.npz")])
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
    forced = list(forces(run, found))
    lead, more = sections.in_words(run)
    configs = list(stage_configs(run))
    limit = int(run.detail * ALL_ROWS) // max(ALL_ROWS // tables.LIMIT, 2 * len(found) + len(forced))
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
        states={state: states.count(state) for state in STATES},
        lead=lead,
        more=more,
        results=tables.results(run),
        cards=sections.cards(run, found, forced),
        headline=list(sections.headline(run)),
        selections=[(item, sections.chosen(item, limit), tables.affinities(item, limit)) for item in found],
        forced=[(item, sections.forced(item, limit), tables.agreed(item)) for item in forced],
        sweep=sweep_tables(run),
        curves=list(sections.all_curves(run)),
        stages=provenance.stages(run),
        datasets=provenance.datasets(run),
        fingerprints=provenance.fingerprints(run),
        config=json.dumps(run.config.model_dump(mode="json"), indent=2),
        configs=within(configs, int(run.detail * ALL_CONFIG_BYTES)),
        num_configs=len(configs),
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


def within(configs: list[tuple[str, str]], num_bytes: int) -> list[tuple[str, str]]:
    """The first configs, as many as so many bytes hold."""
    reached = itertools.accumulate(len(text) for _, text in configs)
    return [config for config, sum_so_far in zip(configs, reached, strict=True) if sum_so_far <= num_bytes]


def commands(run: Run) -> Iterator[tuple[str, str, str]]:
    """(stage, anchor, command line) of every stage."""
    for name, stage in run.graph.stages.items():
        yield name, provenance.anchor(name), shlex.join(["dp4tl", *stage.argv])


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
