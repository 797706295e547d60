# SPDX-License-Identifier: Apache-2.0
"""Draws a job's state: a table for a terminal, or one plain line, and notes that stand above both.

`show_until_end` calls it. Names, keys and errors come from sites, so they are escaped and never markup.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from trackhub.delivery.report import RUNNING
from trackhub.printable import printable
from trackhub.watch.job_state import FINISHING, JobState, LaneState, SiteState

__all__ = ["job_line", "job_notes", "job_panel"]

_ANY_WIDTH = 10_000
_MAX_METRICS = 3
_MAX_SITES = 15
_PREFERRED = ("loss", "acc", "auc", "f1", "dice", "error")
_MAX_OTHERS = 3
_STATUS_STYLE = {RUNNING: "bold cyan", FINISHING: "bold cyan", "finished": "bold green", "aborted": "bold yellow"}
_BAD = "bold red"


def job_panel(state: JobState, elapsed_s: float, log: Path | None = None) -> RenderableType:
    """Return what a terminal shows of a job.

    Args:
        state: the job.
        elapsed_s: seconds since somebody began to look.
        log: the file that has FLARE's own lines; None if the caller knows of none.
    """
    parts: list[RenderableType] = [_head(state, elapsed_s)]
    if state.sites:
        parts.append(_FittingTable(state))
    if state.problem:
        parts.append(Text(f" {printable(state.problem)}", "dim" if not state.reports else "yellow"))
    parts += [Text(f" {printable(label)}: {printable(error)}", "yellow") for label, error in _errors(state)]
    if log is not None:
        parts.append(Text(f" FLARE's own lines: {log}", "dim"))
    return Group(*parts)


def job_line(state: JobState) -> str:
    """Return a job's state as one line, for output that is not a terminal."""
    parts = [f"{printable(state.name)}: {state.shown_status()}"] if state.name else []
    rounds = [site.round for site in state.sites.values() if site.round is not None]
    if rounds:
        parts.append(f"round {max(rounds)}")
    for key in _shown_keys(state):
        found = [f"{site.name} {site.values[key]:.4g}" for site in _shown_sites(state) if key in site.values]
        parts.append(f"{printable(key)}: {printable(', '.join(found))}")
    for label, (confirmed, pending) in _totals(state).items():
        parts.append(f"{printable(label)}: {confirmed:,} confirmed, {pending:,} pending")
    if dropped := _dropped(state):
        parts.append(f"NOT DELIVERED: {_reasons(dropped)}")
    if state.problem:
        parts.append(printable(state.problem))
    return "; ".join(parts)


def job_notes(state: JobState) -> list[str]:
    """Return how to look at the results while the job runs, and a line that names the other jobs in the folder."""
    notes = [] if state.has_ended() else [*state.openings]
    if state.others:
        more = f" and {len(state.others) - _MAX_OTHERS:,} more" if len(state.others) > _MAX_OTHERS else ""
        names = printable(", ".join(state.others[:_MAX_OTHERS]))
        notes.append(f"other jobs here: {names}{more}; give a job's own folder to watch it")
    return notes


def _head(state: JobState, elapsed_s: float) -> Text:
    minutes, seconds = divmod(int(elapsed_s), 60)
    head = Text(f" {printable(state.name) or 'waiting for the first record'}", "bold")
    if state.name:
        head.append(f"   {state.shown_status()}", _STATUS_STYLE.get(state.status, _BAD))
    head.append(f"   {minutes}:{seconds:02}", "dim")
    return head


class _FittingTable:
    """The table of sites, with as many columns as the terminal has room for."""

    def __init__(self, state: JobState) -> None:
        self._state = state

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        keys, backends = _shown_keys(self._state), list(_totals(self._state))
        # The columns that people need least go first: metrics from the last one, the step, what was logged, backends.
        choices = [(keys[:n], ["step", "logged"], backends) for n in range(len(keys), 0, -1)]
        choices += [(keys[:1], ["logged"], backends), (keys[:1], [], backends), ([], [], backends), (keys[:1], [], [])]
        for choice in [*choices, ([], [], [])]:
            table = _table(self._state, *choice)
            if Measurement.get(console, options.update(max_width=_ANY_WIDTH), table).maximum <= options.max_width:
                break
        yield table


def _table(state: JobState, keys: Sequence[str], counts: Sequence[str], backends: Sequence[str]) -> Table:
    """Return the table of sites.

    Args:
        state: the job.
        keys: the metrics to show.
        counts: which of ``step`` and ``logged`` to show.
        backends: the backends to show.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="dim", padding=(0, 1))
    table.add_column("site", no_wrap=True, max_width=24)
    names = ["round", *(["step"] if "step" in counts else []), *map(printable, keys)]
    names += [*(["logged"] if "logged" in counts else []), *map(printable, backends)]
    for name in names:
        # A text, since rich reads markup in a string: the key ``loss[/x]`` would raise.
        table.add_column(Text(name), justify="right", no_wrap=True, max_width=30)
    table.add_column("not delivered", no_wrap=True, max_width=30)
    sites = _shown_sites(state)
    for site in sites:
        table.add_row(
            Text(printable(site.name)),
            _number(site.round),
            *([_number(site.step)] if "step" in counts else []),
            *(f"{site.values[key]:.4g}" if key in site.values else "-" for key in keys),
            *([_number(site.logged)] if "logged" in counts else []),
            *(_lane(site.lanes.get(backend)) for backend in backends),
            Text(_reasons(site.dropped), _BAD) if site.dropped else Text("-", "dim"),
        )
    if (more := len(state.sites) - len(sites)) > 0:
        table.add_row(Text(f"and {more:,} more", "dim"))
    return table


def _lane(lane: LaneState | None) -> Text:
    if lane is None:
        return Text("-", "dim")
    text = Text(f"{lane.confirmed:,}", _BAD if lane.state in ("stopped", "unfinished") else "green")
    if lane.pending:
        text.append(f" +{lane.pending:,} pending", "yellow")
    return text


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _shown_sites(state: JobState) -> list[SiteState]:
    """Return the sites to show. Of many sites, these are the ones with the most records dropped or pending."""

    def trouble(site: SiteState) -> int:
        return sum(site.dropped.values()) * 1_000_000 + sum(lane.pending for lane in site.lanes.values())

    names = {site.name for site in sorted(state.sites.values(), key=trouble, reverse=True)[:_MAX_SITES]}
    return [site for name, site in state.sites.items() if name in names]


def _shown_keys(state: JobState) -> list[str]:
    """Return the keys of the metrics to show: what most sites have, and people look at first, such as a loss."""
    counts = Counter(key for site in state.sites.values() for key in site.values)

    def group(key: str) -> int:
        return next((i for i, word in enumerate(_PREFERRED) if word in key.lower()), len(_PREFERRED))

    keys = sorted(
        (key for key in counts if not key.startswith(("system/", "fl/"))), key=lambda k: (-counts[k], len(k), k)
    )
    # One of each group first, so that three losses do not hide the accuracy.
    taken: Counter[int] = Counter()
    ranked = []
    for key in keys:
        ranked.append((taken[group(key)], group(key), key))
        taken[group(key)] += 1
    return [key for _, _, key in sorted(ranked)[:_MAX_METRICS]]


def _totals(state: JobState) -> dict[str, tuple[int, int]]:
    """Return backend -> the confirmed and the pending records of all sites."""
    totals: dict[str, tuple[int, int]] = {}
    for site in state.sites.values():
        for label, lane in site.lanes.items():
            confirmed, pending = totals.get(label, (0, 0))
            totals[label] = (confirmed + lane.confirmed, pending + lane.pending)
    return dict(sorted(totals.items()))


def _dropped(state: JobState) -> dict[str, int]:
    total: Counter[str] = Counter()
    for site in state.sites.values():
        total.update(site.dropped)
    return dict(total)


def _errors(state: JobState) -> Sequence[tuple[str, str]]:
    """Return an error of each backend that fails."""
    found = {
        label: lane.error.strip().splitlines()[0][:160]
        for site in state.sites.values()
        for label, lane in site.lanes.items()
        if lane.error.strip()
    }
    return sorted(found.items())


def _reasons(counts: dict[str, int]) -> str:
    return ", ".join(f"{number:,} {printable(reason)}" for reason, number in sorted(counts.items()))
