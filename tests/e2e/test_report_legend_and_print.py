# SPDX-License-Identifier: Apache-2.0
"""The report page's legend draws the lines of its charts, and its print is dark on white, also from a dark system."""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.browser import CHROMIUM, FLAGS, needs_chromium
from tests.e2e.test_report_browser import close, drawn, opened
from tests.unit.readers_and_bad_backends import batch_of
from trackhub.delivery.journal.journal import Journal
from trackhub.page.render import MAX_JOBS, write_report
from trackhub.records import Metrics, Payload, Record, Text

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; it is in the extra dev"
)

pytestmark = [needs_chromium, pytest.mark.long]

CHIPS = """kind => [...document.querySelectorAll(`.chip[data-toggle=${kind}] .sample path`)].map(path =>
[getComputedStyle(path).stroke, getComputedStyle(path).strokeDasharray])"""
LINES = """[...document.querySelectorAll('#metrics .chart .scatterlayer .js-line')].map(path =>
[getComputedStyle(path).stroke, getComputedStyle(path).strokeDasharray])"""
THEMES = """[document.styleSheets[0].cssRules[0].style, document.styleSheets[0].cssRules[1].cssRules[0].style].map(
style => ['--ink', '--soft', '--accent'].map(name => style.getPropertyValue(name).trim()))"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def job(folder: Path, name: str, sites: Mapping[str, Sequence[Payload]]) -> None:
    """Write the journal of a job whose sites log each of these payloads in a round of its own."""
    journal = Journal.open(folder / name / "trackhub" / "trackhub.db", job=name, side="server")
    for site, payloads in sites.items():
        records = [Record(r, 1000.0 + r, r, r, payload) for r, payload in enumerate(payloads)]
        journal.append(journal.add_site(site, 1000.0), batch_of(records), {})
    journal.close()


def curves(value: float) -> list[Payload]:
    return [Metrics({"loss": value + 1 / (r + 1)}) for r in range(4)]


def page_of(browser: Browser, folder: Path, **options: object) -> Page:
    write_report(folder, folder / "page.html")
    page = opened(browser, folder / "page.html", has_charts=False, **options)
    drawn(page, "loss")
    return page


def test_of_several_jobs_each_chip_is_drawn_as_the_lines_it_stands_for(browser: Browser, tmp_path: Path) -> None:
    for n in range(MAX_JOBS):
        job(tmp_path, f"job-{n:02}", {f"site-{s}": curves(n + s / 10) for s in range(6)})
    page = page_of(browser, tmp_path)

    jobs, sites, lines = page.evaluate(CHIPS, "job"), page.evaluate(CHIPS, "site"), page.evaluate(LINES)

    assert lines == [[colour, dash] for colour, _ in jobs for _, dash in sites]
    assert len({colour for colour, _ in jobs}) == MAX_JOBS
    assert len({dash for _, dash in sites}) == 6
    assert page.locator("#code").inner_text() == "A line has the colour of its job and the dashes of its site."
    close(page)


def test_of_one_job_a_site_beyond_the_colours_has_dashes_in_its_chip_too(browser: Browser, tmp_path: Path) -> None:
    job(tmp_path, "j", {f"site-{s:02}": curves(s) for s in range(75)})
    page = page_of(browser, tmp_path)

    chips = page.evaluate(CHIPS, "site")

    assert page.evaluate(LINES) == chips
    assert len({tuple(chip) for chip in chips}) == 72
    assert "repeat after 72 sites" in page.locator("#code").inner_text()
    close(page)


def colours(pdf: bytes, operator: str) -> list[tuple[float, ...]]:
    """Return each colour that the pages of a PDF set, for what they fill (``rg``) or stroke (``RG``)."""
    found = []
    for stream in re.findall(rb"stream\r?\n(.*?)endstream", pdf, re.DOTALL):
        try:
            text = zlib.decompressobj().decompress(stream)
        except zlib.error:
            continue
        number = rb"([\d.]+)\s+"
        found += [tuple(map(float, m)) for m in re.findall(number * 3 + operator.encode() + rb"\b", text)]
    return found


def of(colour: str) -> tuple[float, ...]:
    return tuple(int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))


def count(colour: str, found: Sequence[tuple[float, ...]]) -> int:
    return sum(math.dist(one, of(colour)) < 0.01 for one in found)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_print_is_dark_on_white_whatever_the_system_is(browser: Browser, tmp_path: Path, scheme: str) -> None:
    own: list[Payload] = [Metrics({"loss/mean": 1.0 + r, "aggregated/loss": 2.0 + r}) for r in range(4)]
    job(tmp_path, "j", {"s1": curves(0), "s2": curves(1), "federation": own})
    page = page_of(browser, tmp_path, color_scheme=scheme)

    pdf = page.pdf(format="A4")

    strokes, fills = colours(pdf, "RG"), colours(pdf, "rg")
    light, dark = page.evaluate(THEMES)
    assert all(count(colour, strokes) for colour in ("#2264c8", "#d1570f")), "the sites' lines"
    assert count(light[0], strokes), "the federation's line"
    assert all(count(colour, fills) for colour in light), "texts, those of the axes too, and the points of the mean"
    assert [colour for colour in [*dark, "#78acff", "#ff9d66"] if count(colour, strokes + fills)] == []
    close(page)


def test_print_shows_in_which_rounds_each_site_took_part(browser: Browser, tmp_path: Path) -> None:
    texts: list[Payload] = [Text("k", "x")] * 5
    job(tmp_path, "cells", {"s1": texts, "s2": texts[:3]})
    job(tmp_path / "many", "bars", {"s1": texts * 20, "s2": texts * 10})
    found = []
    for folder in (tmp_path / "cells", tmp_path / "many"):
        write_report(folder, tmp_path / "page.html")
        page = opened(browser, tmp_path / "page.html", has_charts=False)
        found.append(count("#1f5fbf", colours(page.pdf(format="A4"), "rg")))
        close(page)

    assert found == [8, 2], "the cells of eight rounds; two bars"


def test_after_print_the_page_is_as_before(browser: Browser, tmp_path: Path) -> None:
    job(tmp_path, "j", {"s1": curves(0), "federation": [Metrics({"fl/round_seconds": 1.0})] * 3})
    page = page_of(browser, tmp_path, color_scheme="dark")
    state = """() => [...document.querySelectorAll('#metrics .main-svg')].map(svg => svg.outerHTML.length).concat(
    [document.querySelector('details.more').open, document.querySelector('#metrics .chart').data[0].line.color])"""
    before = page.evaluate(state)

    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    between = page.evaluate(state)
    page.evaluate("dispatchEvent(new Event('afterprint'))")

    assert between[-2:] == [True, "#2264c8"]
    assert page.evaluate(state)[-2:] == before[-2:] == [False, "#78acff"]
    close(page)


def test_print_of_very_many_charts_says_how_many_it_leaves_out(browser: Browser, tmp_path: Path) -> None:
    job(tmp_path, "j", {"s1": [Metrics({"loss": 1.0} | {f"k{n}": 1.0 for n in range(130)})]})
    page = page_of(browser, tmp_path)

    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")

    assert page.locator("#printed").inner_text() == "Print shows 120 of 131 charts; the page shows all."
    assert page.locator("#metrics .card:visible").count() == 120
    close(page)
