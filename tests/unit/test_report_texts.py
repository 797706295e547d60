# SPDX-License-Identifier: Apache-2.0
"""The report page shows texts in Markdown as such, and what is hostile in them stays text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import trackhub
from tests.unit.test_report_page import Page, job, page_of
from trackhub.page.markdown_as_html import as_html
from trackhub.page.render import write_report
from trackhub.records import Text

pytest.importorskip("plotly", reason="plotly is not installed; it is in the extra report")

HOSTILE = [
    "**x** [a](javascript:alert(1)) [b](https://evil.example) <javascript:alert(2)> https://evil.example",
    "# ![a](https://evil.example/x.png) ![b][c]\n\n[c]: https://evil.example/x.png",
    "- <img src=x onerror=alert(3)>\n\n<script>alert(4)</script>\n\n<div onclick=alert(5)>\n\n**x**\n\n</div>\n<!--",
    "```x\"onclick=alert(6) y\n</code></pre><script>alert(7)</script>\n```",
    '| <b onclick=alert(8)>a</b> | [a](javascript:x) |\n| :-: | "onclick=alert(10) |\n| - | - |\n| `<b>` | &lt; |',
    "> " * 5000 + "**x**", "- " * 5000 + "**x**", "**" * 5000 + "x" + "**" * 5000, "*a_" * 5000, "[" * 9000 + "**x**",
    "**x** \u202eabc\n\n" + "a\n" * 9000,
]  # fmt: skip
ALLOWED = {
    "p", "br", "strong", "em", "s", "code", "pre", "blockquote", "ul", "ol", "li", "hr", "table", "thead", "tbody",
    "tr", "th", "td",
}  # fmt: skip


def test_the_table_that_trackhub_logs_itself_is_a_table(tmp_path: Path) -> None:
    text = "How the federation ran:\n\n| round | all others waited for |\n| ---: | --- |\n| 0 | site-2\\|x, 3.0 s |"

    page = page_of(job(tmp_path, {"s1": [Text("k", "v")], "federation": [(0, Text("fl/how_it_ran", text))]}))

    assert page.row("round") == ["round", "all others waited for"]
    assert page.row("0") == ["0", "site-2|x, 3.0 s"]
    assert text in page.text, "what was logged stands below it"


def test_a_text_and_the_notes_of_a_job_are_shown_as_markdown(tmp_path: Path) -> None:
    markdown = "# Head\n\nA **word**.\n\n> one\n\n1. two\n\n```\n<code>\n```"
    with trackhub.local(["jsonl"], folder=tmp_path / "runs", job="j", notes=markdown) as writer:
        writer.log_text("k", markdown)
    write_report(tmp_path / "runs", tmp_path / "page.html")

    page = Page(tmp_path / "page.html")

    assert [len(page.named(tag)) for tag in ("strong", "blockquote", "ol", "pre")] == [2, 2, 2, 2]
    assert "Head" not in page.headings, "a heading of a text is none of the page"


@pytest.mark.parametrize(
    "text",
    ['{\n  "lr": 0.1\n}', 'File "x.py", line 1, in __init__\n    a * b * c', "1 < 2 & 3 > 2", "a | b", "-----\nx", ""],
)
def test_a_text_without_markdown_stays_as_it_is_line_by_line(text: str) -> None:
    assert as_html(text) is None


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_markdown_has_no_link_no_image_and_no_html_of_its_own(tmp_path: Path, text: str) -> None:
    html = as_html(text) or ""
    (tmp_path / "x.html").write_text(f'{html}<script id="data">1</script>', encoding="utf-8")

    page = Page(tmp_path / "x.html")

    elements = [(tag, attrs) for tag, attrs in page.elements if tag != "script"]
    assert {tag for tag, _ in elements} <= ALLOWED
    assert {name for _, attrs in elements for name in attrs} <= {"class", "style", "start", "scope"}
    styles = {None, "text-align:left", "text-align:center", "text-align:right"}
    assert {attrs.get("style") for _, attrs in elements} <= styles
    assert len(html) < 6 * len(text) + 1000


def test_hostile_markdown_leaves_the_rest_of_the_page_as_it_is(tmp_path: Path) -> None:
    def page(name: str, texts: list[str]) -> Page:
        payloads: list[Any] = [Text(f"k{n:02}", text) for n, text in enumerate(texts)]
        return page_of(job(tmp_path, {"s1": payloads}, name))

    plain, hostile = page("a", ["x"] * len(HOSTILE)), page("b", HOSTILE)

    assert hostile.headings[1:] == plain.headings[1:]
    assert [len(hostile.named(tag)) for tag in ("script", "a", "img")] == [3, len(plain.named("a")), 0]


def test_nothing_of_a_deeply_nested_text_is_left_out() -> None:
    assert as_html("> " * 30 + "the end") is None
    assert as_html("- " * 30 + "the end") is None
    assert "the end" in as_html("> " * 10 + "the end")


def test_a_table_that_would_grow_to_thousands_of_cells_is_left_as_text() -> None:
    for end in ("\n", "\r", "\r\n"):
        assert as_html("|" + "a|" * 1000 + end + "|" + "-|" * 1000 + end + f"x{end}" * 8000) is None
    assert as_html("| a | b |\n|---|---|\n" + "| 1 | 2 |\n" * 300) is not None


def test_of_a_text_of_a_megabyte_the_first_lines_are_shown_and_the_page_says_so(tmp_path: Path) -> None:
    page = page_of(job(tmp_path, {"s1": [Text("k", "- *a* line\n" * 90_000)]}))

    assert len(page.named("em")) == 20_000 // 11
    assert "The first 19,998 of 990,000 characters." in page.text
    assert len(page.source) < 6_000_000


def test_of_very_many_texts_the_page_parses_only_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from trackhub.page import table_and_media_values

    monkeypatch.setattr(table_and_media_values, "_MAX_MARKDOWN_CHARS", 20)
    page = page_of(job(tmp_path, {"s1": [Text(f"k{n}", "a **word**") for n in range(5)]}))

    assert len(page.named("strong")) == 2
    assert page.text.count("a **word**") == 5, "twice as it was logged, three times alone"
