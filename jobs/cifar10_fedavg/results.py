# SPDX-License-Identifier: Apache-2.0
"""Prints the last screen: the sites' last metrics, what was delivered, and the commands that open the results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from trackhub.delivery import read_report

REPORT = Path("trackhub", "delivery.json")  # in a receiver's run folder


def forget(run_folders: Mapping[str, Path], summaries: Path) -> None:
    """Delete what an earlier job in the same workspace left, so that it is never taken for this one's."""
    for path in [*(folder / REPORT for folder in run_folders.values()), *summaries.glob("*.json")]:
        path.unlink(missing_ok=True)


def print_metrics(summaries: Path) -> None:
    """Print the last metrics, which each site left in ``<site>.json``."""
    sites = {path.stem: json.loads(path.read_text()) for path in sorted(summaries.glob("*.json"))}
    keys = sorted({key for metrics in sites.values() for key in metrics})
    rows = [
        [site, *(f"{metrics[key]:.4f}" if key in metrics else "-" for key in keys)] for site, metrics in sites.items()
    ]
    print_table("Last metrics", ["site", *keys], rows)


def print_delivery(run_folders: Mapping[str, Path]) -> bool:
    """Print how many of the logged records each backend has, and why it has not the others.

    Args:
        run_folders: of each receiver, by the name of its site, or ``server``.

    Returns:
        Whether every record that was logged is in every backend.
    """
    complete, rows, problems, openings = True, [], [], {}
    for receiver, folder in run_folders.items():
        try:
            report = read_report(folder / REPORT)
        except (OSError, msgspec.DecodeError) as error:
            problems.append(f"no delivery report of {receiver}: {error}")
            continue
        complete &= report.balanced and not report.undelivered() and not report.lost()
        for backend, runs in sorted(report.lanes.items()):
            for site, run in sorted(runs.items()):
                ledger = report.sites[site].at_site if site in report.sites else None
                missing = [*run.rejected.items()]
                if ledger:
                    missing += [*ledger.dropped.items(), *ledger.refused.items(), ("in the spool", ledger.spooled)]
                remarks = [f"{reason}: {n}" for reason, n in [*missing, ("pending", run.pending)] if n]
                remarks += run.last_error.splitlines()[:1] if run.pending else []
                logged = f"{ledger.logged:,}" if ledger else "?"
                rows.append([site, receiver, backend, f"{run.confirmed:,} of {logged}", "; ".join(remarks)])
                if run.results:
                    found = run.results.resolved(folder)
                    openings[found.command or found.url or found.path] = backend
    print_table("Delivered (confirmed of logged)", ["site", "receiver", "backend", "confirmed", "remarks"], rows)
    if openings:
        print("\nOpen the results")
    for opening, backend in openings.items():  # once, where one command opens several runs
        print(f"  {backend}: {opening}")
    for problem in problems:
        print(f"\nDelivery unknown: {problem}")
    return complete and not problems


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text, unless it is empty.

    Args:
        title: the line above it.
        head: the names of the columns.
        rows: one cell for each column.
    """
    if rows:
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        print(f"\n{title}")
        for row in [head, ["-" * width for width in widths], *rows]:
            print(("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())
