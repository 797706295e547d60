# SPDX-License-Identifier: Apache-2.0
"""How far a lane got with one run: the written and the confirmed cursor, and the counts up to them.

`RunDelivery` and `EntryReader` tell the `Cursor` what became of each record. The `Cursor` keeps its state in the
journal, so that a later lane goes on from there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.journal.tables_and_rows import Progress, RunState, Shift
from trackhub.delivery.lane.describe_record import name_of
from trackhub.errors import JournalError, PermanentError
from trackhub.spi import Confirmation, Entry, Redelivery, Rejection

__all__ = ["Cursor"]

_ANNOUNCED = frozenset({Redelivery.AT_LEAST_ONCE, Redelivery.RESUMABLE})
_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Counts:
    """What became of the records that were read since the last confirmation.

    Attributes:
        stored: how many records the backend has stored.
        doubtful: how many of the stored records the backend may have had before: possible duplicates.
        rejected: reason -> how many records were rejected for it.
        altered: alteration -> how many records needed it.
    """

    stored: int = 0
    doubtful: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    altered: Counter[str] = field(default_factory=Counter)


class Cursor:
    """How far one lane got with one run, its possible duplicates and its counts. Used by one thread at a time.

    ``written`` and ``confirmed`` are ids of journal rows. Each includes that row and all rows before it. 0 means
    that no row is included.

    The journal keeps both ids and ``progress``. These methods store them, all three together:

    - `announce`: rows are handed over next. After a crash, a later lane must know which records the backend may have.
    - `confirm`: the backend confirmed what was written. Only now the counts become part of ``progress``. So records
      that are handed over again after a crash are counted once.
    - `reject_at_backend`: a resumable backend rejected records.
    - `check_held`: the run holds records that this journal has lost. So later records get higher positions there.
    - `note_error`: the backend begins to fail.
    - `note_blocked`: one record holds up all later ones.
    - `start_over`: the run is written again from its first record.
    - `end`: nothing more is delivered to the run. At the end of the job, the lane takes `state` instead, and the states
      of all runs are stored together.

    Attributes:
        lane, site_id, site: the lane and the site whose run this is.
        written: the rows up to here were handed over by this lane, or confirmed by an earlier one.
        confirmed: all records up to here are confirmed or rejected, except for those in ``progress.aside``. A later
            lane goes on from here.
        progress: the counts up to ``confirmed``, the run's state, its last error.
        left_out: position -> entry that the last confirmation left out.
        must_rebuild: an earlier lane wrote records of the run, and its backend can only write the run again from its
            first record.
    """

    def __init__(self, journal: Journal, lane: str, site_id: int, site: str, redelivery: Redelivery) -> None:
        """Take the state from the journal.

        Args:
            journal: where the state is kept.
            lane: the lane's name.
            site_id: the site's id in the journal.
            site: the site's name, for messages.
            redelivery: what writing a record a second time does to the backend.

        Raises:
            JournalError: the journal cannot be read.
        """
        self.lane = lane
        self.site_id = site_id
        self.site = site
        self._journal = journal
        self._redelivery = redelivery
        written, self.confirmed, self.progress = journal.run_state(lane, site_id)
        self.must_rebuild = redelivery is Redelivery.REBUILD and self.confirmed > 0
        if self.must_rebuild and self.progress.state != "finished":
            # Reset now, not when this run is opened. The lane may end before it opens this run. It would then store the
            # old state, and records of a half-written run would count as delivered.
            self.confirmed, self.progress = 0, self._empty_progress()
        self.written = self.confirmed
        self._ever_written = max(written, self.confirmed)  # by this lane or an earlier one
        self._announced = self.confirmed
        # The backend may have the records before this position already.
        self._doubted_to = max((shift.doubted_to for shift in self.progress.shifts), default=0)
        self._stored_to = self.progress.stored_to
        self._since = _Counts()
        self._has_said_blocked = False
        self.left_out: dict[int, Entry] = {}

    def resume_from(self) -> int:
        """Return the position of the first record that is not confirmed.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._position_after(self.confirmed)

    def shift_of(self, row: int) -> int:
        """Return, for a row's records, the position at the backend minus the position in the journal."""
        return sum(shift.by for shift in self.progress.shifts if row > shift.after)

    def _position_after(self, row: int) -> int:
        """Return the position, at the backend, of the first record after a row."""
        return self._journal.position_after(self.site_id, row) + self.shift_of(row + 1)

    def has_unconfirmed_rows(self) -> bool:
        """Return whether the journal has rows that are not confirmed.

        Raises:
            JournalError: the journal cannot be read.
        """
        return self._journal.has_rows_after(self.site_id, self.confirmed)

    def announce(self, row: int) -> None:
        """Store that the rows up to this one are handed over next: after a crash the backend may have their records.

        Does nothing for a ``rebuild`` backend. Does nothing for an ``idempotent`` one either, unless the SDK alone
        confirmed some of the run's records.

        Raises:
            JournalError: the journal cannot be written. Hand over nothing then.
        """
        if self._announced < row and (self._redelivery in _ANNOUNCED or self._trusts_client()):
            self._store(row)
            self._announced = row
            self._ever_written = max(self._ever_written, row)

    def count_stored(self, entries: Sequence[Entry]) -> None:
        """Count entries that the backend stored. They are confirmed later, by `confirm`."""
        if not entries:
            return
        self._since.stored += len(entries)
        self._stored_to = max(self._stored_to, entries[-1].position + 1)
        if entries[0].position < self._doubted_to:
            self._since.doubtful += sum(e.position < self._doubted_to for e in entries)

    def count_held(self, position: int) -> None:
        """Count a record that is not written again: the opened run holds it, or the backend rejected it."""
        if (reason := self.progress.rejected_at.get(position)) is not None:
            self.count_rejected(reason, 1)
            return
        self._since.stored += 1
        self._stored_to = max(self._stored_to, position + 1)

    def leave_out(self, entries: Mapping[int, Entry]) -> None:
        """Note the entries that the next confirmation does not cover.

        If the previous confirmation left out an entry, and ``entries`` does not have it, that entry counts as stored
        now.

        Args:
            entries: position -> entry that the backend has not stored yet.
        """
        before, self.left_out = self.left_out, dict(entries)
        self.count_stored([before[position] for position in sorted(before.keys() - entries.keys())])
        new = entries.keys() - before.keys()
        self._since.stored -= len(new)
        self._since.doubtful -= sum(position < self._doubted_to for position in new)

    def count_altered(self, names: Iterable[str]) -> None:
        """Count the alterations that a record needed."""
        self._since.altered.update(names)

    def count_rejected(self, reason: str, records: int) -> None:
        """Count records that are never delivered. The caller has logged why."""
        self._since.rejected[reason] += records

    def reject(self, rejection: Rejection) -> None:
        """Count a record that is never delivered. The first one of each reason is logged."""
        reason = rejection.reason
        if not self._since.rejected[reason] and reason not in self.progress.rejected:
            _log.warning(
                "backend %s, run %s: record %d is rejected (%s: %s); the delivery report counts the further records "
                "that are rejected for this reason",
                self.lane, self.site, rejection.position, reason, rejection.detail,
            )  # fmt: skip
        self.count_rejected(reason, 1)
        self.note_unblocked()

    def reject_at_backend(self, rejections: Sequence[Rejection]) -> None:
        """Count records that the backend can never store.

        A resumable run reports only its next position, not which records it rejected. So the journal keeps the rejected
        positions until the next confirmation. Otherwise, after a crash, a later lane would count them as stored.
        """
        for rejection in rejections:
            self.reject(rejection)
        if rejections and self._redelivery is Redelivery.RESUMABLE:
            self.progress.rejected_at.update((r.position, r.reason) for r in rejections)
            self._save()

    def doubt(self, batch: Sequence[Entry]) -> None:
        """Remember that the backend may have stored this batch, or the first entries of it, although it failed."""
        if batch and self._may_double():
            self._doubted_to = max(self._doubted_to, batch[-1].position + 1)

    def doubt_earlier_lanes(self) -> None:
        """Remember that the backend may have what earlier lanes handed over.

        Raises:
            JournalError: the journal cannot be read.
        """
        if self._may_double():
            self._doubted_to = self._handed_over_to()

    def _may_double(self) -> bool:
        return self._redelivery is Redelivery.AT_LEAST_ONCE or self._trusts_client()

    def _trusts_client(self) -> bool:
        """Return whether some records were confirmed by the SDK alone. If they come again, the store may keep both.

        False for a ``rebuild`` backend, which keeps nothing twice.
        """
        return self.progress.client_confirmed > 0 and self._redelivery is not Redelivery.REBUILD

    def check_held(self, position: int) -> None:
        """Check that the records before ``position``, which a resumable run holds, came from this journal.

        The run may hold more records than this journal handed over. If this journal handed over none so far, or if it
        continues another journal, another journal wrote to the run. Otherwise the disk lost the last transactions of
        this journal. Nobody knows which records were in them. So the lane writes its next records after all that the
        run holds. If n records were lost, the next n records count as possible duplicates.

        This journal may go on where the server's journal ended. A run that holds any records must then hold all of that
        journal's.

        Raises:
            PermanentError: another journal wrote to the run, or the run lacks records of the server's journal. Delivery
                would skip or lose records.
            JournalError: the journal cannot be read or written.
        """
        first = self._journal.position_after(self.site_id, 0)
        if 0 < position < first:
            # The server's journal has the missing records. If delivery went on here, they would count as delivered.
            raise PermanentError(
                f"the run holds {position} records. The records before position {first} are in the journal of the "
                "server's receiver. Replay that journal first: `trackhub replay`"
            )
        limit = self._handed_over_to()
        if position <= limit:
            return
        if not self._ever_written or self._journal.continues:
            # Without this error, delivery would silently skip new records: one for each that the run has above `limit`.
            raise PermanentError(
                f"the run holds {position} records, but this journal handed over only {limit}: another journal wrote "
                "to the run. Was the receiver's state folder lost? Move the backend's run away, then replay the journal"
            )
        lost = position - limit
        _log.warning(
            "backend %s, run %s: it holds %d records, but the journal %s handed over %d. The journal has lost %d: was "
            "the power lost, or its -wal file cut off? The site sends its remaining records again. They are appended "
            "after the records that the run already holds. %d records count as possible duplicates",
            self.lane, self.site, position, self._journal.path, limit, lost, lost,
        )  # fmt: skip
        self.progress.shifts = [*self.progress.shifts, Shift(self._ever_written, lost, position + lost)]
        self._doubted_to = max(self._doubted_to, position + lost)
        self._store(self.written)

    def is_missing_confirmed(self, position: int) -> bool:
        """Return whether a run that holds the records before ``position`` lacks records that it had confirmed."""
        if position >= self.progress.stored_to:
            return False
        _log.warning(
            "backend %s, run %s: it holds %d records, but it had confirmed %d. Was the run moved away or deleted? The "
            "lane delivers the missing records again",
            self.lane, self.site, position, self.progress.stored_to,
        )  # fmt: skip
        return True

    def _handed_over_to(self) -> int:
        """Return the position before which the backend may have records, from this journal or another one."""
        position = self._position_after(self._ever_written)
        # The server's receiver may have taken a batch before. If its reply was lost, the site sent the batch here as
        # well. Then both journals have it.
        return position if self._ever_written else position + self._journal.overlap(self.site_id)

    def _empty_progress(self) -> Progress:
        progress = self.progress
        return Progress(last_error=progress.last_error, recovered=progress.recovered, shifts=progress.shifts)

    def start_over(self) -> None:
        """Forget what was confirmed: the run is written again from its first record.

        Raises:
            JournalError: the journal cannot be written.
        """
        self.confirmed = self.written = self._announced = self._stored_to = 0
        self.progress = self._empty_progress()
        self._store(self._ever_written)
        self.must_rebuild = False

    def note_recovered(self) -> None:
        """Note that nothing fails any more, if records were stored since the last confirmation. `confirm` stores it."""
        if self._since.stored:
            self.progress.recovered = True

    def confirm(self, memory: bytes, by: Confirmation = Confirmation.STORE, aside: Sequence[Entry] = ()) -> None:
        """Move the confirmed cursor up to the written one, add the counts of these rows, and store all of it.

        Args:
            memory: what `Adaptation` must remember, so that a later lane can go on after the written cursor.
            by: who confirmed the records. Those that the SDK alone confirmed are also counted separately.
            aside: the entries before the written cursor that are still pending.
        """
        progress, since = self.progress, self._since
        progress.confirmed += since.stored
        if by is Confirmation.CLIENT:
            progress.client_confirmed += since.stored
        progress.rejected = dict(Counter(progress.rejected) + since.rejected)
        progress.altered = dict(Counter(progress.altered) + since.altered)
        progress.possible_duplicates += since.doubtful
        progress.stored_to = self._stored_to
        progress.memory = memory
        progress.aside = list(aside)
        progress.rejected_at = {}
        self._since = _Counts()
        self.confirmed = self.written
        self._save()

    def note_error(self, error: BaseException) -> None:
        """Keep this error as the run's last one.

        The first error since the run worked is stored at once, so that a running job shows why records are pending. A
        later one is stored together with the next change.
        """
        begins = self.progress.recovered or not self.progress.last_error
        self.progress.last_error = f"{type(error).__name__}: {error}"
        self.progress.recovered = False
        if begins and not isinstance(error, JournalError):
            self._save()

    def note_blocked(self, entry: Entry, error: BaseException) -> None:
        """Warn that all later records wait for this one. Stored at once, so that a running job shows it."""
        if self._has_said_blocked:
            return
        self._has_said_blocked = True
        self.progress.blocked_by = name_of(entry)
        _log.warning(
            "backend %s, run %s: %s fails each time (%s). All later records of the run wait. The backend needs them in "
            "order, and trackhub cannot tell whether the record or the store is at fault. If the store is down, wait. "
            "Otherwise deliver the run with another backend: `trackhub replay --backend`. To reject an image or "
            "artifact, move its file away. A plugin should raise PermanentError for a record that it cannot store",
            self.lane, self.site, self.progress.blocked_by, error,
        )  # fmt: skip
        self._save()

    def note_unblocked(self) -> None:
        """Note that the blocking record is stored or rejected. Stored with the next change."""
        self.progress.blocked_by, self._has_said_blocked = "", False

    def end(self, state: str) -> None:
        """Store how delivery to the run ended; ``state`` is as in `report.RunReport`."""
        self.progress.state = state
        self._save()

    def state(self) -> RunState:
        """Return the state of this run that the journal must store."""
        return self._state(self.written)

    def _save(self) -> None:
        """Store cursors and progress.

        A failure is logged only: after a crash, records are delivered again, and none is lost.
        """
        try:
            self._store(self.written)
        except JournalError as e:
            _log.warning(
                "lane %s cannot store how far run %s got: %s. After a crash it delivers these records again",
                self.lane,
                self.site,
                e,
            )

    def _store(self, written: int) -> None:
        self._journal.save_run(self.lane, self.site_id, *self._state(written))

    def _state(self, written: int) -> RunState:
        # Never store less than an earlier lane announced. Otherwise its records would not count as possible duplicates.
        return RunState(max(written, self._ever_written), self.confirmed, self.progress)
