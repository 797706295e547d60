# SPDX-License-Identifier: Apache-2.0
"""Deliver what a job left behind: continue from a sink's journal, or from a site's spool, after the job has ended."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trackhub.config import Limits
from trackhub.delivery.journal import JOURNAL_NAME
from trackhub.delivery.journal_report import read_journal_meta
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.sender import Sender
from trackhub.errors import ConfigError, SpoolError
from trackhub.run import RunStatus, Side
from trackhub.spool_layout import read_spool_info
from trackhub.spool_reader import SpoolReader

__all__ = ["FOREVER_S", "replay_journal", "replay_spool"]

Backends = Mapping[str, Mapping[str, Any]]
FOREVER_S = 10 * 365 * 86400.0
"""No limit: a replay may be interrupted at any time."""


def replay_journal(
    journal: Path,
    *,
    backends: Backends | None = None,
    from_start: bool = False,
    timeout_s: float = FOREVER_S,
    limits: Limits | None = None,
) -> DeliveryReport:
    """Deliver what is pending in a journal, and return the new report. Blocks until all is delivered or time is up.

    Each lane goes on from its confirmed cursor. A backend that the job did not use gets the whole job. It may be
    interrupted, by a signal or an exception too, and called again.

    Args:
        journal: the sink's ``trackhub.db``. The job must have ended.
        backends: name to options; by default the ones of the job, with the options that the job gave. Options given
            here for a backend of the job replace single ones of the job's.
        from_start: deliver everything again. A backend that recognises what it has stores nothing twice; for others,
            possible duplicates are counted.
        timeout_s: the longest time to try.
        limits: how much and how often.

    Raises:
        JournalError: it is no journal, or in use by a running job or another replay.
        ConfigError: a backend or an option is wrong, or a backend cannot be used as configured.
        PluginError: a backend's plugin cannot be used.
    """
    meta = read_journal_meta(journal)
    used = msgspec.json.decode(meta.get("backends", "{}"), type=dict[str, dict[str, Any]])
    chosen = used if backends is None else {name: {**used.get(name, {}), **o} for name, o in backends.items()}
    if not chosen:
        raise ConfigError(f"{journal}: the job used no backend, so name the one to deliver to")
    folder = journal.absolute().parent
    receiver = Receiver(folder, folder.parent, job=meta["job"], side=Side(meta["side"]), backends=chosen, limits=limits)
    receiver.start(from_start=from_start)
    return receiver.finish(RunStatus(meta.get("status", RunStatus.FAILED)), deadline_s=timeout_s)


def replay_spool(
    spool: Path,
    *,
    cursor: str,
    backends: Backends | None = None,
    timeout_s: float = FOREVER_S,
    limits: Limits | None = None,
) -> DeliveryReport | None:
    """Deliver what a site's spool still holds for one of its sinks, straight from the site's machine.

    What the site's own sink should have had goes on through that sink's journal. What the server should have had goes
    through a journal of its own beside the spool, into the same run: job, site and positions go on where the server's
    journal ended.

    Args:
        spool: the folder. The job must have ended.
        cursor: whose records: ``server``, ``client`` or ``local``.
        backends: name to options; for ``server`` they must be given, since a site does not know the server's.

    Returns:
        The report, or None if nothing is left for this sink.

    Raises:
        SpoolError: it is no spool, or no sink of this name reads it.
        ConfigError, PluginError, JournalError: as `replay_journal`.
    """
    info = read_spool_info(spool)
    counts = SpoolReader(spool, cursor).counts()
    if not any(count.spooled for count in counts.values()):
        return None
    beside = spool.absolute().parent
    if cursor == Side.SERVER:
        folder = beside / "replay-server"
    elif (beside / JOURNAL_NAME).exists():
        folder = beside
    else:
        raise SpoolError(f"{spool}: the journal of the site's own sink, {beside / JOURNAL_NAME}, is not there")
    journal = folder / JOURNAL_NAME
    if backends is None:
        if not journal.exists():
            raise ConfigError(f"{spool}: the server's backends are not known at the site; name one to deliver to")
        stored = read_journal_meta(journal).get("backends", "{}")
        backends = msgspec.json.decode(stored, type=dict[str, dict[str, Any]])
    receiver = Receiver(folder, beside.parent, job=info.job, side=Side(cursor), backends=backends, limits=limits)
    receiver.start()
    if cursor == Side.SERVER:
        # So that positions, by which backends recognise a record, go on where the server's own journal ended.
        receiver.continue_site(info.site, sum(count.acked for count in counts.values()))
    sender = Sender(
        spool, lambda request, _: receiver.handle(info.site, request), site=info.site, cursor=cursor, limits=limits
    )
    sender.start()
    sender.close(timeout_s)
    return receiver.finish(RunStatus.FINISHED, deadline_s=timeout_s)
