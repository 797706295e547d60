# SPDX-License-Identifier: Apache-2.0
"""Finds the one record that a backend cannot store, so that this record does not hold up later ones.

`RunDelivery` adds batches, writes what ``next`` returns, and says here whether that was stored. If it was not, only
`Isolation` and `Evidence` decide whether the error rejects a record. The files that `FileUploads` writes never come
here. docs/adr/0011 gives the reasons.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from trackhub.delivery.lane.bad_record_or_outage import Evidence, group_of, says_busy_or_full, share_keys
from trackhub.delivery.lane.describe_record import named_rejection
from trackhub.delivery.lane.split_into_writes import split_into_writes
from trackhub.errors import PermanentError, TransientError
from trackhub.records import STEPLESS
from trackhub.spi import Capabilities, Entry, Redelivery, Rejection

__all__ = ["Isolation", "Verdict"]

_SUSPECT_AFTER = 3  # failures of one batch
_SAY_AFTER = 6  # after this many failures (3 to 6 s of waits), a single record counts as blocking all later ones
_MAX_ASIDE = 32
_MAX_HELD = 1000


class Verdict(NamedTuple):
    """What to do after a write failed.

    Attributes:
        wait: wait before the next attempt.
        narrowed: True if the failing batch was split, or its only record rejected. Then the wait before the next
            attempt starts small again.
        rejected: the record that can never be stored. None if there is none.
        blocks: True if one record holds up all later records, and the lane cannot test whether the store works.
    """

    wait: bool
    narrowed: bool = False
    rejected: Rejection | None = None
    blocks: bool = False


class _Piece:
    """Entries that are written together.

    Attributes:
        entries: what is written.
        is_part: True if the entries are a part of a batch that failed.
        failures: how often the entries failed together.
        is_suspect: True for a single record that may be bad.
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
    """Holds the entries that wait to be written to one run, and splits batches that fail. Used by one thread.

    What happens depends on the error of a write:

    - `PermanentError`: something in the batch can never be stored. The batch is halved at once. A record that fails
      alone is rejected as ``permanent_error``.
    - An error that itself says that the store is busy or full (`says_busy_or_full`): the lane waits and tries again.
      Such an error never rejects a record.
    - Any other error may come from a record or from an outage. So the lane looks for the record, and then tests it.

    How it looks for the record: a batch that fails three times is split, until one record fails alone. If this record
    fails three times, it is the *suspect*.

    How it tests the suspect: it writes the suspect or a *neighbour*, and a coin chooses which. A neighbour is another
    record, or the plugin's own test of its store. From the results, `Evidence` decides whether the suspect is bad. A
    bad record is rejected as ``backend_error``.

    What the backend declares decides how a batch is split, and what a neighbour is:

    - ``any_order`` and ``idempotent``: the first record is split off. The neighbour is a stored record of the same
      group: values or documents, see `group_of`. It is written again, and nothing changes.
    - ``any_order`` and ``at_least_once``: the first record is split off. The suspect is *set aside*: it waits, and
      later records are its neighbours. The same holds for ``idempotent`` while no record of the same group is stored.
    - Otherwise the order must be kept. The batch is halved, so that all records before the failing one are stored. The
      failing record stays first, and later records wait. With ``probe``, the neighbour is the plugin's own test, which
      stores nothing. Without ``probe`` there is no neighbour and no suspect.

    Without ``probe``, the last rule has an exception. An error that is neither a `TransientError` nor a
    `PermanentError` is a defect of the plugin. Then the first record is split off and set aside, as for
    ``at_least_once``. This does not hold for a ``resumable`` backend. It would mistake a record that comes late for one
    that it already holds.

    Two things make it faster. With ``any_order``: if one part of a batch is stored and the next part fails, the failing
    part is halved at once. If that part is a single record, it is the suspect at once. And while one record is set
    aside, another one that fails alone becomes a suspect after one failure.

    A record that is set aside is tried again now and then. Images and artifacts that fail may be set aside, but are
    never suspects. An entry may have to come after one that is set aside, since both have a key in common. Such an
    entry is *held back* until the other one is stored or rejected.
    """

    def __init__(self, can: Capabilities, toss: Callable[[], bool] | None = None) -> None:
        """Start with nothing to write.

        Args:
            can: what the backend declares.
            toss: the coin of `Evidence`, for tests.
        """
        self._max_batch = can.max_batch
        self._is_resumable = can.redelivery is Redelivery.RESUMABLE
        self._keeps_steps = not can.late_steps
        self._any_order = can.any_order and not can.redelivery.needs_order
        self._rewrites = self._any_order and can.redelivery is Redelivery.IDEMPOTENT
        self._probes = can.probe and not self._any_order
        self._queue: deque[_Piece] = deque()
        self._aside: list[_Piece] = []
        self._held: list[Entry] = []
        self._stored: dict[str, Entry] = {}  # the last stored entry of each group, to write it again as a neighbour
        self._has_just_stored = False
        self._evidence = Evidence(toss)
        self._judged: _Piece | None = None  # the suspect that the evidence is about
        self._current: _Piece | None = None
        self._is_trial = False  # True if the coin chose the current piece
        self._is_neighbour = False  # True if the current piece is written as the neighbour of a suspect

    def add(self, entries: Sequence[Entry]) -> None:
        """Append entries to what waits to be written."""
        self._queue.extend(map(_Piece, split_into_writes(entries, self._max_batch)))

    def is_empty(self) -> bool:
        """Return whether no entry waits, except for those that are set aside or held back."""
        return not self._queue

    def next(self) -> list[Entry] | None:
        """Return the entries to write next. None if none are left, or if all must wait for records set aside."""
        suspect = self._suspect()
        neighbour: _Piece | None
        if suspect is None or suspect in self._aside:
            neighbour = self._later_one(alone=bool(self._aside) and (suspect is not None or self._keeps_steps))
        else:
            neighbour = _Piece(suspect.entries if self._probes else [self._stored[_group(suspect)]])
        if neighbour is None:
            return None
        self._is_trial = suspect is not None and group_of(neighbour.entries[0]) == group_of(suspect.entries[0])
        self._is_neighbour = suspect is not None
        self._current = neighbour
        if suspect is not None and self._is_trial:
            if suspect is not self._judged:
                self._judged = suspect
                self._evidence.begin_again()
            if self._evidence.chooses_suspect():
                self._current, self._is_neighbour = suspect, False
        return self._current.entries

    def next_aside(self) -> list[Entry] | None:
        """Return the next entries that are set aside, to try them without a neighbour. None if there are none."""
        if not self._aside:
            return None
        if group_of(self._aside[0].entries[0]) is None:  # files take turns, so that one bad file delays no other
            self._aside.append(self._aside.pop(0))
        self._current = self._aside[0]
        self._is_trial = self._is_neighbour = False
        return self._current.entries

    def only_tests_store(self) -> bool:
        """Return whether the entries from ``next`` only test the store.

        They are a record that is stored already, or the suspect that is given to ``probe``.
        """
        return self._is_neighbour and not self._is_queued(self._current)

    def is_probe(self) -> bool:
        """Return whether the plugin's ``probe`` is to be called with what ``next`` returned, in place of ``write``."""
        return self._probes and self.only_tests_store()

    def aside(self) -> list[Entry]:
        """Return the entries that are set aside or held back, in the order of their positions."""
        entries = [entry for piece in self._aside for entry in piece.entries] + self._held
        return sorted(entries, key=lambda entry: entry.position)

    def succeeded(self, stored: Sequence[Entry]) -> list[Rejection]:
        """Note that the backend took the entries that ``next`` or ``next_aside`` returned. They wait no longer.

        Args:
            stored: the entries that the backend did not reject.

        Returns:
            The rejection of the suspect, if the evidence is now enough. Otherwise an empty list.
        """
        piece = self._take_current()
        self._has_just_stored = True
        if self._rewrites:
            self._remember(stored)
        bad: list[Rejection] = []
        if self._is_neighbour and self._is_trial:
            self._evidence.note_neighbour_stored()
            bad = self._judge()
        if piece in self._aside:
            self._aside.remove(piece)
            self._put_back()
        elif any(group_of(other.entries[0]) in self._stored for other in self._aside):
            self._put_back()  # a record of this group is stored now, and can be the neighbour of the suspects
        return bad

    def failed(self, error: BaseException) -> Verdict:
        """Return what to do after the write of the entries from ``next`` or ``next_aside`` failed.

        Args:
            error: the error with which the write failed.
        """
        piece = self._current
        assert piece is not None
        if isinstance(error, PermanentError):
            return self._handle_permanent_error(piece, error)
        has_just_stored, self._has_just_stored = self._has_just_stored, False
        if says_busy_or_full(error):
            self._evidence.begin_again()
            return Verdict(wait=True)
        piece.failures += 1
        piece.detail = f"{type(error).__name__}: {error}"
        if piece in self._aside or piece is self._judged:
            if self._is_trial:
                self._evidence.note_suspect_failed()
                bad = self._judge()
                return Verdict(wait=False, narrowed=bool(bad), rejected=bad[0] if bad else None)
            return Verdict(wait=True)
        self._evidence.begin_again()
        if self.only_tests_store():
            return Verdict(wait=True)  # a record that was stored before, or the probe, fails as well: the store is down
        return self._narrow(piece, error, has_just_stored)

    def _narrow(self, piece: _Piece, error: BaseException, has_just_stored: bool) -> Verdict:
        """Split the first piece of the queue if it failed often enough.

        If it is a single record, decide whether that is a suspect, and whether it is set aside.
        """
        at_once = has_just_stored and self._any_order and piece.is_part
        if not at_once and piece.failures < (1 if self._aside and len(piece.entries) == 1 else _SUSPECT_AFTER):
            return Verdict(wait=True)
        defect = not isinstance(error, TransientError)
        must_stay_first = not self._any_order and (self._probes or self._is_resumable or not defect)
        if len(piece.entries) > 1:
            self._split(piece, len(piece.entries) // 2 if has_just_stored or must_stay_first else 1)
            return Verdict(wait=not at_once, narrowed=True)
        group = group_of(piece.entries[0])
        if must_stay_first:
            piece.is_suspect = self._probes and group is not None
            return Verdict(wait=True, blocks=piece.failures >= _SAY_AFTER)
        if group is not None and group in self._stored:
            piece.is_suspect = True
            return Verdict(wait=not at_once)
        if len(self._aside) < _MAX_ASIDE:
            piece.is_suspect = group is not None
            self._queue.popleft()
            self._aside.append(piece)
        return Verdict(wait=not at_once)

    def _handle_permanent_error(self, piece: _Piece, error: BaseException) -> Verdict:
        """Reject the record of a piece that has only one, or halve the piece."""
        if self.only_tests_store():
            self._evidence.begin_again()
            self._stored.pop(_group(piece), None)  # the backend rejects it now, so it is no evidence
            return Verdict(wait=True)
        if len(piece.entries) > 1:
            self._split(piece, len(piece.entries) // 2)
            return Verdict(wait=False, narrowed=True)
        self._remove(piece)
        return Verdict(
            wait=False, narrowed=True, rejected=_rejection(piece, "permanent_error", f"{type(error).__name__}: {error}")
        )

    def _split(self, piece: _Piece, at: int) -> None:
        self._queue.popleft()
        self._queue.appendleft(_Piece(piece.entries[at:], is_part=True))
        self._queue.appendleft(_Piece(piece.entries[:at], is_part=True))

    def _suspect(self) -> _Piece | None:
        """Return the record that is being judged now."""
        front = self._queue[0] if self._queue else None
        if front is not None and front.is_suspect and (self._probes or _group(front) in self._stored):
            return front
        return next((piece for piece in self._aside if piece.is_suspect), None)

    def _later_one(self, *, alone: bool) -> _Piece | None:
        """Return the first piece of the queue that may be written now. With ``alone``, return only its first record."""
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
        """Return whether an entry must wait for one that is set aside."""
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
        return [_rejection(piece, "backend_error", piece.detail)]

    def _remember(self, stored: Sequence[Entry]) -> None:
        # A store may skip the write of a param, tag or final value that has not changed. Such a write is no evidence.
        if stored and not isinstance(stored[-1].payload, STEPLESS) and (group := group_of(stored[-1])) is not None:
            self._stored[group] = stored[-1]

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
        """Remove a rejected record. Put the entries that waited for it back to the front of the queue."""
        self._judged = None
        if piece in self._aside:
            self._aside.remove(piece)
        elif self._is_queued(piece):
            self._queue.popleft()
        held, self._held = self._held, []
        pieces = [_Piece(part, is_part=True) for part in split_into_writes(held, self._max_batch)]
        self._queue.extendleft(reversed(pieces))

    def _put_back(self) -> None:
        """Put suspects and the entries that wait for them back to the front of the queue, in order.

        They are tried again from the start, since a suspect may be good. Files stay set aside.
        """
        files = [piece for piece in self._aside if not piece.is_suspect]
        entries = [entry for piece in self._aside if piece.is_suspect for entry in piece.entries] + self._held
        self._aside, self._held, self._judged = files, [], None
        for entry in sorted(entries, key=lambda entry: entry.position, reverse=True):
            self._queue.appendleft(_Piece([entry], is_part=True))


def _group(piece: _Piece) -> str:
    return group_of(piece.entries[0]) or ""


def _rejection(piece: _Piece, reason: str, detail: str) -> Rejection:
    (entry,) = piece.entries
    return named_rejection(entry.payload, Rejection(entry.position, reason, detail))
