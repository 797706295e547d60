# SPDX-License-Identifier: Apache-2.0
"""The charts of the report page, as the values that its script draws.

`trackhub.page.render` calls it with what `collect` found. It asks `federation` for the curves across the sites. The
template makes a place for each chart, and the script of the page fills it when it comes into view.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from trackhub.job_and_run_info import FEDERATION
from trackhub.page.collect import RunData, SeriesData
from trackhub.page.federation import Band, bands, own_charts
from trackhub.page.numbers import number

__all__ = ["band_charts", "groups", "histogram_charts", "metric_charts", "own_metric_charts"]


def metric_charts(runs: Sequence[RunData], began: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return a chart for each key, with a line for each run.

    Args:
        runs: the runs of all jobs.
        began: unix seconds of the first record of each job. Times on the page count from there.
    """
    charts = []
    keys = sorted({key for run in runs if run.site != FEDERATION for key in run.metrics}, key=_by_group)
    for key in keys:
        having = [run for run in runs if run.site != FEDERATION and key in run.metrics]
        charts.append(_chart(key, [(run, run.site, run.metrics[key]) for run in having], began))
    return charts


def own_metric_charts(runs: Sequence[RunData], began: Mapping[int, float]) -> list[dict[str, Any]]:
    """Return the federation runs' charts other than bands. A chart has a line for each job, or for each job and site.

    Args:
        runs: the runs of all jobs.
        began: as for `metric_charts`.
    """
    found: dict[str, list[tuple[RunData, str, SeriesData]]] = {}
    for run in runs:
        if run.site == FEDERATION:
            for chart in own_charts(_of(runs, run.job)):
                lines = [(run, about, run.metrics[key]) for about, key in chart.lines.items()]
                found.setdefault(chart.key, []).extend(lines)
    # There are many charts about how the federation ran, so the page shows them folded.
    return [
        _chart(key, lines, began) | {"is_about_the_run": key.startswith("fl/"), "of_federation": True}
        for key, lines in found.items()
    ]


def _chart(key: str, found: Sequence[tuple[RunData, str, SeriesData]], began: Mapping[int, float]) -> dict[str, Any]:
    return {
        "type": "lines",
        "key": key,
        "lines": [_line(run, about, series, began[run.job]) for run, about, series in found],
        "nonfinite": sum(series.nonfinite for _, _, series in found),
        "says": _alt_text(key, [(about, series.last) for _, about, series in found]),
    }


def _of(runs: Sequence[RunData], job: int) -> list[RunData]:
    return [run for run in runs if run.job == job]


def _by_group(key: str) -> tuple[str, str]:
    return key.rpartition("/")[0], key


def groups(charts: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Return the charts by the first part of their keys, such as ``train``.

    Charts whose key has no first part come after them. What trackhub measures itself (``system``) comes last.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for chart in charts:
        found.setdefault(chart["key"].partition("/")[0] if "/" in chart["key"] else "", []).append(chart)
    return sorted(found.items(), key=lambda group: (group[0] == "system", not group[0], group[0]))


def _line(run: RunData, about: str, series: SeriesData, began: float) -> dict[str, Any]:
    curve = series.curve
    return {
        "job": run.job,
        "site": about,
        "n": series.count,
        "x": [int(s) if math.isfinite(s) else None for s in curve.step.tolist()],
        "t": [round(t - began, 3) for t in curve.time.tolist()],
        "y": [_digits(v) for v in curve.value.tolist()],
        "r": list(series.by_round),
        "ry": [_digits(v) if math.isfinite(v) else None for v in series.by_round.values()],
    }


def _digits(value: float) -> float:
    return float(f"{value:.9g}")


def _alt_text(key: str, last: Sequence[tuple[str, float]]) -> str:
    """Return what a chart shows, for readers who cannot see it."""
    if len(last) <= 4:
        ends = ", ".join(f"{about} ends at {number(value)}" for about, value in last)
    else:
        finite = [value for _, value in last if math.isfinite(value)]
        ends = (
            f"the last values are from {number(min(finite))} to {number(max(finite))}" if finite else "no finite value"
        )
    return f"Line chart of {key}, {len(last)} {'line' if len(last) == 1 else 'lines'}: {ends}."


def band_charts(runs: Sequence[RunData], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a chart for each key across the sites, with a curve and a band for each job."""
    found: dict[str, list[tuple[int, Band]]] = {}
    for job in range(len(names)):
        for band in bands(_of(runs, job)):
            found.setdefault(band.key, []).append((job, band))
    return [
        {
            "type": "band",
            "nonfinite": 0,
            "key": key,
            "is_logged": all(band.is_logged for _, band in of_jobs),
            "bands": [_band(job, band) for job, band in of_jobs],
            "says": f"Line chart of {key} across the sites by round: "
            + ", ".join(_band_alt_text(names[job] if len(names) > 1 else "", band) for job, band in of_jobs)
            + ".",
        }
        for key, of_jobs in found.items()
    ]


def _band(job: int, band: Band) -> dict[str, Any]:
    values = {"mean": band.mean, "low": band.low, "high": band.high}
    return {
        "job": job,
        "weighted": [None if v is None else _digits(v) for v in band.weighted],
        "r": band.rounds,
        "sites": band.sites,
        **{k: [_digits(v) for v in found] for k, found in values.items()},
    }


def _band_alt_text(name: str, band: Band) -> str:
    about = f"{name} " if name else ""
    spread = f"the sites from {number(band.low[-1])} to {number(band.high[-1])}"
    return f"{about}round {band.rounds[-1]} has a mean of {number(band.mean[-1])}, {spread}"


def histogram_charts(runs: Sequence[RunData]) -> list[dict[str, Any]]:
    """Return a chart for each key of histograms, with the last one of each run."""
    keys = sorted({key for run in runs for key in run.histograms})
    charts = []
    for key in keys:
        having = [(run, run.histograms[key]) for run in runs if key in run.histograms]
        lines: list[Mapping[str, Any]] = [
            {
                "job": run.job,
                "site": run.site,
                "step": logged.step,
                "edges": [_digits(v) for v in logged.payload.edges],
                "counts": [_digits(v) for v in logged.payload.counts],
            }
            for run, logged in having
        ]
        says = f"Histograms of {key}, the last one of {len(lines)} {'run' if len(lines) == 1 else 'runs'}."
        charts.append({"type": "histogram", "key": key, "lines": lines, "nonfinite": 0, "says": says})
    return charts
