# SPDX-License-Identifier: Apache-2.0
"""Reads every record of the jobs once, and keeps what the report page shows.

`trackhub.page.render` calls it. What is kept has a limit, however large the jobs are. Curves are reduced to some
points, and only the last images, texts and tables are kept.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from trackhub.page.downsample import Curve, Series
from trackhub.query import StoredJob
from trackhub.query.tidy import flat
from trackhub.records import Artifact, Histogram, Image, Metrics, Params, Record, Summary, Table, Tags, Text

__all__ = ["Logged", "RunData", "SeriesData", "collect"]

MAX_KEYS = 2000
"""The most keys of each kind that the page shows of a site; fewer if there are many sites. It says what is missing."""

MAX_IMAGES = 6
_MAX_LINES = 20_000  # of all sites together: a browser still opens the page at once
_MIN_KEYS = 20
_MAX_PAYLOADS = 2_000  # of texts, of tables and of histograms, as above
_MIN_PAYLOADS = 5
_MIN_POINTS = 100
MAX_ARTIFACTS = 200
_MAX_ROUNDS = 5000


@dataclass(slots=True)
class Logged:
    """A payload, and the step and round at which it was logged."""

    step: int | None
    round: int | None
    time: float
    payload: Any
    count: int = 1  # how many were logged under this key


@dataclass(slots=True)
class SeriesData:
    """One key of one site, as the page draws it. The attributes are those of `Series`."""

    count: int
    nonfinite: int
    by_round: dict[int, float]
    first: float
    last: float
    low: float
    high: float
    curve: Curve


@dataclass(slots=True)
class RunData:
    """What one site logged in one job.

    Attributes:
        job: the job's place in the list of jobs.
        site: the site's name.
        records: how many records it has.
        began, ended: unix seconds of its first and its last record.
        metrics: by key.
        rounds: for each round, unix seconds of the first and the last record in it.
        params, tags, summary: the last value of each key.
        texts, tables, histograms: the last one of each key.
        images: the last ones of each key.
        artifacts: the last ones.
        left_out: how many values and payloads are not kept, since the site has too many keys.
        max_keys: the most keys of metrics, params, tags, final values and images.
        max_payloads: the most keys of texts, of tables and of histograms.
    """

    job: int
    site: str
    max_keys: int = MAX_KEYS
    max_payloads: int = MAX_KEYS
    records: int = 0
    began: float = 0.0
    ended: float = 0.0
    metrics: dict[str, SeriesData] = field(default_factory=dict)
    rounds: dict[int, tuple[float, float]] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Logged] = field(default_factory=dict)
    tables: dict[str, Logged] = field(default_factory=dict)
    histograms: dict[str, Logged] = field(default_factory=dict)
    images: dict[str, deque[Logged]] = field(default_factory=dict)
    artifacts: deque[Logged] = field(default_factory=lambda: deque(maxlen=MAX_ARTIFACTS))
    left_out: int = 0


def collect(jobs: Mapping[int, StoredJob], max_points: int) -> Iterator[RunData]:
    """Yield what each site of each job logged.

    Args:
        jobs: the jobs, by their place on the page.
        max_points: most points of a curve.

    Raises:
        JournalError: a journal cannot be read any more.
    """
    count = max(1, sum(len(job.sites) for job in jobs.values()))
    max_keys = max(_MIN_KEYS, min(MAX_KEYS, _MAX_LINES // count))
    max_payloads = max(_MIN_PAYLOADS, min(MAX_KEYS, _MAX_PAYLOADS // count))
    for number, job in jobs.items():
        for site in job.sites:
            run = RunData(number, site, max_keys, max_payloads)
            series: dict[str, Series] = {}
            for _, _, record in job.records(site):
                _take(run, series, record)
            # What is kept of all lines has a limit as well. The page draws fewer points than that.
            points = max(_MIN_POINTS, min(max_points, max_points * 500 // (count * max(1, len(series)))))
            run.metrics = {key: _finished(found, points) for key, found in series.items()}
            yield run


def _finished(found: Series, max_points: int) -> SeriesData:
    curve = found.curve(max_points)
    rounds = dict(sorted(found.by_round.items()))
    return SeriesData(found.count, found.nonfinite, rounds, found.first, found.last, found.low, found.high, curve)


def _take(run: RunData, series: dict[str, Series], record: Record) -> None:
    time, step, round_, payload = record.time, record.step, record.round, record.payload
    run.began = min(run.began, time) if run.records else time
    run.ended = max(run.ended, time)
    run.records += 1
    if round_ is not None:
        first, last = run.rounds.get(round_, (time, time))
        if round_ in run.rounds or len(run.rounds) < _MAX_ROUNDS:
            run.rounds[round_] = min(first, time), max(last, time)
    if isinstance(payload, Metrics):
        for key, value in payload.values.items():
            found = series.get(key)
            if found is None:
                if len(series) >= run.max_keys:
                    run.left_out += 1
                    continue
                found = series[key] = Series()
            found.add(step, round_, time, value)
    else:
        _take_other(run, Logged(step, round_, time, payload))


def _take_other(run: RunData, logged: Logged) -> None:
    match logged.payload:
        case Params(values):
            _take_last(run, run.params, dict(flat(values)))
        case Tags(values):
            _take_last(run, run.tags, values)
        case Summary(values):
            _take_last(run, run.summary, dict(flat(values)))
        case Image(key):
            if key in run.images or len(run.images) < run.max_keys:
                run.images.setdefault(key, deque(maxlen=MAX_IMAGES)).append(logged)
            else:
                run.left_out += 1
        case Artifact():
            run.artifacts.append(logged)
        case Text(key):
            _take_payload(run, run.texts, key, logged)
        case Table(key):
            _take_payload(run, run.tables, key, logged)
        case Histogram(key):
            _take_payload(run, run.histograms, key, logged)


def _take_last(run: RunData, kept: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if key in kept or len(kept) < run.max_keys:
            kept[key] = value
        else:
            run.left_out += 1


def _take_payload(run: RunData, kept: dict[str, Logged], key: str, logged: Logged) -> None:
    if key in kept:
        logged.count = kept[key].count + 1
    elif len(kept) >= run.max_payloads:
        run.left_out += 1
        return
    kept[key] = logged
