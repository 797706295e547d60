# SPDX-License-Identifier: Apache-2.0
"""Steps of a receiver's start and end: what it stores in its journal about the job, and how it ends its lanes.

`trackhub.delivery.receiver` calls them. A replay and a report need what is stored here.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from trackhub.delivery.job_sites import JobSites
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import EXPECTED_SITES, SILENCE_S, SITES_WITHOUT_SENDER
from trackhub.delivery.lane.lane import Lane
from trackhub.delivery.report import DeliveryReport, report_without_counts
from trackhub.errors import JournalError
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.runnable_commands import command_for

__all__ = ["END_S", "end_lanes", "make_report", "store_start"]

END_S = 1.0
"""How long a receiver waits for a locked journal, in seconds, to store how the job and its runs ended."""

_log = logging.getLogger(__name__)


def store_start(
    journal: Journal,
    *,
    job: JobInfo,
    run_dir: Path,
    backends: Mapping[str, Mapping[str, Any]],
    status: str,
    silence_s: float,
) -> None:
    """Store what a later replay or report must know of the job, the run folder and the backends.

    Args:
        journal: where to store it.
        job: the job.
        run_dir: the job's run folder, absolute.
        backends: name -> options of each backend, as they were given. A replay resolves their secrets anew.
        status: how the job ended or will end; empty if that is not known yet.
        silence_s: ``limits.silence_s``.

    Raises:
        JournalError: the journal cannot be written.
    """
    folder = journal.path.parent
    inside = folder.is_relative_to(run_dir)
    known = msgspec.json.decode(journal.meta().get("backends", "{}"), type=dict[str, dict[str, Any]])
    journal.set_facts(
        {
            "job_info": msgspec.json.encode(job).decode(),
            # Relative where possible, so that a folder that was moved still leads to its results.
            "run_dir": os.path.relpath(run_dir, folder) if inside else str(run_dir),
            "backends": msgspec.json.encode({**known, **backends}).decode(),
            # The status is empty while the job runs. If it is still empty afterwards, the job was killed.
            "status": status,
            SILENCE_S: str(silence_s),
        }
    )


def end_lanes(
    journal: Journal, lanes: Iterable[Lane], by_site: Mapping[str, RunStatus], otherwise: RunStatus, deadline_s: float
) -> None:
    """Make the lanes deliver what is left, and end. Blocks up to the deadline, plus a second per lane that hangs.

    Args:
        journal: where the lanes store how their runs ended.
        lanes: all lanes of the receiver.
        by_site: site -> the status of its run.
        otherwise: the status of the runs whose sites are not in ``by_site``.
        deadline_s: the longest time for all lanes together, in seconds.
    """
    deadline, lanes = time.monotonic() + deadline_s, list(lanes)
    for lane in lanes:
        lane.begin_finish(by_site, otherwise, deadline_s)
    for lane in lanes:
        if not lane.join(deadline - time.monotonic()):
            _log.warning(
                "backend %s does not return from a call. Its records stay in the journal. Deliver them with "
                "`%s`", lane.name, command_for("trackhub replay", journal.path.parent),
            )  # fmt: skip
    # From here on, all waits together take a second at most. A second for each run would be minutes with many runs.
    journal.limit_waits(time.monotonic() + END_S)
    _store_ends(journal, lanes)


def _store_ends(journal: Journal, lanes: Iterable[Lane]) -> None:
    """Store how the runs of all lanes ended, in one transaction."""
    ends = {key: end for lane in lanes for key, end in lane.unstored_ends().items()}
    if not ends:
        return
    try:
        journal.save_runs(ends)
    except JournalError as e:
        _log.warning("the journal cannot store how %d runs ended, and why records are pending: %s", len(ends), e)


def make_report(
    journal: Journal, lanes: Iterable[Lane], status: RunStatus, *, sites: JobSites, job: JobInfo, side: Side
) -> DeliveryReport:
    """Store how the job ended, and return the report. If the journal cannot be read, the report says so.

    Args:
        journal: where to store it.
        lanes: all lanes of the receiver.
        status: how the job ended.
        sites: the job's sites.
        job: the job.
        side: where the receiver is.
    """
    facts: dict[str, str] = {"status": status}
    for fact, names in ((EXPECTED_SITES, sites.known()), (SITES_WITHOUT_SENDER, sites.without_sender)):
        if names:
            facts[fact] = msgspec.json.encode(sorted(names)).decode()
    try:
        journal.set_facts(facts)
    except JournalError as e:
        _log.warning("the journal cannot store how the job ended (%s): %s", status, e)
    try:
        return journal.report([lane.name for lane in lanes], facts)
    except JournalError as e:
        _log.warning(
            "the report has no counts, since the journal cannot be read: %s. Run `%s`, which repairs a "
            "damaged journal", e, command_for("trackhub replay", journal.path.parent),
        )  # fmt: skip
        return report_without_counts(job, side, status, str(e))
