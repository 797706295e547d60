# SPDX-License-Identifier: Apache-2.0
"""``trackhub replay``: deliver what a job left in its journals and spools, or a whole job into another backend."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

import click

from trackhub.cli.output import print_error, print_lines
from trackhub.config import parse_option_flags
from trackhub.delivery.journal.counts import read_journal_report
from trackhub.delivery.journal.find import find
from trackhub.delivery.replay import FOREVER_S, Backends, count_spooled, journal_for_spool, replay_journal, replay_spool
from trackhub.delivery.report import format_report
from trackhub.errors import ConfigError, JournalError, TrackhubError
from trackhub.limits import Limits
from trackhub.spool.layout import read_spool_info

__all__ = ["replay"]

T = TypeVar("T")

_REFRESH_S = 0.5


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--backend",
    multiple=True,
    metavar="NAME",
    help="Deliver to this backend; repeatable. Default: those of the job. A new one gets everything.",
)
@click.option("--option", multiple=True, metavar="NAME.KEY=VALUE", help="An option of a backend; repeatable.")
@click.option("--from-start", is_flag=True, help="Deliver again what was delivered already.")
@click.option("--timeout-s", type=float, help="Give up after so many seconds. Default: never.")
def replay(
    path: Path, backend: Sequence[str], option: Sequence[str], from_start: bool, timeout_s: float | None
) -> None:
    """Deliver what a finished job left behind. Can be interrupted and called again; then it goes on.

    PATH is a journal, a spool folder, or a folder above, such as a job's.

    What a journal holds is brought into its backends. What is left in a site's spool goes on from there, through the
    journal of the receiver that should have had it. On the machine of a site, where the server's journal is not at hand,
    it goes straight into the backends that --backend names. Limits can be set by environment variables, such as
    TRACKHUB_FLUSH_S. The exit status is 1 when something is still not delivered.
    """
    backends = _backends(backend, option)
    found = find(path)
    limit_s = FOREVER_S if timeout_s is None else timeout_s
    limits = Limits.from_mapping({}, environ=os.environ)
    journals = [journal.absolute() for journal in found.journals]
    # A journal is worked on for each site, and by itself. What its lanes lack is what they lack in the end.
    pending: dict[Path, int] = {}
    in_spools = 0
    errors: list[TrackhubError] = []
    for spool, cursor in _cursors(found.spools, errors):
        try:
            journal = journal_for_spool(spool, cursor, found.journals)
            rest = partial(
                replay_spool, spool, cursor=cursor, journal=journal, backends=backends, timeout_s=limit_s, limits=limits
            )
            brought = _with_progress(journal, rest)
            in_spools += count_spooled(spool, cursor)
        except TrackhubError as e:
            errors.append(e)
            continue
        if brought is not None:
            print_lines(f"{spool}: what the {cursor} side did not get", format_report(brought))
            pending[journal] = brought.pending()
        if journal not in journals and journal.exists() and (brought is None or from_start):
            journals.append(journal)  # the spool is named alone: an earlier replay of it got this far
    if from_start and not journals and not errors:
        raise ConfigError(
            f"{path}: --from-start needs the journal of a receiver. A spool holds only what no receiver has acknowledged; give "
            "the folder of the receiver's job, or leave --from-start out"
        )
    for journal in journals:
        try:
            work = partial(
                replay_journal, journal, backends=backends, from_start=from_start, timeout_s=limit_s, limits=limits
            )
            report = _with_progress(journal, work)
        except TrackhubError as e:
            errors.append(e)
            continue
        print_lines(f"{journal}:", format_report(report))
        pending[journal] = report.pending()
    left = in_spools + sum(pending.values())
    for error in errors:
        print_error(str(error))
    if left:
        print_error(f"{left} records are still not delivered; `trackhub replay {path}` goes on with them")
    if left or errors:
        sys.exit(1)


def _cursors(spools: list[Path], errors: list[TrackhubError]) -> Iterator[tuple[Path, str]]:
    """Yield each spool with each of its receivers; one that is none costs an error, and not the others."""
    for spool in spools:
        try:
            info = read_spool_info(spool)
        except TrackhubError as e:
            errors.append(e)
        else:
            yield from ((spool, cursor) for cursor in info.cursors)


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
    """Show how far the delivery got while ``work`` runs: on a terminal only."""
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
                    continue  # it is not there yet, or being closed
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
