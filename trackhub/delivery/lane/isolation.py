# SPDX-License-Identifier: Apache-2.0
"""Finding the one record that a backend cannot store, so that it does not hold up later records.

`RunDelivery` puts batches in, writes what ``next`` returns, and says here what came of it. The rule by which an error
rejects a record stands in `Isolation` and `Evidence`, and nowhere else; docs/adr/0011 gives the reasons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from trackhub.delivery.lane.bad_record_or_outage import Evidence, share_keys, sort_of, speaks_of_the_store
from trackhub.errors import PermanentError, TransientError
from trackhub.records import STEPLESS
from trackhub.spi import Capabilities, Entry, Redelivery, Rejection

__all__ = ["Isolation", "Verdict"]

_SUSPECT_AFTER = 3  # failures of one batch
_SAY_AFTER = 6  # failures of a single record that holds up all others: about ten seconds
_MAX_ASIDE = 32
_MAX_HELD = 1000


class Verdict(NamedTuple):
    """What to do after a write failed.

    Attributes:
        wait: wait before the next attempt.
        narrowed: the failing batch was split, or its only record rejected. The next attempt is a new one, which does
            not wait longer because of the earlier ones.
        rejected: the record that can never be stored.
        blocks: it is time to say that a single record holds up all that come after it.
    """

    wait: bool
    narrowed: bool = False
    rejected: Rejection | None = None
    blocks: bool = False


class _Piece:
    """Entries that are written together.

    Attributes:
        entries: what is written.
        is_part: they are a part of a batch that failed.
        failures: how often they failed together.
        is_suspect: there is one record, and it may be bad.
        detail: the last error.
    """

    __slots__ = ("detail", "entries", "failures", "is_part", "is_suspect")

    def __init__(self, entries: list[Entry], *, is_part: bool = False) -> None:
        self.entries = entries
        self.is_part = is_part
        self.failures = 0
        self.is_suspect = False
        self.detail = ""


class Isolation:
    """What waits to be written to one run, split where it fails. Used by one thread.

    The rule, by the error of a write:

    - `PermanentError`: something in the batch can never be stored. The batch is halved at once. A record that fails
      alone is rejected as ``permanent_error``.
    - An error that says itself that the store is busy or full (`speaks_of_the_store`): the lane waits and tries again.
    - Any other error may come from a record or from an outage. After three failures of a batch its first record is
      tried alone. A record that fails alone three times is a *suspect*. One failure is enough while another record is
      set aside. With ``any_order``, a part that fails directly after another part was stored need not fail three
      times: it is halved at once, and a single record is a suspect at once. `Evidence` decides, by writes of the
      suspect and of its neighbours in random order, whether it is bad. A bad record is rejected as ``backend_error``.
      No other error rejects a record.

    What a neighbour is depends on what the backend declares:

    - ``any_order`` and ``idempotent``: a record of the same sort that was stored already. It is written again, and
      nothing changes.
    - ``any_order``, and nothing suitable was stored yet, or it is ``at_least_once``: a later record. The suspect is set
      aside.
    - Otherwise the order must be kept. There is no neighbour. A batch that fails is halved, so that all records before
      the failing one are stored. That one stays first. But an error that is neither a `TransientError` nor a
      `PermanentError` is a defect of the plugin: the record is set aside, and later records are written. In a
      ``resumable`` backend it stays first as well: such a backend takes a late record for one that it holds.

    A record set aside is tried again now and then. So are images and artifacts, which are never suspected. What shares
    a key with a record set aside waits with it, where the order of the two matters.
    """

    def __init__(self, can: Capabilities, toss: Callable[[], bool] | None = None) -> None:
        """Start with nothing to write.

        Args:
            can: what the backend declares.
            toss: the coin of `Evidence`, for tests.
        """
        self._rises = can.redelivery is Redelivery.RESUMABLE  # it takes a late record for one that it holds
        self._keeps_steps = not can.late_steps
        self._any_order = can.any_order and can.redelivery in (Redelivery.IDEMPOTENT, Redelivery.AT_LEAST_ONCE)
        self._rewrites = self._any_order and can.redelivery is Redelivery.IDEMPOTENT
        self._queue: deque[_Piece] = deque()
        self._aside: list[_Piece] = []
        self._held: list[Entry] = []
        self._stored: dict[str, Entry] = {}  # of each sort the last one, to be written again as a neighbour
        self._has_just_stored = False
        self._evidence = Evidence(toss)
        self._judged: _Piece | None = None  # whose evidence it is
        self._current: _Piece | None = None
        self._is_step = False  # the coin chose the current one
        self._is_neighbour = False  # it is written as the neighbour of a suspect

    def add(self, entries: Sequence[Entry], max_batch: int) -> None:
        """Append entries to what waits to be written, in batches of up to ``max_batch``."""
        self._queue.extend(_Piece(list(entries[i : i + max_batch])) for i in range(0, len(entries), max_batch))

    def is_empty(self) -> bool:
        """Return whether nothing waits but what is set aside."""
        return not self._queue

    def next(self) -> list[Entry] | None:
        """Return the entries to write next. None if there are none, or none that may pass those set aside."""
        suspect = self._suspect()
        neighbour: _Piece | None
        if suspect is None or suspect in self._aside:
            neighbour = self._later_one(alone=bool(self._aside) and (suspect is not None or self._keeps_steps))
        else:
            neighbour = _Piece([self._stored[_sort(suspect)]])
        if neighbour is None:
            return None
        self._is_step = suspect is not None and sort_of(neighbour.entries[0]) == sort_of(suspect.entries[0])
        self._is_neighbour = suspect is not None
        self._current = neighbour
        if suspect is not None and self._is_step:
            if suspect is not self._judged:
                self._judged = suspect
                self._evidence.begin_again()
            if self._evidence.chooses_suspect():
                self._current, self._is_neighbour = suspect, False
        return self._current.entries

    def next_aside(self) -> list[Entry] | None:
        """Return the next of those set aside, to try it without a neighbour. None if there is none."""
        if not self._aside:
            return None
        if sort_of(self._aside[0].entries[0]) is None:  # the turn goes round among files
            self._aside.append(self._aside.pop(0))
        self._current = self._aside[0]
        self._is_step = self._is_neighbour = False
        return self._current.entries

    def is_repeated(self) -> bool:
        """Return whether what ``next`` returned was stored and counted before."""
        return self._is_neighbour and not self._is_queued(self._current)

    def aside(self) -> list[Entry]:
        """Return the entries that are set aside or held back, by position."""
        entries = [entry for piece in self._aside for entry in piece.entries] + self._held
        return sorted(entries, key=lambda entry: entry.position)

    def succeeded(self, stored: Sequence[Entry]) -> list[Rejection]:
        """Take out what ``next`` returned: the backend took it.

        Args:
            stored: the entries of it that the backend did not reject itself.

        Returns:
            The record that this shows to be bad, if there is one.
        """
        piece = self._take_current()
        self._has_just_stored = True
        if self._rewrites:
            self._remember(stored)
        bad: list[Rejection] = []
        if self._is_neighbour and self._is_step:
            self._evidence.note_stored()
            bad = self._judge()
        if piece in self._aside:
            self._aside.remove(piece)
            self._put_back()
        elif any(sort_of(other.entries[0]) in self._stored for other in self._aside):
            self._put_back()  # from now on, their neighbours are records that are stored already
        return bad

    def failed(self, error: BaseException) -> Verdict:
        """Apply the rule to the error with which writing what ``next`` returned failed, and return what to do now."""
        piece = self._current
        assert piece is not None
        if isinstance(error, PermanentError):
            return self._refused(piece, error)
        has_just_stored, self._has_just_stored = self._has_just_stored, False
        piece.failures += 1
        piece.detail = f"{type(error).__name__}: {error}"
        if speaks_of_the_store(error):
            self._evidence.begin_again()
            return Verdict(wait=True)
        if piece in self._aside or piece is self._judged:
            if self._is_step:
                self._evidence.note_refused()
                bad = self._judge()
                return Verdict(wait=False, narrowed=bool(bad), rejected=bad[0] if bad else None)
            return Verdict(wait=True)
        self._evidence.begin_again()
        if self.is_repeated():
            return Verdict(wait=True)  # what was stored already fails as well: the store is away
        return self._narrow(piece, error, has_just_stored)

    def _narrow(self, piece: _Piece, error: BaseException, has_just_stored: bool) -> Verdict:
        """Split the first piece of the queue if it failed often enough, or suspect its only record."""
        at_once = has_just_stored and self._any_order and piece.is_part
        if not at_once and piece.failures < (1 if self._aside and len(piece.entries) == 1 else _SUSPECT_AFTER):
            return Verdict(wait=True)
        must_stay_first = not self._any_order and (self._rises or isinstance(error, TransientError))
        if len(piece.entries) > 1:
            self._split(piece, len(piece.entries) // 2 if has_just_stored or must_stay_first else 1)
            return Verdict(wait=not at_once, narrowed=True)
        if must_stay_first:
            return Verdict(wait=True, blocks=piece.failures == _SAY_AFTER)
        sort = sort_of(piece.entries[0])
        if sort is not None and sort in self._stored:
            piece.is_suspect = True
            return Verdict(wait=not at_once)
        if len(self._aside) < _MAX_ASIDE:
            piece.is_suspect = sort is not None
            self._queue.popleft()
            self._aside.append(piece)
        return Verdict(wait=not at_once)

    def _refused(self, piece: _Piece, error: BaseException) -> Verdict:
        """Reject the only record of a piece, or halve it."""
        if self.is_repeated():
            self._evidence.begin_again()
            self._stored.pop(_sort(piece), None)  # a strange store: it refuses what it has stored
            return Verdict(wait=True)
        if len(piece.entries) > 1:
            self._split(piece, len(piece.entries) // 2)
            return Verdict(wait=False, narrowed=True)
        self._remove(piece)
        return Verdict(wait=False, narrowed=True, rejected=_rejection(piece, "permanent_error", error))

    def _split(self, piece: _Piece, at: int) -> None:
        self._queue.popleft()
        self._queue.appendleft(_Piece(piece.entries[at:], is_part=True))
        self._queue.appendleft(_Piece(piece.entries[:at], is_part=True))

    def _suspect(self) -> _Piece | None:
        """Return the record that is being judged now."""
        front = self._queue[0] if self._queue else None
        if front is not None and front.is_suspect and _sort(front) in self._stored:
            return front
        return next((piece for piece in self._aside if piece.is_suspect), None)

    def _later_one(self, *, alone: bool) -> _Piece | None:
        """Return the first piece of the queue that may be written now; one record of it if it must be alone."""
        while self._queue:
            piece = self._queue[0]
            if alone and len(piece.entries) > 1:
                self._split(piece, 1)
                piece = self._queue[0]
            if not self._aside or not self._must_wait(piece.entries[0]):
                return piece
            if len(self._held) >= _MAX_HELD:
                return None
            if len(piece.entries) > 1:
                self._split(piece, 1)
            self._held += self._queue.popleft().entries
        return None

    def _must_wait(self, entry: Entry) -> bool:
        """Return whether an entry must not be stored before one that is set aside."""
        if not isinstance(entry.payload, STEPLESS) and not self._keeps_steps:
            return False
        before = [piece.entries[0] for piece in self._aside] + self._held
        return any(share_keys(entry, other) for other in before)

    def _judge(self) -> list[Rejection]:
        if not self._evidence.is_enough():
            return []
        piece = self._judged
        assert piece is not None
        self._remove(piece)
        return [Rejection(piece.entries[0].position, "backend_error", piece.detail)]

    def _remember(self, stored: Sequence[Entry]) -> None:
        # A param, tag or final value that has its value already may cost the store no write. So it shows nothing.
        if stored and not isinstance(stored[-1].payload, STEPLESS) and (sort := sort_of(stored[-1])) is not None:
            self._stored[sort] = stored[-1]

    def _take_current(self) -> _Piece:
        piece, self._current = self._current, None
        assert piece is not None
        if self._is_queued(piece):
            self._queue.popleft()
        if piece is self._judged:
            self._judged = None
        return piece

    def _is_queued(self, piece: _Piece | None) -> bool:
        return bool(self._queue) and self._queue[0] is piece

    def _remove(self, piece: _Piece) -> None:
        """Take a record out that is rejected. What was held back because of it is tried again."""
        self._judged = None
        if piece in self._aside:
            self._aside.remove(piece)
        elif self._is_queued(piece):
            self._queue.popleft()
        held, self._held = self._held, []
        if held:
            self._queue.appendleft(_Piece(held, is_part=True))

    def _put_back(self) -> None:
        """Put suspects and what they held back to the front again, in order: they may be good. Files stay aside."""
        files = [piece for piece in self._aside if not piece.is_suspect]
        entries = [entry for piece in self._aside if piece.is_suspect for entry in piece.entries] + self._held
        self._aside, self._held, self._judged = files, [], None
        for entry in sorted(entries, key=lambda entry: entry.position, reverse=True):
            self._queue.appendleft(_Piece([entry], is_part=True))


def _sort(piece: _Piece) -> str:
    return sort_of(piece.entries[0]) or ""


def _rejection(piece: _Piece, reason: str, error: BaseException) -> Rejection:
    return Rejection(piece.entries[0].position, reason, f"{type(error).__name__}: {error}")
