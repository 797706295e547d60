# SPDX-License-Identifier: Apache-2.0
"""What the sites of a job did together: curves across the sites by round, who took part, and who was slow.

`trackhub.page.render` calls it. What the job's federation run says goes before anything that is worked out here.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from trackhub.page.collect import RunData
from trackhub.run import FEDERATION, SERVER

__all__ = ["Band", "Participation", "bands", "members", "own_charts", "participation"]

MAX_BANDS = 8
_SPREAD = ("/min", "/max")


class Band(NamedTuple):
    """A curve across the sites.

    Attributes:
        key: the key of the sites' metric.
        rounds: the rounds, rising.
        mean, low, high: the values in each round.
        sites: how many sites have a value in each round; empty if the federation run does not say.
        is_logged: the federation run has these values. Otherwise they are worked out from the sites'.
    """

    key: str
    rounds: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]
    sites: list[int]
    is_logged: bool


class Participation(NamedTuple):
    """One site's part in a job.

    Attributes:
        site: its name.
        rounds: the rounds in which it logged.
        slowest: in how many rounds it took the longest; None if that is not known.
        typical_s: the median time from its first to its last record of a round, in seconds; None as above.
        factor: ``typical_s`` over the median of all sites; None as above.
    """

    site: str
    rounds: list[int]
    slowest: int | None
    typical_s: float | None
    factor: float | None


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


def own_charts(runs: Sequence[RunData]) -> list[str]:
    """Return the keys of the federation run that no band shows, such as ``fl/round_s``."""
    run = _federation(runs)
    if run is None:
        return []
    shown = {key.removesuffix("/mean") for key in run.metrics if key.endswith("/mean")}
    return [key for key in run.metrics if not (key.endswith(("/mean", *_SPREAD)) and key.rsplit("/", 1)[0] in shown)]


def _by_round(run: RunData, key: str) -> Mapping[int, float]:
    """Return the values of a key by round; of a run that logs rounds as steps, by step."""
    found = run.metrics.get(key)
    if found is None:
        return {}
    if found.by_round:
        return found.by_round
    steps = found.curve.step.tolist()
    return {int(s): v for s, v in zip(steps, found.curve.value.tolist(), strict=True) if math.isfinite(s)}


def _logged_band(run: RunData, key: str) -> Band:
    mean, low, high = (_by_round(run, f"{key}/{name}") for name in ("mean", "min", "max"))
    count = _by_round(run, f"{key}/count")
    rounds = [r for r in sorted(mean) if math.isfinite(mean[r])]
    return Band(
        key,
        rounds,
        [mean[r] for r in rounds],
        [low.get(r, mean[r]) for r in rounds],
        [high.get(r, mean[r]) for r in rounds],
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
        [len(values[r]) for r in rounds],
        is_logged=False,
    )


def participation(runs: Sequence[RunData]) -> list[Participation]:
    """Return each site's part in one job; nothing if no record has a round.

    How long a site took is the time between its own records, so that the sites' clocks need not agree. It is left out
    where there is a federation run, which knows more.
    """
    sites = [run for run in members(runs) if run.rounds]
    times = {run.site: {r: last - first for r, (first, last) in run.rounds.items()} for run in sites}
    knows = _federation(runs) is None and len(sites) > 1 and any(any(found.values()) for found in times.values())
    if not knows:
        return [Participation(run.site, sorted(run.rounds), None, None, None) for run in sites]
    typical = {site: statistics.median(found.values()) for site, found in times.items()}
    usual = statistics.median(typical.values())
    slowest = dict.fromkeys(times, 0)
    for r in {r for found in times.values() for r in found}:
        there = {site: found[r] for site, found in times.items() if r in found}
        if len(there) > 1:
            slowest[max(there, key=lambda site: there[site])] += 1
    return [
        Participation(run.site, sorted(run.rounds), slowest[run.site], t, t / usual if usual else None)
        for run in sites
        for t in [typical[run.site]]
    ]
