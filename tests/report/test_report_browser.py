"""The page in a real headless Chromium: no errors, sorting, the theme switch, CSV, hostile names, phones, print."""

import csv
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import EXECUTABLE, Chromium
from fake_run import HOSTILE, make_run

from dp4tl_dist.config import load_config
from dp4tl_dist.report.collect import read_run
from dp4tl_dist.report.html import write_report
from dp4tl_dist.run_config import RunConfig

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="needs Chromium (apt-get install chromium)")
COLUMN = "[...document.querySelectorAll('table[data-name=\"{}\"] tbody tr')].map((row) => row.cells[{}].dataset.v)"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(whole: Path) -> Path:
    return whole / "report.html"


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("half") / "run"
    make_run(out, stop_at="transfer-lp-lm@0.5-pets-s0")
    return write_report(out)


@pytest.fixture(scope="module")
def full(rich: Path) -> Path:
    return rich / "report.html"


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["page", "half", "full"])
def test_renders(browser: Chromium, request: pytest.FixtureRequest, which: str, width: int) -> None:
    path = request.getfixturevalue(which)
    browser.open(path, width=width)
    assert browser.said == []
    assert [url for url in browser.asked if not url.startswith("data:image/jpeg")] == [path.as_uri()]
    assert browser.run("document.documentElement.scrollWidth") == width
    assert browser.run("[...document.images].every((image) => image.naturalWidth > 0)")
    assert browser.run("document.images.length") > 20


def test_charts_are_accessible(browser: Chromium, page: Path) -> None:
    browser.open(page)
    ids = browser.run("[...document.querySelectorAll('[id]')].map((item) => item.id)")
    assert len(ids) == len(set(ids))
    bare = """[...document.querySelectorAll('figure svg')].filter((svg) => svg.getAttribute('role') !== 'img' ||
        svg.getAttribute('aria-labelledby').split(' ').some((id) => !document.getElementById(id).textContent))"""
    assert browser.run(f"{bare}.length") == 0
    assert browser.run("document.querySelectorAll('figure svg').length") == 17
    lost = "(a) => !document.getElementById(decodeURIComponent(a.hash.slice(1)))"
    assert browser.run(f"[...document.querySelectorAll('a')].filter({lost}).length") == 0


def test_sorting(browser: Chromium, page: Path) -> None:
    browser.open(page)
    column, click = (
        COLUMN.format("results", 4),
        "document.querySelectorAll('table[data-name=results] .sort')[{}].click()",
    )
    before = [float(value) for value in browser.run(column)]
    assert before != sorted(before)
    browser.run(click.format(4))
    assert [float(value) for value in browser.run(column)] == sorted(before)
    browser.run(click.format(4))
    assert [float(value) for value in browser.run(column)] == sorted(before, reverse=True)
    assert (
        browser.run("document.querySelector('table[data-name=results] [aria-sort]').getAttribute('aria-sort')")
        == "descending"
    )
    browser.run(click.format(1))
    arms = browser.run(COLUMN.format("results", 1))
    assert arms == ["dense", "lm-reverse@0.25", "lm@0.25", "lm@0.5", "random@0.25", "random@0.5"]


def test_what_is_pending_sorts_last(browser: Chromium, half: Path) -> None:
    browser.open(half)
    for _ in range(2):
        browser.run("document.querySelectorAll('table[data-name=results] .sort')[4].click()")
        assert browser.run(COLUMN.format("results", 4))[-1] == ""


@pytest.mark.parametrize("dark", [False, True])
def test_theme(browser: Chromium, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    browser.run("localStorage.clear(), delete document.documentElement.dataset.theme")
    paper = "getComputedStyle(document.body).backgroundColor"
    text = "getComputedStyle(document.querySelector('figure svg text')).fill"
    colours = ["rgb(255, 255, 255)", "rgb(20, 23, 28)"]
    first, ink = browser.run(paper), browser.run(text)
    assert first == colours[dark]
    browser.run("document.getElementById('theme').click()")
    assert browser.run(paper) == colours[not dark]
    assert browser.run(text) != ink
    browser.open(page, dark=dark)
    assert browser.run(paper) == colours[not dark]  # it is remembered
    browser.run("localStorage.clear()")


def test_csv(browser: Chromium, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('button.csv[data-for=\"votes-lm-pets\"]').click()")
    path, end = tmp_path / "votes-lm-pets.csv", time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    with open(path, newline="", encoding="utf-8") as handle:
        rows = list(csv.reader(handle))
    assert rows[0] == [
        "rank", "source class", "votes", "covered, %", "samples up to it", "lm@0.5", "lm@0.25", "lm-reverse@0.25"
    ]  # fmt: skip
    assert [row[0] for row in rows[1:]] == [str(rank) for rank in range(1, len(HOSTILE) + 1)]
    expected = {name.replace("\udcff", "?") for name in HOSTILE}
    assert {row[1].removeprefix("'") for row in rows[1:]} == expected
    assert sum(row[1].startswith("'=") for row in rows[1:]) == 1  # no formula


def test_the_config_can_be_saved_and_run_again(browser: Chromium, page: Path, tmp_path: Path) -> None:
    browser.open(page)
    browser.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.run("document.querySelector('button.save').click()")
    path, end = tmp_path / "config.json", time.monotonic() + 20
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert read_run(page.parent).config == load_config(RunConfig, str(path), [])


def test_names_in_charts_do_not_lie_on_each_other(browser: Chromium, full: Path) -> None:
    """As the browser's own font sets them."""
    browser.open(full)
    found = browser.run("""[...document.querySelectorAll('figure')]
        .filter((figure) => figure.querySelector('h3').textContent.includes('against time'))
        .map((figure) => [...figure.querySelectorAll('svg text')].filter((text) => text.textContent.includes('@'))
            .map((text) => text.getBoundingClientRect()).map((box) => [box.left, box.top, box.right, box.bottom]))""")
    assert [len(boxes) for boxes in found] == [7] * 4
    leading = 6  # a line's box is that much higher than its letters
    for boxes in found:
        for i, (left, top, right, bottom) in enumerate(boxes):
            for other in boxes[i + 1 :]:
                apart = right < other[0] or other[2] < left or bottom - leading < other[1] or other[3] - leading < top
                assert apart, (boxes[i], other)


def test_hostile_names_stay_text(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert browser.run("document.title") == "run · dp4tl report"
    assert browser.run("document.scripts.length") == 1
    assert (
        browser.run("[...document.querySelectorAll('b')].filter((b) => ['bold', 'bad'].includes(b.textContent)).length")
        == 0
    )
    names = browser.run("[...document.querySelectorAll('.class bdi')].map((item) => item.textContent)")
    assert set(names) == {name.replace("\udcff", "?") for name in HOSTILE}
    tips = browser.run("[...document.querySelectorAll('figure svg g title')].map((item) => item.textContent)")
    assert any("<script>document.title" in tip for tip in tips)


def test_the_page_itself_refuses_other_scripts(browser: Chromium, page: Path) -> None:
    browser.open(page)
    browser.run("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"document.title=1\">')")
    browser.run(
        "(() => { const s = document.createElement('script'); s.text = 'document.title=2'; document.body.append(s) })()"
    )
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("document.title") == "run · dp4tl report"
    assert any("Content Security Policy" in text for text in browser.said)


def test_links_unfold_what_they_lead_to(browser: Chromium, page: Path) -> None:
    browser.open(page)
    assert not browser.run("document.querySelector('details.commands').open")
    browser.run("document.querySelector('table[data-name=stages] a').click()")
    browser.run("new Promise((done) => setTimeout(done, 100))")
    assert browser.run("document.querySelector('details.commands').open")


def test_prints(browser: Chromium, page: Path) -> None:
    browser.open(page, dark=True)
    browser.send(
        "Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}]
    )
    assert browser.run("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_paper_shows_what_cannot_be_unfolded(browser: Chromium, full: Path) -> None:
    browser.open(full)
    browser.send("Page.printToPDF")
    assert browser.run("document.querySelector('details.words').open")
    browser.send("Emulation.setEmulatedMedia", media="print")
    shown = "[...document.querySelectorAll('details')].filter((item) => item.getClientRects().length)"
    assert browser.run(f"{shown}.map((item) => item.className)") == ["words"]
    assert browser.run("getComputedStyle(document.querySelector('.pair .bar')).printColorAdjust") == "exact"
    assert browser.run("getComputedStyle(document.querySelector('.scroll.long')).maxHeight") == "none"
