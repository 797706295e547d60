# SPDX-License-Identifier: Apache-2.0
"""What the template of the report page shows, as plain values: headers, tables and media. Charts are in `chart_values`.

`trackhub.page.render` calls it with what `collect` found. It asks `federation` who took part in which round.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from trackhub.delivery.report import DeliveryReport, RunReport, SiteReport
from trackhub.delivery.report_text import format_altered, format_confirmed, format_counted, format_logged, format_status
from trackhub.job_and_run_info import FEDERATION
from trackhub.page.collect import Logged, RunData
from trackhub.page.federation import Participation, members, participation
from trackhub.page.markdown_as_html import as_html
from trackhub.page.numbers import number
from trackhub.query import StoredJob
from trackhub.query.tidy import text_of

__all__ = ["deliveries", "final_values", "job_rows", "media", "rounds_of", "settings", "shown_text"]

MAX_IMAGE_BYTES = 2 << 20
MAX_IMAGES_BYTES = 12 << 20
MAX_TABLE_ROWS = 50
SLOW = 1.5
"""A site is called slow if its typical round takes this many times as long as that of the median site.

Only such a site is highlighted as mostly the slowest. Among sites that take equally long, one is always the slowest.
"""

_CAPTURED = ("context/", "source.git.")  # `trackhub.flare.log_job_context` makes these params and tags
_MAX_TEXT_CHARS = 20_000
_MIN_TEXT_CHARS = 4000
_MAX_MARKDOWN_CHARS = 500_000
"""Of all texts together; further ones appear as they are. So many take the parser 20 s at worst, usual ones 2 s."""

_MAX_CELL_CHARS = 300
_MAX_TILES = 40
_IMAGE_TYPES = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


def label_of(run: RunData, jobs: Sequence[str]) -> str:
    """Return how the page calls a run: its site, behind its job's name if there are several jobs."""
    return run.site if len(jobs) == 1 else f"{jobs[run.job]} · {run.site}"


def job_rows(jobs: Sequence[StoredJob], names: Sequence[str], runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return a row for each job: what it is called, how it ended, when, and how large it is.

    Args:
        jobs: the jobs.
        names: what the page calls each of them.
        runs: the runs of all jobs.
    """
    rows = []
    for place, job in enumerate(jobs):
        own = [run for run in runs if run.job == place]
        began, ended = min((r.began for r in own), default=0.0), max((r.ended for r in own), default=0.0)
        rows.append(
            {
                "name": names[place],
                "id": job.id,
                "status": job.status,
                "shown_status": format_status(
                    job.status, is_complete=all(report.is_complete() for report in job.reports.values())
                ),
                "notes": shown_text(job.notes) if job.notes else None,
                "tags": job.tags,
                "began": began,
                "seconds": ended - began,
                "sites": len(members(own)),
                "rounds": len({r for run in own for r in run.rounds}),
                "records": sum(run.records for run in own),
            }
        )
    return rows


def rounds_of(runs: Sequence[RunData]) -> dict[str, Any] | None:
    """Return who took part in which round of one job, and who was slow. None if there are no rounds, or one site."""
    found = participation(runs)
    if len(found) < 2:
        return None
    rounds = sorted({r for site in found for r in site.rounds})
    shown = rounds if len(rounds) <= 60 else []
    sites = [
        {
            "name": site.site,
            "count": len(site.rounds),
            "share": 100 * len(site.rounds) / len(rounds),
            "cells": [r in there for r in shown],
            "slowest": site.slowest,
            "typical_s": site.typical_s,
            "factor": site.factor,
            "slow": _is_slow(site),
            "mostly_slowest": _is_slow(site) and site.slowest is not None and site.slowest > len(rounds) / 2,
            "absent": len(site.rounds) < len(rounds),
        }
        for site in found
        for there in [set(site.rounds)]
    ]
    return {
        "rounds": rounds,
        "shown": shown,
        "sites": sites,
        "timed": any(site.typical_s is not None for site in found),
        "is_logged": found[0].is_logged,
    }


def _is_slow(site: Participation) -> bool:
    return site.factor is not None and site.factor >= SLOW


def final_values(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return a row for each key: the last value of each run, and the lowest and the highest of these values."""
    keys = sorted({key for run in runs if run.site != FEDERATION for key in run.metrics})
    rows = []
    for key in keys:
        found = [run.metrics.get(key) for run in runs if run.site != FEDERATION]
        there = [series for series in found if series is not None]
        rows.append(
            {
                "key": key,
                "last": [None if series is None else series.last for series in found],
                "low": min(series.low for series in there),
                "high": max(series.high for series in there),
                "count": sum(series.count for series in there),
                "nonfinite": sum(series.nonfinite for series in there),
            }
        )
    return rows


def settings(
    runs: Sequence[RunData],
    names: Sequence[str],
    what: Literal["params", "tags", "summary"],
    *,
    captured: bool | None = None,
) -> dict[str, Any]:
    """Return the values that differ, with a column for each job or run, and the values that are the same everywhere.

    If the sites of each job agree, a job has a single column.

    Args:
        runs: the runs of all jobs.
        names: what the page calls each job.
        what: which of a run's values.
        captured: only those that trackhub captured itself, or only those that the scripts logged; None for all.
    """
    values = [
        {
            key: _short(text_of(v))
            for key, v in getattr(run, what).items()
            if captured is None or key.startswith(_CAPTURED) == captured
        }
        for run in runs
    ]
    having = [(run, found) for run, found in zip(runs, values, strict=True) if found]
    keys = sorted({key for _, found in having for key in found})
    differing = [key for key in keys if len({found.get(key) for _, found in having}) > 1]
    by_job: dict[int, list[dict[str, str]]] = {}
    for run, found in having:
        by_job.setdefault(run.job, []).append(found)
    agree = all(len({found.get(key) for found in job}) == 1 for job in by_job.values() for key in differing)
    if agree:
        columns = [(names[job], found[0]) for job, found in by_job.items()]
    else:
        columns = [(label_of(run, names), found) for run, found in having]
    return {
        "columns": [name for name, _ in columns],
        "differing": [(key, [found.get(key, "") for _, found in columns]) for key in differing],
        "same": [(key, having[0][1][key]) for key in keys if key not in differing],
    }


def _short(text: str, limit: int = _MAX_CELL_CHARS) -> str:
    return text if len(text) <= limit else f"{text[:limit]}…"


def deliveries(jobs: Sequence[StoredJob], names: Sequence[str]) -> dict[str, Any]:
    """Return what became of the records: a row for each receiver, site and backend, and one sentence about all."""
    rows: list[dict[str, Any]] = []
    for place, job in enumerate(jobs):
        for receiver, report in job.reports.items():
            for name, site in sorted(report.sites.items()):
                base = {"job": names[place], "receiver": receiver, "site": name, "logged": format_logged(site)}
                lanes = [(b, found[name]) for b, found in sorted(report.lanes.items()) if name in found]
                rows += [base | _lane_cells(backend, run, site) for backend, run in lanes] or [
                    base | {"backend": "none", "confirmed": "", "pending": 0, "lost": 0, "remarks": _remarks(site)}
                ]
    reports = [report for job in jobs for report in job.reports.values()]
    return {"rows": rows, "summary": _summary(reports), "good": all(report.is_complete() for report in reports)}


def _lane_cells(backend: str, run: RunReport, site: SiteReport) -> dict[str, Any]:
    remarks = (
        [f"rejected: {n:,} ({reason})" for reason, n in run.rejected.items()] + format_altered(run) + _remarks(site)
    )
    if run.trouble():
        remarks.append(_short(run.trouble(), 160))
    lost = sum(run.rejected.values())
    confirmed = format_confirmed(run)
    return {"backend": backend, "confirmed": confirmed, "pending": run.pending, "lost": lost, "remarks": remarks}


def _remarks(site: SiteReport) -> list[str]:
    counts = site.at_site
    found = [f"dropped at the site: {n:,} ({reason})" for reason, n in counts.dropped.items()] if counts else []
    found += [f"refused: {n:,} ({reason})" for reason, n in site.all_refused().items()]
    return (
        found
        + ([f"in the site's spool: {counts.spooled:,}"] if counts and counts.spooled else [])
        + format_altered(site)
        + format_counted(site)
    )


def _summary(reports: Sequence[DeliveryReport]) -> str:
    journaled = sum(site.journaled for report in reports for site in report.sites.values())
    lost, left = sum(report.lost() for report in reports), sum(report.undelivered() for report in reports)
    open_runs = any(report.interrupted for report in reports)
    if all(report.is_complete() for report in reports):
        return f"All {journaled:,} records are confirmed by every backend."
    parts = [f"{journaled:,} records arrived"]
    parts += [f"{left:,} are not delivered yet"] * bool(left) + [f"{lost:,} were dropped, refused or rejected"] * bool(
        lost
    )
    if not all(report.balanced for report in reports):
        parts.append("not all counts are known")
    if open_runs:
        parts.append("a receiver was killed before it had ended the runs")
    return "; ".join(parts) + "."


def media(jobs: Mapping[int, StoredJob], runs: Sequence[RunData], names: Sequence[str]) -> dict[str, Any]:
    """Return images, tables, texts and artifacts, and how many images are left out for the page's size.

    Args:
        jobs: the jobs, by their place on the page.
        runs: the runs of all jobs.
        names: what the page calls each job.
    """
    images, left_out = _images(jobs, runs, names)

    def each(attribute: str) -> Iterator[dict[str, Any]]:
        for key in _keys(getattr(run, attribute) for run in runs):
            for run in runs:
                logged: Logged | None = getattr(run, attribute).get(key)
                if logged is not None:
                    yield {"key": key, "run": label_of(run, names), **_place(logged), "logged": logged}

    return {
        "images": images,
        "images_left_out": left_out,
        "tables": [found | _table(found["logged"]) for found in each("tables")],
        "texts": _texts(list(each("texts"))),
        "artifacts": [
            {"run": label_of(run, names), **_place(logged), "artifact": logged.payload}
            for run in runs
            for logged in run.artifacts
        ],
    }


def shown_text(text: str, limit: int = _MAX_TEXT_CHARS, *, may_be_markdown: bool = True) -> dict[str, Any]:
    """Return a text as the page shows it: as HTML if it is Markdown, and as it is.

    Args:
        text: the text, of any length.
        limit: most characters to show. The cut is at the end of a line, where there is one.
        may_be_markdown: False shows it as it is.
    """
    shown = text
    if len(text) > limit:
        shown = text[:limit]
        shown = shown[: shown.rfind("\n", limit // 2) + 1] or shown
    html = as_html(shown) if may_be_markdown else None
    return {"text": shown, "html": html, "chars": len(shown), "all_chars": len(text)}


def _texts(found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    limit = max(_MIN_TEXT_CHARS, min(_MAX_TEXT_CHARS, _MAX_MARKDOWN_CHARS // max(1, len(found))))
    room, texts = _MAX_MARKDOWN_CHARS, []
    for one in found:
        shown = shown_text(one["logged"].payload.text, limit, may_be_markdown=room > 0)
        room -= shown["chars"]
        texts.append(one | shown)
    return texts


def _images(
    jobs: Mapping[int, StoredJob], runs: Sequence[RunData], names: Sequence[str]
) -> tuple[list[dict[str, Any]], int]:
    """Return the images by key, and how many are left out."""
    images, left_out, room = [], 0, MAX_IMAGES_BYTES
    for key in _keys(run.images for run in runs):
        tiles: list[dict[str, Any]] = []
        for run in runs:
            for logged in run.images.get(key, ()):
                data = _image(jobs[run.job], run.site, logged) if len(tiles) < _MAX_TILES else None
                if data is None or len(data) > room:
                    left_out += 1
                    continue
                room -= len(data)
                tiles.append({"run": label_of(run, names), "data": data, **_place(logged), "image": logged.payload})
        if tiles:
            images.append({"key": key, "tiles": tiles})
    return images, left_out


def _keys(found: Iterable[Mapping[str, Any]]) -> list[str]:
    return sorted({key for by_key in found for key in by_key})


def _place(logged: Logged) -> dict[str, Any]:
    return {"step": logged.step, "round": logged.round}


def _image(job: StoredJob, site: str, logged: Logged) -> str | None:
    """Return an image as a data URL. None if it is not there, unreadable, too large, or neither PNG nor JPEG."""
    path = job.blob_path(site, logged.payload.blob)
    try:
        if path is None or path.stat().st_size > MAX_IMAGE_BYTES:
            return None
        data = path.read_bytes()
    except OSError:  # another user's file, or a disk in trouble
        return None
    # The content decides, not the name: an SVG that a site calls a PNG may hold a script.
    kind = next((name for start, name in _IMAGE_TYPES if data.startswith(start)), None)
    return None if kind is None else f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _cell(value: Any) -> dict[str, Any]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return {"text": number(value) if isinstance(value, float) else _short(text_of(value)), "is_number": is_number}


def _table(logged: Logged) -> dict[str, Any]:
    rows = [[_cell(cell) for cell in row] for row in logged.payload.rows[:MAX_TABLE_ROWS]]
    first = rows[0] if rows else []
    columns = [
        {"text": column, "is_number": i < len(first) and first[i]["is_number"]}
        for i, column in enumerate(logged.payload.columns)
    ]
    return {"columns": columns, "rows": rows, "all_rows": len(logged.payload.rows)}
