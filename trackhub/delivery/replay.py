# SPDX-License-Identifier: Apache-2.0
"""Deliver what a job left behind: continue from a receiver's journal, or from a site's spool, after the job has ended."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from trackhub.delivery.journal.counts import read_journal_meta, read_stream_positions
from trackhub.delivery.journal.repair import repair
from trackhub.delivery.journal.store import JOURNAL_NAME
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.sender import Sender
from trackhub.errors import ConfigError, JournalError, SpoolError
from trackhub.limits import Limits
from trackhub.run import JobInfo, RunStatus, Side
from trackhub.spool.layout import Ack, read_ack, read_spool_info, write_ack
from trackhub.spool.reading import SpoolReader

__all__ = ["AWAY", "FOREVER_S", "replay_journal", "replay_spool", "spool_journal", "spooled"]

AWAY = "replay-server"
"""The folder of the journal through which a site delivers what the server did not get."""

_log = logging.getLogger(__name__)

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
        journal: the receiver's ``trackhub.db``. The job must have ended.
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
    repair(journal)
    meta = read_journal_meta(journal)
    chosen = _choose(meta, backends)
    if not chosen:
        raise ConfigError(f"{journal}: the job used no backend, so name the one to deliver to")
    folder = journal.absolute().parent
    receiver = Receiver(
        folder, _workdir(folder), job=JobInfo(meta["job"]), side=Side(meta["side"]), backends=chosen, limits=limits
    )
    receiver.start(from_start=from_start)
    return receiver.finish(_ending(meta, RunStatus.FAILED), deadline_s=timeout_s)


def replay_spool(
    spool: Path,
    *,
    cursor: str,
    journal: Path,
    backends: Backends | None = None,
    timeout_s: float = FOREVER_S,
    limits: Limits | None = None,
) -> DeliveryReport | None:
    """Deliver what a site's spool still holds for one of its receivers.

    What the site's own receiver should have had goes on through that receiver's journal. So does what the server should have
    had where the server's journal is at hand. On the site's own machine, where it is not, it goes through a journal of
    its own beside the spool, into the same run: job, site and positions go on where the server's journal ended.

    Args:
        spool: the folder. The job must have ended.
        cursor: whose records: ``server``, ``client`` or ``local``.
        journal: what they go through; `spool_journal` says which.
        backends: name to options. By default those that the journal knows; where the server's is not at hand they must
            be given, since a site does not know the server's.

    Returns:
        The report, or None if nothing is left for this receiver.

    Raises:
        SpoolError: it is no spool, or no receiver of this name reads it.
        ConfigError, PluginError, JournalError: as `replay_journal`.
    """
    info = read_spool_info(spool)
    away = journal.parent.name == AWAY
    if journal.exists():
        repair(journal)
        if not away:
            _send_again(spool, cursor, info.site, journal)
    counts = SpoolReader(spool, cursor).counts()
    if not any(count.spooled for count in counts.values()):
        return None
    if not journal.exists():
        if not away:
            raise SpoolError(f"{spool}: the journal of the site's own receiver, {journal}, is not there")
        if backends is None:
            raise ConfigError(f"{spool}: the server's backends are not known at the site; name one to deliver to")
    meta = read_journal_meta(journal) if journal.exists() else {}
    folder = journal.absolute().parent
    chosen = _choose(meta, backends)
    receiver = Receiver(
        folder, _workdir(folder), job=JobInfo(info.job), side=Side(cursor), backends=chosen, limits=limits
    )
    receiver.start()
    if away:
        # So that positions, by which backends recognise a record, go on where the server's own journal ended.
        receiver.continue_site(info.site, sum(count.acked for count in counts.values()))
    sender = Sender(
        spool, lambda request, _: receiver.handle(info.site, request), site=info.site, cursor=cursor, limits=limits
    )
    sender.start()
    sender.close(timeout_s)
    return receiver.finish(_ending(meta, RunStatus.FINISHED), deadline_s=timeout_s)


def _send_again(spool: Path, cursor: str, site: str, journal: Path) -> None:
    """Have the streams sent from their beginning of which the receiver has lost what it had acknowledged.

    That may be what its file system lost with the power. The receiver recognises what it does have.
    """
    known = read_stream_positions(journal, site)
    for stream in SpoolReader(spool, cursor).counts():
        ack = read_ack(spool, stream, cursor)
        if ack.next_seq > known.get(stream, 0):
            _log.warning(
                "%s does not have the last %d records that it acknowledged of stream %s; what %s still has of them is "
                "sent again", journal, ack.next_seq - known.get(stream, 0), stream, spool,
            )  # fmt: skip
            write_ack(spool, stream, cursor, Ack())


def spooled(spool: Path, cursor: str) -> int:
    """Return how many records a spool still holds for one of its receivers.

    Raises:
        SpoolError: it is no spool, or no receiver of this name reads it.
    """
    return sum(count.spooled for count in SpoolReader(spool, cursor).counts().values())


def spool_journal(spool: Path, cursor: str, journals: Iterable[Path]) -> Path:
    """Return the journal through which the rest of a spool goes: the server's if it is among these, or one beside it.

    Raises:
        SpoolError: it is no spool.
    """
    beside = spool.absolute().parent
    if cursor != Side.SERVER:
        return beside / JOURNAL_NAME
    job = read_spool_info(spool).job
    for journal in journals:
        if journal.absolute().parent.name == AWAY:
            continue
        try:
            meta = read_journal_meta(journal)
        except JournalError:
            continue  # whoever asked meets it again where it is to be read
        if (meta.get("job"), meta.get("side")) == (job, Side.SERVER):
            return journal.absolute()
    return beside / AWAY / JOURNAL_NAME


def _workdir(state: Path) -> Path:
    """Return the folder in which the backends of a receiver have theirs, by the one with the receiver's journal."""
    return state.parent.parent if state.name == AWAY else state.parent


def _choose(meta: Mapping[str, str], backends: Backends | None) -> dict[str, dict[str, Any]]:
    """Return the backends to deliver to: the job's, or the given ones on top of the options that the job gave."""
    used = msgspec.json.decode(meta.get("backends", "{}"), type=dict[str, dict[str, Any]])
    return used if backends is None else {name: {**used.get(name, {}), **o} for name, o in backends.items()}


def _ending(meta: Mapping[str, str], otherwise: RunStatus) -> RunStatus:
    """Return how the job ended. A receiver that was killed did not get to say."""
    return RunStatus(meta.get("status", otherwise))
