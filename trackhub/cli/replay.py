# SPDX-License-Identifier: Apache-2.0
"""``trackhub replay``: deliver what a job left in its journals and spools, or a whole job into another backend.

`trackhub.delivery.replay_journal_or_spool` does the work, for one journal or spool at a time.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import click

from trackhub.cli.output import print_error, print_json, print_lines
from trackhub.cli.status import journal_status
from trackhub.config import parse_option_flags
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.report_builder import read_journal_report
from trackhub.delivery.replay_journal_or_spool import (
    FOREVER_S,
    NO_FILE,
    Backends,
    count_spooled,
    journal_for_spool,
    replay_journal,
    replay_spool,
)
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.report_text import format_report
from trackhub.errors import ConfigError, JournalError, TrackhubError
from trackhub.limits import Limits
from trackhub.operator_file import OperatorFile, read_operator_file
from trackhub.runnable_commands import command_for
from trackhub.spool.layout import read_spool_info

__all__ = ["replay"]

JSON_VERSION = 1
"""Version of the JSON document. New keys do not raise it. No key is removed, and none changes its meaning."""

T = TypeVar("T")

_REFRESH_S = 0.5


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    multiple=True,
    metavar="NAME",
    help="Deliver to this backend; repeatable. Default: the job's backends. A new backend gets everything.",
)
@click.option("--option", multiple=True, metavar="NAME.KEY=VALUE", help="An option of a backend; repeatable.")
@click.option("--from-start", is_flag=True, help="Deliver again what was delivered already.")
@click.option(
    "--workspace",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Read the operator's file local/trackhub.toml in this workspace of a FLARE site.",
)
@click.option(
    "--trust-journal",
    is_flag=True,
    help="Use the options and backends in the journal as they are, and follow links in the job's folder: the job was "
    "your own.",
)
@click.option("--timeout-s", type=click.FloatRange(min=0), help="Give up after so many seconds. Default: never.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON; its keys are stable.")
def replay(
    path: Path,
    backend: Sequence[str],
    option: Sequence[str],
    from_start: bool,
    workspace: Path | None,
    trust_journal: bool,
    timeout_s: float | None,
    as_json: bool,
) -> None:
    """Deliver what a finished job did not deliver. You can interrupt it; called again, it goes on.

    PATH is a journal, a spool folder, or a folder above, such as a job's.

    What a journal holds goes into its backends. Records that are still in a site's spool go through the journal of the
    receiver that lacks them. On a site's own machine, where the server's journal is not available, they go straight
    into the backends that --backend names.

    The options in a journal are restricted, as a job's options are at a provisioned site. They may name the job's own
    folder, and the hosts that the environment or the operator's file names. What --option says is not restricted; only
    values that the operator has fixed win over it.

    The JSON document is {"version": 1, "journals": [...], "undelivered": N, "errors": [...]}. journals has each journal
    that records went through, as in `trackhub status --json`.

    Environment variables set limits, such as TRACKHUB_FLUSH_S. The exit status is 1 if something is still not
    delivered, or a run is not ended. Problems that no replay can mend are printed, and do not change the exit status.
    `trackhub status` exits with 1 for them.
    """
    backends = _backends(backend, option)
    found = find(path)
    operator = NO_FILE if workspace is None else read_operator_file(workspace / "local")
    work = _Work(
        found.journals,
        backends,
        from_start,
        FOREVER_S if timeout_s is None else timeout_s,
        None if trust_journal else operator,
    )
    work.errors += found.unreadable
    try:
        for spool, cursor in work.receivers(found.spools):
            work.deliver_spool(spool, cursor)
        if from_start and not work.journals and not work.errors:
            raise ConfigError(
                f"{path}: --from-start needs the journal of a receiver. A spool holds only what no receiver has "
                "acknowledged. Give the folder of the receiver's job, or leave --from-start out"
            )
        for journal in work.journals:
            work.deliver_journal(journal)
    finally:
        if as_json:
            print_json({"version": JSON_VERSION, **work.plain()})
        else:
            work.show()  # also what was delivered before an interruption
    if not as_json and (looked := work.nothing_to_do()):
        print_lines("There is nothing to deliver. Looked at", *looked)
    for error in work.errors:
        print_error(str(error))
    problems, left_over = work.problems()
    for problem in problems:
        print_error(problem)
    if left := work.left():
        print_error(
            f"{left} records are still not delivered; `{command_for('trackhub replay', path)}` goes on with them"
        )
    if left or left_over or work.errors:
        sys.exit(1)


class _Work:
    """Delivers spools and journals one after the other, and then prints the report of each journal.

    After an error with one spool or journal, the others are still delivered.

    Attributes:
        journals: the journals to deliver after the spools.
        errors: what went wrong.
    """

    def __init__(
        self,
        journals: Sequence[Path],
        backends: Backends | None,
        from_start: bool,
        timeout_s: float,
        operator: OperatorFile | None,
    ) -> None:
        """Prepare the work.

        Args:
            journals: the journals at hand.
            backends: where to deliver; None for the backends of each job.
            from_start: deliver again what was delivered already.
            timeout_s: the longest time for each spool and journal, in seconds.
            operator: what the options in a journal may reach; None trusts them.
        """
        self.journals = [journal.absolute() for journal in journals]
        self.errors: list[TrackhubError] = []
        self._at_hand = tuple(self.journals)
        self._backends = backends
        self._from_start = from_start
        self._timeout_s = timeout_s
        self._operator = operator
        self._limits = Limits.from_mapping({}, environ=os.environ)
        # The last report of each journal. What is left of several spools may go through the same journal.
        self._reports: dict[Path, DeliveryReport] = {}
        self._from_spools: dict[Path, list[str]] = {}
        self._in_spools = 0
        self._done: list[str] = []

    def receivers(self, spools: Sequence[Path]) -> Iterator[tuple[Path, str]]:
        """Yield each spool with each of its receivers."""
        for spool in spools:
            try:
                cursors = read_spool_info(spool).cursors
            except TrackhubError as error:
                self.errors.append(error)
            else:
                yield from ((spool, cursor) for cursor in cursors)

    def deliver_spool(self, spool: Path, cursor: str) -> None:
        """Deliver what a spool still holds for one of its receivers."""
        try:
            journal = journal_for_spool(spool, cursor, self._at_hand)
            report = _with_progress(
                journal,
                partial(
                    replay_spool,
                    spool,
                    cursor=cursor,
                    journal=journal,
                    backends=self._backends,
                    timeout_s=self._timeout_s,
                    limits=self._limits,
                    operator=self._operator,
                ),
            )
            self._in_spools += count_spooled(spool, cursor)
        except TrackhubError as error:
            self.errors.append(error)
            return
        if report is not None:
            self._reports[journal] = report
            self._from_spools.setdefault(journal, []).append(f"  {spool}: what the {cursor} side did not get")
        else:
            self._done.append(f"  {spool}: the {cursor} side has had all of it")
        if journal not in self.journals and os.path.exists(journal) and (report is None or self._from_start):
            self.journals.append(journal)  # an earlier replay of this spool has made it, and may have left records

    def deliver_journal(self, journal: Path) -> None:
        """Deliver what is pending in a journal."""
        try:
            report = _with_progress(
                journal,
                partial(
                    replay_journal,
                    journal,
                    backends=self._backends,
                    from_start=self._from_start,
                    timeout_s=self._timeout_s,
                    limits=self._limits,
                    operator=self._operator,
                ),
            )
        except TrackhubError as error:
            self.errors.append(error)
            return
        self._reports[journal] = report

    def show(self) -> None:
        """Print the last report of each journal, once."""
        for journal, report in self._reports.items():
            print_lines(f"{journal}:", *self._from_spools.get(journal, ()), format_report(report))

    def plain(self) -> dict[str, Any]:
        """Return as plain values what was delivered and what is left."""
        errors = [str(error) for error in self.errors]
        return {
            "journals": [journal_status(journal) for journal in self._reports],
            "undelivered": self.left(),
            "errors": errors,
        }

    def nothing_to_do(self) -> list[str]:
        """Return the spools and journals that were looked at, if none of them had anything to deliver."""
        return [] if self._reports or self.errors else self._done

    def problems(self) -> tuple[list[str], bool]:
        """Return the problems that no replay can mend, and whether a replay has more to do."""
        problems, is_left = [], False
        for journal, report in self._reports.items():
            left = report.left_over()
            problems += [f"{journal}: {problem}" for problem in report.problems() if problem not in left]
            is_left = is_left or bool(left)
        return problems, is_left

    def left(self) -> int:
        """Return how many records are still not delivered."""
        return self._in_spools + sum(report.pending() for report in self._reports.values())


def _backends(names: Sequence[str], options: Sequence[str]) -> Backends | None:
    given = parse_option_flags(options)
    if not names:
        if given:
            raise ConfigError(f"--option is given for {', '.join(given)}, but no --backend; name it as well")
        return None
    unknown = given.keys() - set(names)
    if unknown:
        raise ConfigError(f"--option is given for {', '.join(sorted(unknown))}, which no --backend names")
    return {name: given.get(name, {}) for name in names}


def _with_progress(journal: Path, work: Callable[[], T]) -> T:
    """Run ``work`` and return its result. On a terminal, show how far the delivery is meanwhile.

    Args:
        journal: the journal that the records go through.
        work: what delivers them.
    """
    if not sys.stderr.isatty():
        return work()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    done = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def follow() -> None:
            tasks = {}
            while not done.wait(_REFRESH_S):
                try:
                    report = read_journal_report(journal)
                except JournalError:
                    continue  # the journal does not exist yet, or is being closed
                for lane, runs in report.lanes.items():
                    total = sum(site.journaled for site in report.sites.values())
                    settled = sum(run.confirmed + sum(run.rejected.values()) for run in runs.values())
                    if lane not in tasks:
                        tasks[lane] = progress.add_task(lane, total=total)
                    progress.update(tasks[lane], total=total, completed=settled)

        watcher = threading.Thread(target=follow, daemon=True)
        watcher.start()
        try:
            return work()
        finally:
            done.set()
            watcher.join()
