# SPDX-License-Identifier: Apache-2.0
"""The report page in a real browser: its numbers, its controls, and that it is open to everybody and to no attack.

Needs Debian's `chromium` (or another one in PATH), which is no Python package: `apt-get install -y chromium`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import trackhub
from tests.e2e.browser import CHROMIUM, FLAGS, needs_chromium
from tests.unit.readers_and_bad_backends import STREAM, batch_of
from tests.unit.test_report_texts import HOSTILE
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.wire import Batch
from trackhub.framing import encode_frame
from trackhub.page.render import write_report
from trackhub.records import Metrics, Params, Payload, Record, Text

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request

playwright_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed; it is in the extra dev"
)

WAIT_MS = 120_000  # a page takes a second; a busy machine may take very much longer

pytestmark = needs_chromium

HOSTILE_MARKDOWN = [
    *HOSTILE,
    "# head\n\n###### deep\n\n#\n\n1. one\n   > quote\n   > ```\n   > code",
    "**x** " + "y" * 1_000_000,
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with playwright_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a job of three sites and four rounds."""
    folder = tmp_path_factory.mktemp("report")
    journal = Journal.open(folder / "run" / "trackhub" / "trackhub.db", job="job-1", side="server")
    for n in range(3):
        records = [Record(0, 1000.0, None, None, Params({"lr": 0.1, "site": n}))]
        for r in range(4):
            found = Metrics({"val/acc": (r + n) / 10, "train/loss": math.exp(-r) + n})
            records.append(Record(len(records), 1000.0 + 10 * r + n, r, r, found))
        records.append(Record(len(records), 1100.0, None, None, Text("note", f"site {n}")))
        journal.append(journal.add_site(f"site-{n}", 1000.0), batch_of(records), {})
    journal.set_meta("status", "finished")
    journal.close()
    write_report(folder / "run", folder / "report.html")
    return folder / "report.html"


def opened(browser: Browser, path: Path, *, has_charts: bool = True, **options: Any) -> Page:
    """Open a page whose every error and request to anywhere fails the test when it is closed."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(WAIT_MS)
    faults: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            faults.append(message.text)

    def refuse(dialog: Dialog) -> None:
        faults.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def ask(request: Request) -> None:
        if request.url.startswith("http"):
            faults.append(request.url)

    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", refuse)
    page.on("console", note)
    page.on("request", ask)
    page.goto(path.as_uri())
    if has_charts:
        page.wait_for_selector(".chart .main-svg")
    page.faults = faults
    return page


def close(page: Page) -> None:
    assert page.faults == []
    page.context.close()


def drawn(page: Page, key: str) -> list[dict[str, Any]]:
    """Return what plotly.js drew in the last chart of this key."""
    page.locator(f'#metrics article[data-key="{key}"] .chart').scroll_into_view_if_needed()
    page.wait_for_selector(f'#metrics article[data-key="{key}"] .main-svg')
    found: list[dict[str, Any]] = page.evaluate(
        """key => [...document.querySelectorAll('#metrics article')].find(a => a.dataset.key === key)
        .querySelector('.chart').data.map(t => ({x: [...t.x], y: [...t.y], name: t.name, shown: t.visible,
        colour: t.line.color}))""",
        key,
    )
    return found


def test_the_charts_and_tables_show_the_numbers_that_were_logged(browser: Browser, report: Path) -> None:
    page = opened(browser, report)

    lines = drawn(page, "val/acc")
    assert [line["name"] for line in lines] == ["site-0", "site-1", "site-2"]
    assert [line["x"] for line in lines] == [[0, 1, 2, 3]] * 3
    assert [line["y"] for line in lines] == [[(r + n) / 10 for r in range(4)] for n in range(3)]
    band = page.evaluate("document.querySelector('#federation .chart').data.map(t => [...t.y])")
    rounds = range(4)
    assert band == [
        [r / 10 for r in rounds], [(r + 2) / 10 for r in rounds], pytest.approx([(r + 1) / 10 for r in rounds])
    ]  # fmt: skip
    finals = page.locator("#finals tr", has_text="val/acc").inner_text().split("\t")
    assert finals[:4] == ["val/acc", "0.3", "0.4", "0.5"]
    details = page.locator('#metrics article[data-key="val/acc"] details')
    details.locator("summary").click()
    assert details.locator("tbody tr").nth(3).inner_text().split() == ["3", "0.3", "0.4", "0.5"]
    close(page)


@pytest.mark.long
def test_the_controls_change_the_charts_by_keyboard_too(browser: Browser, report: Path) -> None:
    page = opened(browser, report)
    drawn(page, "val/acc")

    page.locator("input[value=time]").focus()
    page.keyboard.press("Space")
    assert drawn(page, "val/acc")[1]["x"] == [1, 11, 21, 31]
    chip = page.locator(".chip", has_text="site-1")
    chip.focus()
    page.keyboard.press("Enter")
    assert chip.get_attribute("aria-pressed") == "false"
    assert [line["shown"] for line in drawn(page, "val/acc")] == [True, False, True]
    page.locator("input[name=log]").focus()
    page.keyboard.press("Space")
    scale = "document.querySelector('#metrics article[data-key=\"val/acc\"] .chart').layout.yaxis.type"
    assert page.evaluate(scale) == "log"
    page.fill("input[name=find]", "LOSS")
    assert page.locator("#metrics article:visible").count() == 1
    assert page.locator("#found").inner_text() == "1 charts found"
    close(page)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_and_a_site_has_one_colour(browser: Browser, report: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    page = opened(browser, report, color_scheme=scheme, bypass_csp=True)
    for summary in page.locator("summary").all():
        summary.click()

    violations = Axe().run(page).response["violations"]

    assert [(found["id"], [node["target"] for node in found["nodes"]]) for found in violations] == []
    colours = [line["colour"] for line in drawn(page, "val/acc")]
    assert [line["colour"] for line in drawn(page, "train/loss")] == colours
    sample = "getComputedStyle(document.querySelector('.chip .sample path')).stroke"
    red, green, blue = (int(colours[0][i : i + 2], 16) for i in (1, 3, 5))
    assert page.evaluate(sample) == f"rgb({red}, {green}, {blue})"
    close(page)


@pytest.mark.long
@pytest.mark.parametrize("width", [360, 1400])
def test_nothing_is_wider_than_the_screen_and_print_draws_every_chart(
    browser: Browser, report: Path, width: int
) -> None:
    page = opened(browser, report, viewport={"width": width, "height": 700})

    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator(".chart .main-svg").count() >= page.locator(".chart").count()
    close(page)


@pytest.mark.long
def test_hostile_names_and_texts_do_nothing(browser: Browser, tmp_path: Path) -> None:
    texts = [
        "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", '" onmouseover="alert(3)',
        '<a href="javascript:alert(4)">x</a>', "%{y}<extra>z</extra>", "<b>bold</b>", "\u202eabc",
    ]  # fmt: skip
    with trackhub.local(["jsonl"], folder=tmp_path / "runs", job="h", name=texts[0], site=texts[1]) as writer:
        for step in range(3):
            writer.log(dict.fromkeys(texts, float(step)), step)
        for text in texts:
            writer.log_text(text, text)
            writer.log_params({text: text})
            writer.log_table(text, [text], [[text]])
            writer.log_histogram(text, [1.0, 2.0])
    write_report(tmp_path / "runs", tmp_path / "page.html")

    page = opened(browser, tmp_path / "page.html")
    for chart in page.locator("#metrics .chart, #histograms .chart").all():
        chart.scroll_into_view_if_needed()
        chart.hover()
    for summary in page.locator("summary").all():
        summary.click()

    assert sorted(page.locator("#metrics article h3, #metrics article h4").all_inner_texts()) == sorted(texts)
    assert page.locator("main b, main img, main a[href^=javascript]").count() == 0
    assert page.evaluate("document.scripts.length") == 3
    close(page)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_hostile_markdown_does_nothing_and_axe_finds_nothing(browser: Browser, tmp_path: Path, scheme: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with trackhub.local(["jsonl"], folder=tmp_path / "runs", job="h", notes=HOSTILE_MARKDOWN[0]) as writer:
        for number, text in enumerate(HOSTILE_MARKDOWN):
            writer.log_text(f"k{number}", text)
            writer.log_text(f"k{number} as a list", f"- {text}\n\n| | **a** |\n|-|-|\n| `x` | {text[:20]} |")
    write_report(tmp_path / "runs", tmp_path / "page.html")

    page = opened(
        browser, tmp_path / "page.html", has_charts=False, viewport={"width": 360, "height": 700}, bypass_csp=True,
        color_scheme=scheme,
    )  # fmt: skip
    for summary in page.locator("summary").all():
        summary.click()
    violations = Axe().run(page).response["violations"]

    assert [(found["id"], [node["target"] for node in found["nodes"]]) for found in violations] == []
    assert page.locator("main img, main a, main script, [onclick], [onerror]").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    close(page)


NAN = float("nan")
ODD_JOBS: dict[str, dict[str, list[Payload]]] = {
    "no record": {},
    "params only": {"a": [Params({"lr": 0.1})], "b": [Params({"lr": 0.2})]},
    "texts only": {"a": [Text("note", "")]},
    "one point": {"a": [Metrics({"loss": 1.0})]},
    "not a number": {"a": [Metrics({"loss": NAN})] * 3, "b": [Metrics({"loss": math.inf, "other": NAN})]},
    "long names": {"s" * 300: [Metrics({"k" * 500: 1.0, "a/" * 200: 2.0}), Params({"p" * 500: "v" * 5000})]},
}


@pytest.mark.long
@pytest.mark.parametrize("name", ODD_JOBS)
def test_a_job_with_little_in_it_is_a_page_without_errors(browser: Browser, tmp_path: Path, name: str) -> None:
    from axe_playwright_python.sync_playwright import Axe

    journal = Journal.open(tmp_path / "run" / "trackhub" / "trackhub.db", job=name, side="server")
    for site, payloads in ODD_JOBS[name].items():
        records = [Record(i, 1000.0 + i, None, None, payload) for i, payload in enumerate(payloads)]
        journal.append(journal.add_site(site, 1000.0), batch_of(records), {})
    journal.close()
    write_report(tmp_path / "run", tmp_path / "page.html")
    keys = {key for payloads in ODD_JOBS[name].values() for p in payloads if isinstance(p, Metrics) for key in p.values}

    page = opened(
        browser, tmp_path / "page.html", has_charts=bool(keys), viewport={"width": 360, "height": 700}, bypass_csp=True
    )
    for summary in page.locator("summary").all():
        summary.click()
    violations = Axe().run(page).response["violations"]

    assert page.locator("#metrics article").count() == len(keys)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert [(found["id"], [node["target"] for node in found["nodes"]]) for found in violations] == []
    close(page)


@pytest.mark.long
def test_a_job_of_hundreds_of_sites_and_thousands_of_keys_opens_in_seconds(browser: Browser, tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "run" / "trackhub" / "trackhub.db", job="big", side="server")
    for number in range(200):
        records = [
            Record(step, 1000.0 + step, step, step, Metrics({f"group-{k % 9}/k{k:04}": k + step for k in range(2000)}))
            for step in range(2)
        ]
        journal.append(journal.add_site(f"site-{number}", 1000.0), batch_of(records), {})
    journal.close()
    write_report(tmp_path / "run", tmp_path / "page.html")

    page = opened(browser, tmp_path / "page.html", has_charts=False, viewport={"width": 360, "height": 700})

    assert (tmp_path / "page.html").stat().st_size < 30_000_000
    assert page.locator("#metrics article").count() == 100
    assert [len(drawn(page, "group-0/k0000")), page.locator(".chip").count()] == [200, 200]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert "760,000 values are not shown" in page.locator(".problems").inner_text()
    assert page.evaluate("performance.getEntriesByType('navigation')[0].domContentLoadedEventEnd") < WAIT_MS / 4
    close(page)


@pytest.mark.long
def test_a_million_points_are_drawn_from_two_thousand_with_their_peaks(browser: Browser, tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "run" / "trackhub" / "trackhub.db", job="m", side="server")
    site = journal.add_site("s", 0.0)
    for first in range(0, 1_000_000, 1000):
        values = [math.sin(i / 50_000) for i in range(first, first + 1000)]
        if first == 700_000:
            values[123] = 9.0
        frames = [
            encode_frame(Record(first + i, 1.0, first + i, None, Metrics({"k": v}))) for i, v in enumerate(values)
        ]
        journal.append(site, Batch(STREAM, first, first + 1000, 1000, b"".join(frames)), {})
    journal.close()
    write_report(tmp_path / "run", tmp_path / "page.html")

    page = opened(browser, tmp_path / "page.html")
    (line,) = drawn(page, "k")

    assert (tmp_path / "page.html").stat().st_size < 6_000_000
    assert len(line["y"]) <= 2000
    assert (max(line["y"]), line["x"][line["y"].index(9.0)]) == (9.0, 700_123)
    assert (line["x"][0], line["x"][-1]) == (0, 999_999)
    close(page)
