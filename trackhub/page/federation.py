# SPDX-License-Identifier: Apache-2.0
"""What the sites of a job did together: curves across the sites by round, who took part, and who was slow.

`chart_values` and `table_and_media_values` call it. Values in the job's federation run take precedence over values that
are worked out here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trackhub.job_and_run_info import FEDERATION, SERVER
from trackhub.page.collect import RunData

__all__ = ["Band", "OwnChart", "Participation", "bands", "members", "own_charts", "participation"]

MAX_BANDS = 8
_STATISTICS = ("mean", "min", "max", "std", "count", "weighted_mean", "nonfinite")
_FLAGS = ("fl/sampled", "fl/missing", "fl/failed")  # whether a site took part, which `participation` shows
_SAMPLED = "fl/sampled/"
_RESULT_AFTER = "fl/result_after_seconds/"
_WAITED_FOR = "fl/waited_for_seconds/"


class Band(NamedTuple):
    """A curve across the sites.

    Attributes:
        key: the key of the sites' metric.
        rounds: the rounds, rising.
        mean, low, high: the values in each round.
        weighted: the mean that weighs each site by its examples; empty if there is none.
        sites: how many sites have a value in each round; empty if the federation run does not say.
        is_logged: the federation run has these values. Otherwise they are worked out from the sites'.
    """

    key: str
    rounds: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    weighted: list[float | None]
    sites: list[int]
    is_logged: bool


class OwnChart(NamedTuple):
    """A chart of other values of the federation run, beside the bands.

    Attributes:
        key: its title.
        lines: site -> the key of its line. A line about no single site is under ``federation``.
    """

    key: str
    lines: dict[str, str]


class Participation(NamedTuple):
    """One site's part in a job.

    Attributes:
        site: its name.
        rounds: the rounds in which its result came. Without a federation run: the rounds in which it logged.
        slowest: in how many rounds it was the last; None if that is not known.
        typical_s: the median time of its rounds, in seconds, from the round's start to its result. Without a federation
            run, the time is from the site's first to its last record of the round. None if that is not known.
        factor: ``typical_s`` divided by the median of all sites; None if that is not known.
        is_logged: the values come from the federation run. Otherwise they are worked out from the sites' records.
    """

    site: str
    rounds: list[int]
    slowest: int | None
    typical_s: float | None
    factor: float | None
    is_logged: bool = False


def members(runs: Sequence[RunData]) -> list[RunData]:
    """Return the runs of sites, without those of the server and the federation."""
    return [run for run in runs if run.site not in (FEDERATION, SERVER)]


def _federation(runs: Sequence[RunData]) -> RunData | None:
    return next((run for run in runs if run.site == FEDERATION), None)


def bands(runs: Sequence[RunData]) -> list[Band]:
    """Return the curves across the sites of one job: those of the federation run, or worked out from the sites'.

    They are worked out for keys that two sites or more log once a round, such as ``val/*``. They are the mean, the
    lowest and the highest of the sites' values in each round.
    """
    run = _federation(runs)
    if run is not None:
        found = [_logged_band(run, key.removesuffix("/mean")) for key in run.metrics if key.endswith("/mean")]
        return [band for band in found if band.rounds]
    sites = members(runs)
    keys = dict.fromkeys(key for site in sites for key in site.metrics)
    return [band for key in keys if (band := _worked_out(key, sites)) is not None][:MAX_BANDS]


def own_charts(runs: Sequence[RunData]) -> list[OwnChart]:
    """Return the charts of the other values of one job's federation run, such as ``fl/round_seconds``.

    Keys that end in the name of a site become the lines of one chart. Keys about who took part are left out.
    """
    run = _federation(runs)
    if run is None:
        return []
    shown = {key.removesuffix("/mean") for key in run.metrics if key.endswith("/mean")}
    names = {site.site for site in members(runs)} | {k.removeprefix(_SAMPLED) for k in run.metrics if _SAMPLED in k}
    charts: dict[str, dict[str, str]] = {}
    for key in run.metrics:
        before, _, last = key.rpartition("/")
        if last in _STATISTICS and before in shown:
            continue
        about = next((name for name in names if key.endswith(f"/{name}")), None)
        title = key if about is None else key.removesuffix(f"/{about}")
        if title not in _FLAGS:
            charts.setdefault(title, {})[about or FEDERATION] = key
    return [
        OwnChart(title, lines) for title, lines in sorted(charts.items(), key=lambda c: (c[0].startswith("fl/"), c[0]))
    ]


def _by_round(run: RunData, key: str) -> Mapping[int, float]:
    """Return the values of a key by round. In a run that logs rounds as steps, the step counts as the round."""
    found = run.metrics.get(key)
    if found is None:
        return {}
    if found.by_round:
        return found.by_round
    steps = found.curve.step.tolist()
    return {int(s): v for s, v in zip(steps, found.curve.value.tolist(), strict=True) if math.isfinite(s)}


def _logged_band(run: RunData, key: str) -> Band:
    mean, low, high, weighted = (_by_round(run, f"{key}/{name}") for name in ("mean", "min", "max", "weighted_mean"))
    count = _by_round(run, f"{key}/count")
    rounds = [r for r in sorted(mean) if math.isfinite(mean[r])]
    return Band(
        key,
        rounds,
        [mean[r] for r in rounds],
        [low.get(r, mean[r]) for r in rounds],
        [high.get(r, mean[r]) for r in rounds],
        [weighted.get(r) for r in rounds] if weighted else [],
        [int(count[r]) if math.isfinite(count.get(r, math.nan)) else 0 for r in rounds] if count else [],
        is_logged=True,
    )


def _worked_out(key: str, sites: Sequence[RunData]) -> Band | None:
    having = [run.metrics[key] for run in sites if key in run.metrics]
    if len(having) < 2 or any(len(found.by_round) != found.count for found in having):
        return None
    rounds = sorted({r for found in having for r in found.by_round})
    values = {r: [v for found in having if math.isfinite(v := found.by_round.get(r, math.nan))] for r in rounds}
    rounds = [r for r in rounds if values[r]]
    if len(rounds) < 2:
        return None
    return Band(
        key,
        rounds,
        [statistics.fmean(values[r]) for r in rounds],
        [min(values[r]) for r in rounds],
        [max(values[r]) for r in rounds],
        [],
        [len(values[r]) for r in rounds],
        is_logged=False,
    )


def participation(runs: Sequence[RunData]) -> list[Participation]:
    """Return each site's part in one job; nothing if no record has a round.

    The federation run has the server's view. Without one, the time that a site took is measured between its own
    records, since the clocks of the sites may differ.
    """
    run = _federation(runs)
    if run is not None and any(key.startswith(_RESULT_AFTER) for key in run.metrics):
        return _as_logged(run, members(runs))
    sites = [site for site in members(runs) if site.rounds]
    times = {site.site: {r: last - first for r, (first, last) in site.rounds.items()} for site in sites}
    if run is not None or len(sites) < 2 or not any(any(found.values()) for found in times.values()):
        return [Participation(site.site, sorted(site.rounds), None, None, None) for site in sites]
    slowest = dict.fromkeys(times, 0)
    for r in {r for found in times.values() for r in found}:
        there = {site: found[r] for site, found in times.items() if r in found}
        if len(there) > 1:
            slowest[max(there, key=lambda site: there[site])] += 1
    return _timed(times, slowest, is_logged=False)


def _as_logged(run: RunData, sites: Sequence[RunData]) -> list[Participation]:
    sampled = (key.removeprefix(_SAMPLED) for key in run.metrics if key.startswith(_SAMPLED))
    names = list(dict.fromkeys([*(site.site for site in sites), *sampled]))  # a sampled site may have logged nothing
    times = {name: dict(_by_round(run, _RESULT_AFTER + name)) for name in names}
    return _timed(times, {name: len(_by_round(run, _WAITED_FOR + name)) for name in names}, is_logged=True)


def _timed(
    times: Mapping[str, Mapping[int, float]], slowest: Mapping[str, int], *, is_logged: bool
) -> list[Participation]:
    typical = {site: statistics.median(found.values()) for site, found in times.items() if found}
    usual = statistics.median(typical.values()) if typical else 0.0
    return [
        Participation(site, sorted(found), slowest[site], t, t / usual if usual and t is not None else None, is_logged)
        for site, found in times.items()
        for t in [typical.get(site)]
    ]
