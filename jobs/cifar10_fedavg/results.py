# SPDX-License-Identifier: Apache-2.0
"""What a finished job left behind: delivery reports and last metrics, and the tables that show them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from trackhub.config import TrackingConfig
from trackhub.delivery import DeliveryReport, read_report

__all__ = ["Outcome", "forget_outcome", "print_outcome", "print_reports", "read_outcome"]


@dataclass
class Outcome:
    """What became of a job.

    Attributes:
        result: FLARE's folder for the job.
        failure: why the job failed; None if it did not.
        reports: the delivery report of each receiver, by the name of the site where it was.
        problems: delivery reports that should be there and are not.
        metrics: the last value of each metric, by site.
        global_model: loss and accuracy (0 to 1) of the last global model on the test images.
    """

    result: Path
    failure: str | None
    reports: dict[str, DeliveryReport] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    global_model: tuple[float, float] | None = None

    @property
    def undelivered(self) -> bool:
        """Whether anything that was logged is not in every backend, or nobody knows."""
        return bool(self.problems) or any(
            report.undelivered() or report.lost() or not report.balanced for report in self.reports.values()
        )


_REPORT = Path("simulate_job", "trackhub", "delivery.json")  # below a site's folder


def forget_outcome(result: Path, summaries: Path) -> None:
    """Delete what an earlier job in the same workspace left, so that it is never taken for this one's."""
    for path in [*result.glob(f"*/{_REPORT}"), *summaries.glob("*.json")]:
        path.unlink()


def read_outcome(result: Path, summaries: Path, config: TrackingConfig, n_clients: int, failure: str | None) -> Outcome:
    """Read what the job's receivers and sites wrote.

    Args:
        result: FLARE's folder for the job.
        summaries: folder of the sites' last metrics, ``<site>.json``.
        config: says which receivers there were.
    """
    outcome = Outcome(result, failure)
    sites = [f"site-{number}" for number in range(1, n_clients + 1)]
    for receiver in [*(["server"] if config.server else []), *(sites if config.clients else [])]:
        path = result / receiver / _REPORT
        try:
            outcome.reports[receiver] = read_report(path)
        except (OSError, msgspec.DecodeError) as error:
            outcome.problems.append(f"no delivery report of {receiver}: {error}")
    for site in sites:
        path = summaries / f"{site}.json"
        if path.is_file():
            outcome.metrics[site] = json.loads(path.read_text())
    return outcome


def print_outcome(outcome: Outcome) -> None:
    """Print last metrics, delivery and how to open the results, as the last thing on the screen."""
    if outcome.metrics:
        keys = sorted({key for metrics in outcome.metrics.values() for key in metrics})
        rows = [
            (site, *(f"{metrics[key]:.4f}" if key in metrics else "-" for key in keys))
            for site, metrics in outcome.metrics.items()
        ]
        print("\nLast metrics")
        _print_table(("site", *keys), rows)
    if outcome.global_model is not None:
        loss, accuracy = outcome.global_model
        print(f"\nFinal global model: test accuracy {accuracy:.2%}, test loss {loss:.4f}")
    print_reports(outcome.reports)
    for problem in outcome.problems:
        print(f"\nDelivery unknown: {problem}")
    print(f"\nFiles of the job: {outcome.result}")
    if outcome.failure is not None:
        print(f"\nThe job failed: {outcome.failure}")


def print_reports(reports: Mapping[str, DeliveryReport]) -> None:
    """Print what was delivered, and the commands that open it.

    Args:
        reports: by the name of the site where the receiver was.
    """
    deliveries = list(_deliveries(reports))
    if deliveries:
        print("\nDelivered (confirmed of logged)")
        _print_table(("site", "receiver", "backend", "confirmed", "remarks"), deliveries)
    openings = _openings(reports.values())
    if openings:
        print("\nOpen the results")
        for opening, backend in openings.items():
            print(f"  {backend}: {opening}")


def _deliveries(reports: Mapping[str, DeliveryReport]) -> Iterable[tuple[str, ...]]:
    for receiver, report in reports.items():
        for backend, runs in sorted(report.lanes.items()):
            for site, run in sorted(runs.items()):
                counted = report.sites[site].at_site if site in report.sites else None
                remarks = [f"{reason}: {n}" for reason, n in run.rejected.items()]
                if counted is not None:
                    remarks += [f"{reason}: {n}" for reason, n in {**counted.dropped, **counted.refused}.items()]
                    remarks += [f"in the spool: {counted.spooled}"] if counted.spooled else []
                remarks += [f"pending: {run.pending}"] if run.pending else []
                if run.last_error and run.pending:
                    remarks.append(run.last_error.splitlines()[0])
                logged = f"{counted.logged:,}" if counted is not None else "?"
                yield site, receiver, backend, f"{run.confirmed:,} of {logged}", "; ".join(remarks)


def _openings(reports: Iterable[DeliveryReport]) -> dict[str, str]:
    """Return the command, URL or path that opens each run's results, and its backend; what opens several, once."""
    openings: dict[str, str] = {}
    for report in reports:
        for backend, runs in sorted(report.lanes.items()):
            for run in runs.values():
                opening = run.results and (run.results.command or run.results.url or run.results.path)
                if opening:
                    openings.setdefault(opening, backend)
    return openings


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, ["-" * width for width in widths], *rows]:
        print(("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())
