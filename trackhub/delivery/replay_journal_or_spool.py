# SPDX-License-Identifier: Apache-2.0
"""Delivers records that a job did not deliver before it ended: from a receiver's journal, or from a site's spool.

``trackhub replay`` calls it. It opens a receiver on the journal in this process. For a spool, it also starts a sender.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from trackhub import registry
from trackhub.delivery.federation.federation_run import FederationOptions
from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.journal.read_only import (
    has_last_counts,
    is_known_site,
    read_journal_meta,
    read_stream_positions,
)
from trackhub.delivery.journal.repair import repair
from trackhub.delivery.journal.swap import is_journal_left
from trackhub.delivery.journal.tables_and_rows import FEDERATION_OPTIONS, PRUNED
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import DeliveryReport
from trackhub.delivery.sender import Sender
from trackhub.errors import ConfigError, JournalError, SpoolError
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.open_without_links import find_way_out
from trackhub.operator_file import BackendRules, OperatorFile, read_operator_file
from trackhub.policy import SiteRules
from trackhub.spi import OptionMark
from trackhub.spool.acks import ack_file, read_ack
from trackhub.spool.counts import StreamCount
from trackhub.spool.layout import SpoolInfo, close_spool, has_streams, read_spool_info, set_policy
from trackhub.spool.reader_lock import hold_ended_spool
from trackhub.spool.reading import SpoolReader

__all__ = ["FOREVER_S", "NO_FILE", "Backends", "count_spooled", "journal_for_spool", "replay_journal", "replay_spool"]

Backends = Mapping[str, Mapping[str, Any]]
"""Name -> options of each backend."""

FOREVER_S = 10 * 365 * 86400.0
"""No time limit, in seconds. A replay may be interrupted at any time."""

NO_FILE = OperatorFile()
"""The strictest rules: those of a site whose operator wrote no file."""

_STAND_IN = "replay-server"
"""The folder beside a site's spool for a journal that replaces the server's journal."""

_log = logging.getLogger(__name__)


def replay_journal(
    journal: Path,
    *,
    backends: Backends | None = None,
    from_start: bool = False,
    timeout_s: float = FOREVER_S,
    limits: Limits | None = None,
    operator: OperatorFile | None = NO_FILE,
) -> DeliveryReport:
    """Deliver what is pending in a journal, and return the new report. Blocks until all is delivered or time is over.

    Each lane goes on from its confirmed cursor. A backend that the job did not use gets the whole job. A replay may be
    interrupted at any moment, and called again. A damaged journal is repaired first.

    Args:
        journal: the receiver's ``trackhub.db``. The job must have ended.
        backends: where to deliver; by default the backends of the job, with the options that the job gave. An option
            given here replaces the job's option of the same name.
        from_start: deliver everything again. A backend that recognises its records stores nothing twice. For other
            backends, the report counts possible duplicates.
        timeout_s: the longest time to try, in seconds.
        limits: sizes, pauses and waits, as in `trackhub.limits.Limits`.
        operator: the rules for the options in the journal: which hosts, folders and secrets they may name. None trusts
            them. The options in ``backends`` are always trusted.

    Raises:
        JournalError: it is not a journal, or in use by a running job or another replay.
        ConfigError: a backend or an option is wrong, a backend cannot be used as configured, a folder is not safe to
            write in, or the journal belongs to another user and ``backends`` is not given.
        PluginError: the plugin of a backend cannot be used.
    """
    _check_own_folder(journal, operator)
    repair(journal)
    meta = read_journal_meta(journal)
    chosen = _choose(meta, backends, operator, journal)
    status = _job_status(meta)
    receiver = _receiver(journal, _job(meta), Side(meta["side"]), chosen, limits, status, _federation(meta))
    receiver.start(from_start=from_start)
    return receiver.finish(status, deadline_s=timeout_s)


def replay_spool(
    spool: Path,
    *,
    cursor: str,
    journal: Path,
    backends: Backends | None = None,
    timeout_s: float = FOREVER_S,
    limits: Limits | None = None,
    operator: OperatorFile | None = NO_FILE,
) -> DeliveryReport | None:
    """Deliver what a site's spool still holds for one of its receivers, through a journal.

    If the receiver's journal is available, the records go through it. On a site's own machine the server's journal is
    not available. There, a new journal beside the spool replaces it. The records go into the same runs: job and site
    are the same, and positions continue where the server's journal ended.

    Args:
        spool: the spool's folder. The job must have ended.
        cursor: the receiver that did not get the records: ``server``, ``client`` or ``local``.
        journal: the journal that `journal_for_spool` names.
        backends: where to deliver; by default the backends that the journal names. Give them if the server's journal is
            not available, since a site does not know the server's backends.
        timeout_s: the longest time to try, in seconds.
        limits: sizes, pauses and waits, as in `trackhub.limits.Limits`.
        operator: the rules for the options in the journal, as for `replay_journal`.

    Returns:
        The report. None if nothing is left for this receiver, and its journal has the site's last counts.

    Raises:
        SpoolError: it is not a spool, no receiver of this name reads it, it cannot be read, the site's own receiver
            left no journal, or the job still runs.
        JournalError: the journal cannot be used, or is in use by a running job or another replay.
        ConfigError: a backend, an option, or the policy of the site is wrong, or the backends must be given.
        PluginError: the plugin of a backend cannot be used.
    """
    # The sender of a running job holds this lock. Two senders of one spool would both deliver the same records.
    lock = hold_ended_spool(spool, cursor)
    try:
        _check_own_folder(journal, operator)
        if operator is not None:
            _refuse_ways_out(spool.absolute(), _run_dir(journal))
        acked = _left_after_rewind(spool, cursor, journal)
        if acked is None:
            with contextlib.suppress(SpoolError):  # the mark only says that no process logs to the spool
                close_spool(spool)
            return None
        info = read_spool_info(spool)
        _add_operators_rules(spool, info)
        meta = _meta_for_spool(spool, journal, backends)
        job = _job(meta) if meta else JobInfo(info.job, info.name, info.notes, info.tags)
        status = _job_status(meta) if meta or info.open else RunStatus.FINISHED
        chosen = _choose(meta, backends, operator, journal)
        receiver = _receiver(journal, job, Side(cursor), chosen, limits, status, _federation(meta))
        receiver.start()
        try:
            if not info.open:
                receiver.assume_ended(info.site)
            if _stands_in(journal):
                # Backends recognise a record by its position, so positions go on where the server's own journal ended.
                receiver.continue_site(info.site, acked)
            sender = Sender(spool, receiver.channel(info.site), cursor=cursor, limits=limits, lock=lock)
            sender.start()
        except BaseException:
            receiver.abandon()
            raise
        sender.close(timeout_s)
        return receiver.finish(status, deadline_s=timeout_s)
    except OSError as e:
        raise SpoolError(f"cannot use the spool {spool}: {e}; this user must be able to read and write it") from e
    finally:
        lock.release()


def _add_operators_rules(spool: Path, info: SpoolInfo) -> None:
    """Add the current rules of the operator's file to the rules that the spool has kept since the job.

    No rule becomes less strict.

    Raises:
        ConfigError: the rules or the file cannot be read.
        SpoolError: the spool cannot keep them.
    """
    rules = SiteRules.from_plain(info.policy)
    if not rules.operator_folder:
        return
    operator = read_operator_file(Path(rules.operator_folder))
    now = rules.with_operator(operator.policy, operator.forbid_kinds)
    if now != rules:
        set_policy(spool, now.plain())


def _left_after_rewind(spool: Path, cursor: str, journal: Path) -> int | None:
    """Prepare the spool for a sender. Return how many of its records the receiver acknowledged.

    If the receiver's disk has lost acknowledged records, the sender will send them again. If the journal lacks the
    site's last counts, for example because the site's process died, the sender must send the counts again.

    Returns:
        The number of acknowledged records. None if there is nothing to send.
    """
    lacks_counts = False
    if is_journal_left(journal):
        repair(journal)
        if not _stands_in(journal):
            site = read_spool_info(spool).site
            _rewind_lost_streams(spool, cursor, site, journal)
            # The server has a spool for its own records. If it logged nothing, the server is not a site, and a replay
            # must not make it one.
            is_site = has_streams(spool) or is_known_site(journal, site)
            lacks_counts = is_site and not has_last_counts(journal, site)
    counts = _counts(spool, cursor)
    is_left = lacks_counts or any(count.spooled for count in counts)
    return sum(count.acked for count in counts) if is_left else None


def _meta_for_spool(spool: Path, journal: Path, backends: Backends | None) -> dict[str, str]:
    """Return what the journal says about the job. Empty if no receiver has started with this journal."""
    meta = read_journal_meta(journal) if os.path.exists(journal) else {}
    if "backends" in meta:
        return meta
    if not _stands_in(journal) and not meta:
        raise SpoolError(
            f"{spool}: the journal of the site's own receiver, {journal}, is not there; put it back, and replay again"
        )
    if backends is None:
        raise ConfigError(f"{spool}: a site does not know the server's backends; name one to deliver to with --backend")
    return {}


def _stands_in(journal: Path) -> bool:
    """Return whether this is the path of a journal that replaces the server's."""
    return journal.parent.name == _STAND_IN


def count_spooled(spool: Path, cursor: str) -> int:
    """Return how many records a spool still holds for one of its receivers. Unreadable records count as well.

    Raises:
        SpoolError: it is not a spool, no receiver of this name reads it, or its folder cannot be read.
    """
    return sum(count.spooled + count.unreadable for count in _counts(spool, cursor))


def _counts(spool: Path, cursor: str) -> list[StreamCount]:
    try:
        return list(SpoolReader(spool, cursor).counts().values())
    except OSError as e:
        raise SpoolError(f"cannot read the spool {spool}: {e}; its files must be readable for this user") from e


def journal_for_spool(spool: Path, cursor: str, journals: Iterable[Path]) -> Path:
    """Return the journal through which the rest of a spool goes.

    Args:
        spool: the spool's folder.
        cursor: the receiver that did not get the records.
        journals: the available journals, for the cursor ``server``. The server's is used if it is among them. Otherwise
            a journal beside the spool replaces it, which need not exist yet.

    Raises:
        SpoolError: it is not a spool.
    """
    beside = spool.absolute().parent
    if cursor != Side.SERVER:
        return beside / JOURNAL_NAME
    job = read_spool_info(spool).job
    for journal in journals:
        if _stands_in(journal.absolute()):
            continue
        try:
            meta = _meta_of_damaged(journal)
        except JournalError:
            continue  # the caller reads this journal later, and reports the error then
        if (meta.get("job"), meta.get("side")) == (job, Side.SERVER):
            return journal.absolute()
    return beside / _STAND_IN / JOURNAL_NAME


def _meta_of_damaged(journal: Path) -> dict[str, str]:
    """Return what a journal says about its job. If that cannot be read, repair the journal first."""
    try:
        return read_journal_meta(journal)
    except JournalError:
        repair(journal)
        return read_journal_meta(journal)


def _rewind_lost_streams(spool: Path, cursor: str, site: str, journal: Path) -> None:
    """Delete the cursor file of each stream whose acknowledged records the journal has lost.

    The sender then asks the receiver how far it got. In a power cut, the receiver's disk can lose acknowledged records.
    """
    known = read_stream_positions(journal, site)
    for stream in SpoolReader(spool, cursor).streams():
        ack = read_ack(spool, stream, cursor)
        lost = ack.next_seq - known.get(stream, 0)
        if lost > 0:
            _log.warning(
                "%s lacks the last %d records of stream %s, although it had acknowledged them. The records that are "
                "still in %s are sent again", journal, lost, stream, spool,
            )  # fmt: skip
            ack_file(spool, stream, cursor).unlink(missing_ok=True)


def _receiver(
    journal: Path,
    job: JobInfo,
    side: Side,
    backends: dict[str, dict[str, Any]],
    limits: Limits | None,
    status: RunStatus,
    federation: FederationOptions | None,
) -> Receiver:
    state_dir, run_dir = journal.absolute().parent, _run_dir(journal)
    return Receiver(
        run_dir,
        state_dir=state_dir,
        job=job,
        side=side,
        backends=backends,
        limits=limits,
        ended=status,
        federation=federation,
    )


def _federation(meta: Mapping[str, str]) -> FederationOptions | None:
    """Return what the job's federation run holds. None if the job has no such run, or nothing can be added to it."""
    if FEDERATION_OPTIONS not in meta or PRUNED in meta:  # what was pruned cannot be taken into account any more
        return None
    return msgspec.json.decode(meta[FEDERATION_OPTIONS], type=FederationOptions)


def _job(meta: Mapping[str, str]) -> JobInfo:
    return msgspec.json.decode(meta["job_info"], type=JobInfo) if "job_info" in meta else JobInfo(meta["job"])


def _run_dir(journal: Path) -> Path:
    """Return the folder in which the backends' folders are, beside the receiver's."""
    state_dir = journal.absolute().parent
    # The journal that replaces the server's is one folder deeper.
    return state_dir.parent.parent if state_dir.name == _STAND_IN else state_dir.parent


def _choose(
    meta: Mapping[str, str], backends: Backends | None, operator: OperatorFile | None, journal: Path
) -> dict[str, dict[str, Any]]:
    """Return the backends to deliver to: the given ones, or else the job's.

    A given option replaces the job's option of the same name. The maker of the journal chose the job's options. Without
    a check, the options could name any host and any file. That host would get the credentials of the person who replays
    the journal.
    """
    used = msgspec.json.decode(meta.get("backends", "{}"), type=dict[str, dict[str, Any]])
    given: Backends = {name: {} for name in used} if backends is None else backends
    if not given:
        raise ConfigError(f"{journal}: the job used no backend; name the one to deliver to with --backend")
    if operator is None:
        return {name: {**used.get(name, {}), **options} for name, options in given.items()}
    if backends is None and used:
        _check_owner(journal, meta["job"], used)
    for name in given:
        _refuse_ways_out(_run_dir(journal) / name, _run_dir(journal))
    return {name: _permitted(name, used.get(name, {}), options, operator, journal) for name, options in given.items()}


def _check_owner(journal: Path, job: str, used: Iterable[str]) -> None:
    """Check that a journal belongs to the user who replays it.

    Only the journal itself says which job it is from. Another user of the machine may have given it the id of your job.
    Its records would then go into your runs, with your login, although you named no backend.

    Raises:
        ConfigError: it belongs to another user.
    """
    owner = os.stat(journal).st_uid
    if owner != os.geteuid():
        raise ConfigError(
            f"{journal} belongs to the user with the id {owner}, and not to you. It says that it is from job {job!r}, "
            f"and that its records go into {', '.join(used)}. With your login, the records could end up in your own "
            "runs. Name the backends to deliver to with --backend. If the job was your own, give --trust-journal"
        )


def _check_own_folder(journal: Path, operator: OperatorFile | None) -> None:
    """Check the folder that holds the journal and what trackhub writes beside it, unless the job is trusted.

    Raises:
        ConfigError: something in it leads elsewhere.
    """
    if operator is not None:
        own = journal.absolute().parent
        _refuse_ways_out(own.parent if _stands_in(journal) else own, _run_dir(journal))


def _refuse_ways_out(folder: Path, run_dir: Path) -> None:
    """Check a folder that trackhub or a backend will write to. The journal's maker may have made the folder.

    Args:
        folder: the folder.
        run_dir: the job's folder. A file may have several names in there.

    Raises:
        ConfigError: something in it, such as a symbolic or a hard link, would redirect writes to another place.
    """
    if os.path.islink(folder) or not os.path.isdir(folder):
        return  # the receiver makes the folder, and follows no link in its place
    try:
        problem = find_way_out(folder, run_dir)
    except OSError as e:
        problem = f"{folder} cannot be checked: {e}"
    if problem:
        raise ConfigError(
            f"{problem}. `trackhub replay` could write to another place there, and somebody else may have made the "
            "folder. Remove what is named above, or copy the folder without links and replay the copy. If the job was "
            "your own, give --trust-journal"
        )


def _permitted(
    name: str, used: Mapping[str, Any], given: Mapping[str, Any], operator: OperatorFile, journal: Path
) -> dict[str, Any]:
    rules = operator.backends.get(name, BackendRules())
    # Options in ``given`` come from the person who starts the replay, so they need no check. Only the operator's own
    # options win over them.
    rules = msgspec.structs.replace(rules, fixed={**given, **rules.fixed})
    operator = msgspec.structs.replace(operator, backends={**operator.backends, name: rules})
    try:
        options = registry.permitted_options(name, used, operator, _run_dir(journal))
    except ConfigError as e:
        if not used:
            raise
        raise ConfigError(
            f"{journal} names options that are not trusted, since a journal may come from anybody. {e}. If the job was "
            f"your own, give --trust-journal to `trackhub replay`. Otherwise give it the option yourself: --backend "
            f"{name} --option {name}.KEY=VALUE"
        ) from e
    marks = registry.option_marks(registry.load(name))
    if any(OptionMark.PATH in marks[key] for key, value in used.items() if value and key not in rules.fixed):
        _refuse_ways_out(_run_dir(journal), _run_dir(journal))  # the backend may write anywhere in the run folder
    return options


def _job_status(meta: Mapping[str, str]) -> RunStatus:
    """Return how the job ended. Without a stored status, it was killed."""
    return RunStatus(meta.get("status") or RunStatus.KILLED)
