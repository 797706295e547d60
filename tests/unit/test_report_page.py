# SPDX-License-Identifier: Apache-2.0
"""The report page has the right numbers, shows the federation first, and treats what sites logged as data."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trackhub
from tests.unit.readers_and_bad_backends import batch_of
from trackhub.delivery.journal.journal import Journal
from trackhub.job_and_run_info import FEDERATION
from trackhub.page.chart_values import groups
from trackhub.page.collect import RunData, _finished
from trackhub.page.downsample import Series
from trackhub.page.render import write_report
from trackhub.page.table_and_media_values import rounds_of
from trackhub.records import Metrics, Params, Payload, Record, Summary

pytest.importorskip("plotly", reason="plotly is not installed; it is in the extra report")

HOSTILE = [
    "<img src=x onerror=alert(1)>", "</script><script>alert(2)</script>", '" onmouseover="alert(3)', "{{ 7 * 7 }}",
    "<!--<script>", "javascript:alert(4)", "a\u202eb", "&lt;b&gt;",
]  # fmt: skip
VOID = {"meta", "img", "input", "br", "hr", "wbr"}


class Page(HTMLParser):
    """What a browser would see: the elements with their attributes, and the text in each of them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.cells: list[list[str]] = []
        self.headings: list[str] = []
        self.text = ""
        self._open: list[str] = []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        data = next(i for i, (tag, attrs) in enumerate(self.named("script")) if attrs.get("id") == "data")
        self.data: dict[str, Any] = json.loads(self.scripts[data])

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.cells.append([])
        if tag in ("td", "th"):
            self.cells[-1].append("")
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts[-1] += data
            return
        self.text += data
        if "td" in self._open or "th" in self._open:
            self.cells[-1][-1] += data
        if self._open and self._open[-1] in ("h1", "h2", "h3", "h4"):
            self.headings[-1] += data

    def named(self, tag: str) -> list[tuple[str, dict[str, str | None]]]:
        return [element for element in self.elements if element[0] == tag]

    def row(self, first: str) -> list[str]:
        """Return the table row that begins with this cell."""
        return next([c.strip() for c in row] for row in self.cells if row and row[0].strip() == first)

    def charts(self, kind: str) -> dict[str, dict[str, Any]]:
        return {chart["key"]: chart for chart in self.data["charts"] if chart["type"] == kind}


def job(folder: Path, sites: Mapping[str, Sequence[Any]], name: str = "job-1") -> Path:
    """Write the journal of a finished job. A payload may have a round, which is its step as well."""
    journal = Journal.open(folder / name / "trackhub" / "trackhub.db", job=name, side="server")
    for site, payloads in sites.items():
        pairs = [p if isinstance(p, tuple) else (None, p) for p in payloads]
        records = [Record(i, 1000.0 + i, r, r, payload) for i, (r, payload) in enumerate(pairs)]
        journal.append(journal.add_site(site, 1000.0), batch_of(records), {})
    journal.set_meta("status", "finished")
    journal.close()
    return folder / name


def page_of(path: Path) -> Page:
    target = path.parent / "page.html"
    write_report(path, target)
    return Page(target)


def accuracy(values: Sequence[float], skip: Sequence[int] = ()) -> list[tuple[int, Payload]]:
    return [(r, Metrics({"val/acc": v})) for r, v in enumerate(values) if r not in skip]


A, B, C = [0.1, 0.4, 0.6], [0.2, 0.5, 0.9], [0.3, 0.3, 0.3]


def test_the_band_is_that_of_numpy_over_the_sites_and_says_who_worked_it_out(tmp_path: Path) -> None:
    page = page_of(job(tmp_path, {"s1": accuracy(A), "s2": accuracy(B), "s3": accuracy(C, skip=[1])}))

    (band,) = page.charts("band")["val/acc"]["bands"]
    assert band["r"] == [0, 1, 2]
    assert np.allclose(band["mean"], [np.mean([0.1, 0.2, 0.3]), np.mean([0.4, 0.5]), np.mean([0.6, 0.9, 0.3])])
    assert (band["low"], band["high"], band["sites"]) == ([0.1, 0.4, 0.3], [0.3, 0.5, 0.9], [3, 2, 3])
    assert "This page worked them out" in page.text
    assert page.row("s3")[1] == "2 of 3"
    headings = [text for text in page.headings if text in ("Federation", "Metrics", "Delivery")]
    assert headings == ["Federation", "Metrics", "Delivery"]


def test_a_federation_run_is_shown_as_it_is_and_nothing_is_worked_out(tmp_path: Path) -> None:
    """Its numbers are not those of the sites, to tell the two apart. It knows of a site that logged nothing."""
    stored = {"val/acc/mean": 7.0, "val/acc/min": 6.0, "val/acc/max": 8.0, "val/acc/std": 0.5, "val/acc/count": 2.0}
    stored |= {"val/acc/weighted_mean": 7.5, "fl/round_seconds": 9.0, "aggregated/acc": 0.4}
    stored |= {f"fl/sampled/s{n}": 1.0 for n in (1, 2, 3)} | {f"fl/wait_seconds/s{n}": 1.0 * n for n in (1, 2)}
    stored |= {"fl/result_after_seconds/s1": 2.0, "fl/result_after_seconds/s2": 8.0, "fl/waited_for_seconds/s2": 6.0}
    runs: dict[str, Sequence[Any]] = {"s1": accuracy(A), "s2": accuracy(B)}
    runs["federation"] = [(r, Metrics(stored)) for r in range(3)]

    page = page_of(job(tmp_path, runs))

    (band,) = page.charts("band")["val/acc"]["bands"]
    assert (band["mean"], band["low"], band["high"], band["weighted"]) == ([7.0] * 3, [6.0] * 3, [8.0] * 3, [7.5] * 3)
    assert band["sites"] == [2, 2, 2]
    lines = {key: [line["site"] for line in chart["lines"]] for key, chart in page.charts("lines").items()}
    assert lines == {
        "val/acc": ["s1", "s2"],
        "aggregated/acc": ["federation"],
        "fl/round_seconds": ["federation"],
        "fl/wait_seconds": ["s1", "s2"],
        "fl/result_after_seconds": ["s1", "s2"],
        "fl/waited_for_seconds": ["s2"],
    }
    assert "as the job's federation run has them" in page.text
    assert "as the server measured it" in page.text
    assert page.row("s1")[1:4] == ["3 of 3", "2.0 s", "0"]
    assert page.row("s2")[1:4] == ["3 of 3", "8.0 s slow, 1.6 times", "3"]
    assert page.row("s3")[1:4] == ["0 of 3", "", "0"]
    assert page.row("Metric")[1:3] == ["s1", "s2"]
    assert page.data["sites"] == ["s1", "s2"]


def test_final_values_params_and_lines_are_those_that_were_logged(tmp_path: Path) -> None:
    s1 = [Params({"lr": 0.1, "opt": {"name": "sgd"}}), *[(r, Metrics({"loss": 1 / (r + 1)})) for r in range(5)]]
    s2 = [
        Params({"lr": 0.2, "opt": {"name": "sgd"}}),
        (0, Metrics({"loss": float("nan")})),
        (1, Metrics({"loss": 3.5})),
    ]

    page = page_of(job(tmp_path, {"s1": s1, "s2": s2}))

    assert page.row("Metric")[1:3] == ["s1", "s2"]
    assert page.row("loss")[1:] == ["0.2", "3.5", "0.2", "3.5", "7"]
    assert page.row("lr") == ["lr", "0.1", "0.2"]
    first, second = page.charts("lines")["loss"]["lines"]
    assert (first["x"], first["y"]) == ([0, 1, 2, 3, 4], [float(f"{1 / (r + 1):.9g}") for r in range(5)])
    assert (second["y"], second["r"], second["ry"]) == ([3.5], [0, 1], [None, 3.5])
    assert "1 value is NaN or infinite, and not drawn." in page.text


def test_what_a_script_summarized_stands_with_the_final_values(tmp_path: Path) -> None:
    """Also where it logged nothing else. The last value of a key holds."""
    s1: list[Any] = [Summary({"best": {"acc": 0.1}, "verdict": "good"}), Summary({"best": {"acc": 0.4}})]
    s2: list[Any] = [Summary({"best": {"acc": 0.3}, "verdict": "good"})]

    page = page_of(job(tmp_path, {"s1": s1, "s2": s2}))

    assert page.headings.index("Final values") + 1 == page.headings.index("Summarized values that differ")
    assert page.row("best/acc") == ["best/acc", "0.4", "0.3"]
    assert "verdict" in page.text
    assert "Metrics" not in page.headings


def test_jobs_stand_side_by_side_with_the_params_that_differ_on_top(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.2)):
        job(tmp_path, {"s1": [Params({"lr": lr, "seed": 0}), (0, Metrics({"loss": lr}))]}, name)

    page = page_of(tmp_path)

    assert page.row("Job")[:3] == ["Job", "Status", "lr"]
    assert (page.row("a")[:3], page.row("b")[:3]) == (["a", "finished", "0.1"], ["b", "finished", "0.2"])
    assert [line["job"] for line in page.charts("lines")["loss"]["lines"]] == [0, 1]
    assert page.headings.index("Jobs side by side") < page.headings.index("Metrics")


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run in which every name, key and text tries to be more than that."""
    folder = tmp_path_factory.mktemp("hostile")
    with trackhub.local(
        ["jsonl"], folder=folder / "runs", job="h", name=HOSTILE[0], notes=HOSTILE[1], tags=HOSTILE, site=HOSTILE[2]
    ) as writer:
        writer.set_round(0)
        for text in HOSTILE:
            writer.log({text: 1.0}, 0)
            writer.log_text(text, text + "\u2028\u2029")
            writer.log_table(text, [text], [[text]])
            writer.log_image(text, [[0.0, 1.0]], caption=text)
            writer.log_histogram(text, [1.0, 2.0])
        writer.log_params({text: text for text in HOSTILE})
        writer.set_tags({text: text for text in HOSTILE})
        writer.summarize({text: text for text in HOSTILE})
    write_report(folder / "runs", folder / "page.html")
    return folder / "page.html"


def test_hostile_texts_are_text_and_nothing_else(hostile: Path) -> None:
    page = Page(hostile)

    assert len(page.named("script")) == 3
    assert all(not name.startswith("on") for _, attrs in page.elements for name in attrs)
    assert all((attrs.get("src") or "data:image/png").startswith("data:image/") for _, attrs in page.named("img"))
    assert all((attrs.get("href") or "").startswith("#") for _, attrs in page.named("a"))
    assert set(HOSTILE) <= set(page.charts("lines"))
    assert all(text in page.text for text in HOSTILE)
    assert "49" not in page.row("{{ 7 * 7 }}")


def test_the_data_element_has_no_character_that_could_end_it(hostile: Path) -> None:
    source = hostile.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)

    assert data is not None
    assert set("<>&\u2028\u2029") & set(data[1]) == set()


def test_the_policy_allows_the_two_scripts_of_the_page_and_no_network(hostile: Path) -> None:
    page = Page(hostile)

    (policy,) = [a["content"] or "" for _, a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    allowed = re.findall(r"'sha256-([^']+)'", policy)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert allowed == hashes[1:]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy
    assert policy.count("unsafe-inline") == 1  # of styles


def test_an_image_that_is_none_is_left_out_and_the_page_says_so(tmp_path: Path) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, job="j") as writer:
        writer.log_image("pic", [[0.0, 1.0]])
    (blob,) = (path for path in (writer.folder / "trackhub" / "blobs").rglob("*") if path.is_file())
    blob.write_bytes(b"<svg onload=alert(1)>")

    page = page_of(writer.folder)

    assert page.named("img") == []
    assert "1 images are not shown" in page.text


def test_a_running_job_and_a_site_with_too_many_keys_are_named(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "trackhub" / "trackhub.db", job="j", side="server")
    many = [Record(i, 1.0, i, None, Metrics({f"k{i}": 1.0})) for i in range(2005)]
    for part in range(0, 2005, 1000):
        journal.append(journal.add_site("s", 1.0), batch_of(many[part : part + 1000]), {})

    page = page_of(tmp_path)
    journal.close()

    assert "The job still runs." in page.text
    assert "5 values are not shown" in page.text
    assert len(page.charts("lines")) == 2000


def test_of_hundreds_of_sites_fewer_keys_are_shown_and_the_page_says_so(tmp_path: Path) -> None:
    values = {f"k{i:03}": float(i) for i in range(150)}

    page = page_of(job(tmp_path, {f"s{n}": [Metrics(values)] for n in range(200)}))

    charts = page.charts("lines")
    assert sorted(charts) == [f"k{i:03}" for i in range(100)]
    assert {len(chart["lines"]) for chart in charts.values()} == {200}
    assert "10,000 values are not shown" in page.text
    assert "s0, s1, s10, s100, s101 and 195 more: the site sent no counts." in page.text


def test_of_very_many_rounds_a_line_keeps_its_peaks(tmp_path: Path) -> None:
    values = [float(r == 2345) for r in range(4000)]

    page = page_of(job(tmp_path, {"s1": [(r, Metrics({"k": v})) for r, v in enumerate(values)]}))

    (line,) = page.charts("lines")["k"]["lines"]
    assert len(line["r"]) == len(line["ry"]) <= 2000
    assert (line["r"][0], line["r"][-1], line["r"][line["ry"].index(1.0)]) == (0, 3999, 2345)


def test_several_paths_give_one_page_with_each_job_once(tmp_path: Path) -> None:
    a, b = (job(tmp_path / name, {"s1": accuracy(A)}, name) for name in "ab")
    job(tmp_path / "c", {"s1": accuracy(A)}, "c")

    write_report([b, a, tmp_path / "a"], tmp_path / "page.html")

    assert Page(tmp_path / "page.html").data["jobs"] == ["a", "b"]


def test_what_trackhub_captured_itself_stands_apart_from_what_the_scripts_logged(tmp_path: Path) -> None:
    for name, host in (("a", "x"), ("b", "y")):
        job(tmp_path, {"s1": [Params({"lr": 0.1, "context/machine/host": host}), (0, Metrics({"loss": 1.0}))]}, name)

    page = page_of(tmp_path)

    assert page.row("Job")[2] == "Started", "no param of the scripts differs"
    assert [heading for heading in page.headings if "differ" in heading] == ["Facts that differ"]
    assert page.row("context/machine/host")[1:] == ["x", "y"]
    assert "What trackhub captured itself: 1 facts" in page.text


def test_a_long_key_is_broken_between_its_parts_only(tmp_path: Path) -> None:
    job(tmp_path, {"s1": [Params({"model/layer_norm": 1, "a<b/c": 2})]})

    text = page_of(tmp_path).source

    assert "model/<wbr>layer_<wbr>norm" in text
    assert "a&lt;b/<wbr>c" in text


@pytest.mark.parametrize(("seconds", "is_marked"), [((12.0, 11.0), False), ((18.0, 6.0), True)])
def test_a_site_is_marked_as_slowest_only_if_it_is_clearly_slower(
    tmp_path: Path, seconds: tuple[float, float], is_marked: bool
) -> None:
    run = RunData(0, FEDERATION)
    sites = [RunData(0, "s1"), RunData(0, "s2")]
    for site, taken in zip(sites, seconds, strict=True):
        series = Series()
        for r in range(3):
            series.add(r, r, 0.0, taken)
        run.metrics[f"fl/result_after_seconds/{site.site}"] = _finished(series, 100)
    run.metrics["fl/waited_for_seconds/s1"] = run.metrics["fl/result_after_seconds/s1"]

    found = rounds_of([run, *sites])

    assert found is not None
    assert [(site["slowest"], site["mostly_slowest"], site["slow"]) for site in found["sites"]] == [
        (3, is_marked, is_marked),
        (0, False, False),
    ]


def test_the_command_writes_the_page_and_says_where_it_is(tmp_path: Path) -> None:
    path = job(tmp_path, {"s1": accuracy(A)})
    command = [sys.executable, "-m", "trackhub.cli", "report", str(path), "-o", str(tmp_path / "r.html")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (0, f"Open {tmp_path / 'r.html'} in a browser\n")
    assert "val/acc" in Page(tmp_path / "r.html").text
    with pytest.raises(trackhub.ConfigError, match="name a file in a folder that you can write to"):
        write_report(path, tmp_path / "no" / "r.html")


def test_what_a_script_logs_comes_before_what_trackhub_measures() -> None:
    charts = [{"key": key} for key in ("loss", "system/cpu", "train/loss", "val/loss", "z")]

    assert [name for name, _ in groups(charts)] == ["train", "val", "", "system"]
