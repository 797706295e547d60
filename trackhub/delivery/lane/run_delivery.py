# SPDX-License-Identifier: Apache-2.0
"""One run in one lane: read rows, shape them, hand them over, count the outcomes, move the cursors."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from pathlib import Path

import msgspec

from trackhub.delivery.journal.rows import Progress, Row, stored_records
from trackhub.delivery.journal.store import Journal
from trackhub.delivery.lane.adaptation import Shaper
from trackhub.delivery.retry import Backoff
from trackhub.errors import JournalError, PermanentError, TransientError
from trackhub.framing import decode_body
from trackhub.records import Kind
from trackhub.run import RunInfo, RunKey, RunStatus
from trackhub.spi import Backend, BackendRun, Entry, Redelivery, Rejection, Results, Side, WriteReport

__all__ = ["RunLane"]

_READ_BYTES = 4 << 20
_SPLIT_AFTER = 3  # failures of one batch with an error that the SPI does not know, before it is split
_MAX_SUSPECTS = 8
_KNOWN_KINDS = frozenset(int(kind) for kind in Kind)
_ANNOUNCED = frozenset({Redelivery.AT_LEAST_ONCE, Redelivery.RESUMABLE})
_log = logging.getLogger(__name__)


class RunLane:
    """Delivers one site's records to one backend. Used by the lane's thread alone, ``give_up`` excepted."""

    def __init__(
        self,
        lane: str,
        backend: Backend,
        journal: Journal,
        *,
        site_id: int,
        site: str,
        job: str,
        side: Side,
        created: float,
        blob_dir: Path,
        flush_s: float,
        stop: threading.Event,
    ) -> None:
        """Take up the run where the journal's cursors stand."""
        self.site_id = site_id
        self.site = site
        self.not_before = 0.0
        self._lane = lane
        self._backend = backend
        self._journal = journal
        self._flush_s = flush_s
        self._stop = stop
        self._key = RunKey(job, site)
        self._side = side
        self._created = created
        self._blob_dir = blob_dir
        self._can = backend.capabilities
        written, self._confirmed, self._progress = journal.run_state(lane, site_id)
        self._rebuilds = self._can.redelivery is Redelivery.REBUILD and self._confirmed > 0
        if self._rebuilds and self._progress.state != "finished":
            # It cannot be left as it is, even if nothing more comes. Counts and memory go with the cursor: it may be
            # stored before the run is opened, when another one takes all the time there is.
            self._confirmed, self._progress = 0, Progress(last_error=self._progress.last_error)
        self._written = self._confirmed
        self._ever_written = max(written, self._confirmed)
        self._doubted_to = 0  # records before this position may be at the backend already
        self._shaper = Shaper(self._can, self._progress.memory)
        self._run: BackendRun | None = None
        self._info: RunInfo
        self._buffers = False
        self._skip_before = 0
        self._rows: deque[Row] = deque()
        self._todo: deque[list[Entry]] = deque()
        self._todo_upto = self._confirmed
        self._announced = self._confirmed
        self._suspects: list[list[Entry]] = []
        self._breaks = 0
        self._stored = 0
        self._stored_to = self._progress.stored_to
        self._doubled = 0
        self._rejected: Counter[str] = Counter()
        self._altered: Counter[str] = Counter()
        self._flush_due: float | None = None
        self._backoff = Backoff()
        self._over = False
        self._has_stored = False
        self._asked_to_wait = False
        self._hurried = False

    def advance(self, *, flush_now: bool) -> bool:
        """Do one piece of work: hand over a batch, or flush what is due. Return whether there was something to do."""
        if self._over:
            return False
        try:
            return self._advance(flush_now)
        except JournalError as e:
            self._failed(e, None)
            return False

    def _advance(self, flush_now: bool) -> bool:
        if self._run is None:
            # By one look at the journal: a row that comes after it is taken the next time, with a run to write to.
            return bool(self._todo or self._journal.has_rows_after(self.site_id, self._todo_upto)) and self._open()
        if not self._todo and self._written == self._todo_upto and not self._take():
            if self._flush_due is not None and (flush_now or time.monotonic() >= self._flush_due):
                return self._flush()
            return False
        while self._todo:
            if self._stop.is_set() or not self._announce() or not self._hand_over():
                return False
        if self._suspects:
            return self._look_further()
        self._written = self._todo_upto
        if not self._buffers:
            self._confirm()
        elif self._flush_due is None:
            self._flush_due = time.monotonic() + self._flush_s
        elif time.monotonic() >= self._flush_due:
            return self._flush()
        return True

    def is_idle(self) -> bool:
        """Return whether everything that the journal has is confirmed or cannot be delivered."""
        if self._over:
            return True
        if self._flush_due is not None or self._written != self._todo_upto or self._rows:
            return False
        try:
            return not self._journal.has_rows_after(self.site_id, self._todo_upto)
        except JournalError as e:
            self._failed(e, None)
            return False

    def is_over(self) -> bool:
        """Return whether the run is finished or cannot be opened."""
        return self._over

    def due(self) -> float:
        """Return when there will be something to do, on the monotonic clock."""
        return max(self.not_before, self._flush_due or 0.0)

    def hurry(self) -> bool:
        """At the end of the job, cut a backoff short, once; a time that the backend asked for is kept."""
        if self._asked_to_wait or self._hurried:
            return False
        self._hurried = True
        self.not_before = 0.0
        return True

    def finish(self, status: RunStatus) -> bool:
        """End the run. Return False if the backend asks to be called again; ``not_before`` then says when."""
        if self._run is None:
            if self._progress.state != "finished":
                self._progress.state = "finished"
                self.save()
            self._over = True
            return True
        try:
            self._run.finish(status)
            self._progress.state = "finished"
        except TransientError as e:
            self._failed(e, e.retry_after_s)
            return False
        except BaseException as e:
            self._note_error(e)
            _log.warning("backend %s could not finish run %s: %s", self._lane, self.site, self._progress.last_error)
            self._progress.state = "unfinished"
        self._over = True
        self._progress.results = self._results()
        self.save()
        return True

    def give_up(self, reason: str) -> None:
        """Mark the run as unfinished, if it is, with a reason. Called after the lane's end, or when it does not end.

        Raises:
            JournalError: the journal does not tell whether the run is finished.
        """
        if self._progress.state == "finished" and not self._journal.has_rows_after(self.site_id, self._confirmed):
            self._over = True  # by an earlier receiver
        if not self._over:
            self._over = True
            self._progress.last_error = reason or self._progress.last_error
            self._progress.state = "unfinished"
            self.save()

    def save(self) -> None:
        """Store cursors and counts; a journal that cannot be written costs a repeated delivery, not a record."""
        try:
            written = max(self._written, self._ever_written)
            self._journal.save_run(self._lane, self.site_id, written, self._confirmed, self._progress)
        except JournalError as e:
            _log.warning("lane %s cannot store how far run %s got: %s", self._lane, self.site, e)

    def _open(self) -> bool:
        if self._rebuilds:
            self._begin_anew()
        try:
            resume_from = self._journal.position_after(self.site_id, self._confirmed)
            self._info = RunInfo(self._key, self._side, self._created, resume_from, self._blob_dir)
            run = self._backend.open_run(self._info)
            if self._can.redelivery is Redelivery.RESUMABLE:
                self._skip_before = self._resume(run)
            elif self._can.redelivery is Redelivery.AT_LEAST_ONCE:
                self._doubted_to = self._journal.position_after(self.site_id, self._ever_written) + self._overlap()
        except PermanentError as e:
            self._note_error(e)
            self._progress.state = "stopped"
            self._over = True
            _log.warning("backend %s cannot open run %s: %s; its records stay in the journal", self._lane, self.site, e)
            self.save()
            return False
        except BaseException as e:  # also SystemExit, which an SDK may raise: nothing of a plugin's ends the lane
            self._failed(e, getattr(e, "retry_after_s", None))
            return False
        self._run = run
        self._buffers = type(run).flush is not BackendRun.flush
        self._backoff.reset()
        return True

    def _begin_anew(self) -> None:
        """Forget what the run had confirmed: it is written from its first record again."""
        self._confirmed = self._written = self._todo_upto = self._announced = 0
        self._progress = Progress(last_error=self._progress.last_error)
        self._stored_to = 0
        self._shaper = Shaper(self._can)
        self._journal.save_run(self._lane, self.site_id, self._ever_written, 0, self._progress)
        self._rebuilds = False

    def _resume(self, run: BackendRun) -> int:
        position = run.next_position()
        first = self._journal.position_after(self.site_id, 0)
        if 0 < position < first:
            # What comes before would be taken for delivered, whoever brings it.
            raise PermanentError(
                f"the run holds {position} records, and those before {first} are in the journal of the server's own "
                "receiver: replay that one first"
            )
        limit = self._journal.position_after(self.site_id, self._ever_written) + self._overlap()
        if position > limit:
            # Taking these for records of this journal would skip as many new ones, silently.
            raise PermanentError(
                f"the run holds {position} records, but this journal handed over {limit}: another one wrote it. "
                "Was the receiver's state folder lost? Move the backend's run away, and replay the journal"
            )
        if position < self._progress.stored_to:
            _log.warning(
                "backend %s, run %s: it holds the records up to %d, though those up to %d had been confirmed. Was the "
                "run moved away, or deleted? What it lacks is delivered again",
                self._lane, self.site, position, self._progress.stored_to,
            )  # fmt: skip
            self._begin_anew()
        return position

    def _overlap(self) -> int:
        """Return how many of the first records the backend may have from another journal of the run."""
        return 0 if self._ever_written else self._journal.overlap(self.site_id)

    def _take(self) -> bool:
        """Turn the next rows into entries to hand over, enough for one write; False if there are no more rows.

        Always whole rows, and no more of them than needed: what was written of a row counts only with the rest of it.
        """
        if not self._rows:
            self._rows.extend(self._journal.read(self.site_id, self._todo_upto, _READ_BYTES))
            if not self._rows:
                return False
        entries: list[Entry] = []
        size = self._can.max_batch
        while self._rows and len(entries) < size:
            row = self._rows.popleft()
            self._todo_upto = row.id
            found = 0
            for position, kind, body in stored_records(row):
                self._shape(row, position, kind, body, entries)
                found += 1
            if found < row.records:
                self._reject_damaged(row, row.records - found)
        self._todo.extend(entries[i : i + size] for i in range(0, len(entries), size))
        return True

    def _announce(self) -> bool:
        """Store which rows are handed over next: after a crash it tells which records may be in the backend already.

        False if that cannot be stored now; then they must wait.
        """
        if self._announced < self._todo_upto and self._can.redelivery in _ANNOUNCED:
            try:
                self._journal.save_run(self._lane, self.site_id, self._todo_upto, self._confirmed, self._progress)
            except JournalError as e:
                self._failed(e, None)
                return False
            self._announced = self._todo_upto
            self._ever_written = max(self._ever_written, self._todo_upto)
        return True

    def _reject_damaged(self, row: Row, count: int) -> None:
        _log.warning(
            "%s: %d of the records %d to %d of run %s (row %d) cannot be read; backend %s does not get them",
            self._journal.path, count, row.first_position, row.first_position + row.records - 1, self.site, row.id,
            self._lane,
        )  # fmt: skip
        self._rejected["damaged"] += count

    def _shape(self, row: Row, position: int, kind: int, body: bytes, entries: list[Entry]) -> None:
        if kind not in _KNOWN_KINDS:
            self._reject(Rejection(position, "unknown_kind", f"kind {kind} is of a newer trackhub"))
            return
        try:
            record = decode_body(body)
        except msgspec.DecodeError as e:
            self._reject(Rejection(position, "undecodable", str(e)))
            return
        shaped, altered = self._shaper.shape(row.stream, record, position)
        if isinstance(shaped, Rejection):
            self._reject(shaped)
            return
        if altered:
            self._altered.update(altered)
        if position < self._skip_before:
            self._stored += 1  # the run holds it already: it was written, but not confirmed, before a crash
            self._stored_to = position + 1
        else:
            entries.append(shaped)

    def _hand_over(self) -> bool:
        """Write the first batch of the list; split it, or wait, if that fails."""
        assert self._run is not None
        batch = self._todo[0]
        try:
            report = _checked(self._run.write(list(batch)))  # a plugin may use its list up; the counts are of this one
        except TransientError as e:
            self._may_have_stored(batch)
            self._breaks = 0
            self._failed(e, e.retry_after_s)
            return False
        except PermanentError as e:
            self._may_have_stored(batch)  # one that stores record by record has the first ones
            self._note_error(e)
            self._narrow_down(batch, "permanent_error", e)
            return True
        except BaseException as e:
            self._may_have_stored(batch)
            self._failed(e, None)
            self._breaks += 1
            if self._breaks >= _SPLIT_AFTER:
                # The plugin breaks on something in here. Find it, so that it does not hold up all that follows.
                if len(batch) > 1 or self._has_stored:
                    self._narrow_down(batch, "backend_error", e)
                else:
                    self._suspects.append(self._todo.popleft())
            return False
        named = {r.position: r for r in report.rejected} if report is not None else {}
        rejected = {e.position: named[e.position] for e in batch if e.position in named} if named else {}
        for rejection in rejected.values():
            self._reject(rejection)
        stored = [e for e in batch if e.position not in rejected] if rejected else batch
        self._stored += len(stored)
        if stored:
            self._stored_to = stored[-1].position + 1
        if batch[0].position < self._doubted_to:
            self._doubled += sum(e.position < self._doubted_to for e in stored)
        self._has_stored = True
        self._backoff.reset()
        self._breaks = 0
        self._todo.popleft()
        for (entry,) in self._suspects:
            self._reject(Rejection(entry.position, "backend_error", self._progress.last_error))
        self._suspects.clear()
        return True

    def _look_further(self) -> bool:
        """Go on to later records: the backend has stored nothing yet, and breaks on each of the first ones.

        If a later one can be stored, it is those that the backend cannot take. If not, it is broken altogether, and
        all of them wait.
        """
        if len(self._suspects) < _MAX_SUSPECTS and self._take():
            return True
        self._todo.extendleft(reversed(self._suspects))
        self._suspects.clear()
        return False

    def _may_have_stored(self, batch: list[Entry]) -> None:
        if self._can.redelivery is Redelivery.AT_LEAST_ONCE:
            self._doubted_to = max(self._doubted_to, batch[-1].position + 1)

    def _narrow_down(self, batch: list[Entry], reason: str, error: BaseException) -> None:
        self._todo.popleft()
        self._backoff.reset()
        self._breaks = 0
        if len(batch) == 1:
            self._reject(Rejection(batch[0].position, reason, f"{type(error).__name__}: {error}"))
            return
        middle = len(batch) // 2
        self._todo.appendleft(batch[middle:])
        self._todo.appendleft(batch[:middle])

    def _reject(self, rejection: Rejection) -> None:
        if not self._rejected[rejection.reason] and rejection.reason not in self._progress.rejected:
            _log.warning(
                "backend %s, run %s: record %d rejected (%s: %s); further ones of this reason are only counted",
                self._lane, self.site, rejection.position, rejection.reason, rejection.detail,
            )  # fmt: skip
        self._rejected[rejection.reason] += 1

    def _flush(self) -> bool:
        assert self._run is not None
        try:
            self._run.flush()
        except BaseException as e:
            self._failed(e, getattr(e, "retry_after_s", None))
            return False
        self._flush_due = None
        self._backoff.reset()
        self._confirm()
        return True

    def _confirm(self) -> None:
        """Move the confirmed cursor up to the written one, and store the counts that belong to it."""
        p = self._progress
        p.confirmed += self._stored
        p.rejected = dict(Counter(p.rejected) + self._rejected)
        p.altered = dict(Counter(p.altered) + self._altered)
        p.possible_duplicates += self._doubled
        p.stored_to = self._stored_to
        p.memory = self._shaper.memory()
        self._stored = 0
        self._doubled = 0
        self._rejected.clear()
        self._altered.clear()
        self._confirmed = self._written
        self._hurried = False
        self.save()

    def _results(self) -> Results | None:
        try:
            # By way of plain values: one of another type would make the journal unreadable.
            return msgspec.convert(msgspec.to_builtins(self._backend.results(self._info)), Results | None)
        except BaseException as e:
            _log.warning("backend %s cannot say where run %s can be seen: %s", self._lane, self.site, e)
            return None

    def _failed(self, error: BaseException, retry_after_s: float | None) -> None:
        self._note_error(error)
        self._asked_to_wait = retry_after_s is not None
        wait_s = self._backoff.next_wait_s(_seconds(retry_after_s))
        self.not_before = time.monotonic() + wait_s
        if self._backoff.failures == 1:
            _log.warning("backend %s, run %s: %s; trying again", self._lane, self.site, self._progress.last_error)

    def _note_error(self, error: BaseException) -> None:
        self._progress.last_error = f"{type(error).__name__}: {error}"


def _checked(report: object) -> WriteReport | None:
    if report is None:
        return None
    if not isinstance(report, WriteReport):
        raise TypeError(f"write() returned {type(report).__name__}; expected None or a WriteReport")
    for one in report.rejected:
        if not isinstance(one, Rejection) or type(one.position) is not int or type(one.reason) is not str:
            raise TypeError(f"write() reported {one!r}; expected a Rejection with a position and a reason")
    return report


def _seconds(retry_after_s: object) -> float | None:
    """Return a wait that a plugin asked for, which may be a header as it came; None if it is no number."""
    try:
        return max(0.0, float(retry_after_s))  # type: ignore[arg-type]  # the point of trying
    except (TypeError, ValueError):
        return None
