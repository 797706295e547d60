# SPDX-License-Identifier: Apache-2.0
"""``trackhub watch``: show a job while it runs. `trackhub.watch` does the work."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import click

from trackhub.cli.output import print_error, print_lines
from trackhub.delivery.report_text import format_results
from trackhub.runnable_commands import command_for

__all__ = ["watch"]


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
def watch(path: Path) -> None:
    """Show a job while it runs: its round, its sites, and what became of their records.

    PATH is the job's folder, or a folder above, such as the simulator's workspace or that of a FLARE server. The job
    may begin later. If there are several jobs, the one that runs is shown, or else the newest. The others are named.

    On a terminal, the table is drawn again each second. Elsewhere, a line is printed when something has changed, every
    5 s at most. Above it stands once how to look at what is stored, a line for each backend.

    It ends when the job has ended and its receivers deliver nothing any more; until then, the job is "finishing". It
    also ends by Ctrl-C, which does not touch the job. The exit status is 0 if all records are delivered and nothing
    else is wrong, as in `trackhub status`. Otherwise it is 1.

    \b
    Examples:
      trackhub watch runs/cifar10_fedavg-20260101-120000
      trackhub watch /opt/flare/server/1f2e3d4c
    """
    from trackhub.watch.job_follower import JobFollower
    from trackhub.watch.show_until_end import follow

    stop = threading.Event()
    state = follow(JobFollower(path), stop)
    reports = {
        ("server" if report.side == "server" else ", ".join(report.sites) or report.side): report
        for report in state.reports
    }
    print_lines("", format_results(reports))
    found = {name: report.problems() for name, report in reports.items() if not report.is_complete()}
    for name, problems in found.items():
        print_error(f"{name}: {'; '.join(problems) or 'not all is delivered yet'}")
    if found:
        print_error(f"`{command_for('trackhub status', path)}` says more")
        sys.exit(1)
