# SPDX-License-Identifier: Apache-2.0
"""The sender's end of the spool: follow all streams of a site, hand out batches, and delete what is acknowledged.

A sender has one reader. It looks at the folder once in a pass (`trackhub.spool.changed_streams`), and makes batches of
what is there (`trackhub.spool.stream_reader`). It retires the streams of writers that are gone
(`trackhub.spool.retire_streams`).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trackhub.errors import SpoolError
from trackhub.framing import MAX_BODY_BYTES
from trackhub.spool.acks import Ack, find_ack, read_ack, write_ack
from trackhub.spool.apply_policy import Withholding
from trackhub.spool.batch import Place, SpoolBatch
from trackhub.spool.changed_streams import End, FollowedStream, look, stream_ends
from trackhub.spool.counts import StreamCount, count_by_ledger, count_retired, count_stream
from trackhub.spool.layout import blob_file, ledger_file, segment_name, spool_info
from trackhub.spool.repeated_warnings import RepeatedWarnings
from trackhub.spool.retire_streams import Retirement
from trackhub.spool.skip_damage import DAMAGED, DamageLog
from trackhub.spool.stream_reader import Extent, SegmentReader, find_place
from trackhub.spool.stream_turns import Turns
from trackhub.spool.writer_ledger import LedgerCounts, WriterState, read_ledger, writer_state

__all__ = ["RETIRED", "SpoolReader"]

RETIRED = "retired"
"""The key in `SpoolReader.counts` for the counts of all retired streams together."""

_ASK_EVERY_S = 1.0  # how often to ask whether each stream's writer lives. It takes some 10 us for each stream
_KEPT_STREAMS = 32
"""A stream is done if its writer has ended and its readable records are acknowledged. If more streams than this are
done, the reader retires some of them, until half of this number is left. The streams that are left keep their last
segment. If the receiver's disk loses acknowledged records, a replay sends them again from these segments."""
_KEPT_SHARE = 8  # the reader also retires streams when their segments take more than an eighth of the spool
_log = logging.getLogger(__name__)


class SpoolReader:
    """Follows all streams of a spool for one receiver. One thread uses it, except where a method says otherwise.

    Each receiver of a site has a reader with a name of its own. Files are deleted when all readers have passed them.

    If a stream cannot be read, the reader logs that, skips the stream in this pass, and delivers the others.

    Attributes:
        folder: the spool's folder.
        cursor: the reader's name.
        info: what the spool is, as known when the reader was made.
    """

    def __init__(self, folder: Path, cursor: str) -> None:
        """Start at the places that the reader of this name has reached.

        Args:
            folder: the spool's folder.
            cursor: the reader's name.

        Raises:
            SpoolError: the folder holds no spool and none is expected there, or the spool has no reader of this name.
            ConfigError: the spool's rules for what may leave the site cannot be read.
        """
        self.folder = folder
        self.cursor = cursor
        self.info = spool_info(folder)
        if cursor not in self.info.cursors:
            raise SpoolError(
                f"the spool in {folder} has no reader named {cursor!r}, only {', '.join(self.info.cursors)}; name one "
                "of these, or create the spool with this reader"
            )
        self._streams: dict[str, FollowedStream] = {}
        self._turns = Turns(folder / f"{cursor}.turn")
        self._ready: deque[FollowedStream] = deque()
        self._pass_is_explicit = False
        self._is_final = False
        self._ask_at = 0.0
        self._has_looked = False
        self._retirement: Retirement | None = None
        self._is_swept = False
        self._damage = DamageLog()
        self._segments = SegmentReader(folder, self._damage)
        self._withholding = Withholding.for_reader(self.info.policy, cursor)
        self._round_ends = False
        self._warnings = RepeatedWarnings(_log)

    def begin_pass(self, *, final: bool = False, round_ends: bool = False) -> None:
        """Look at the folder. ``next_batch`` hands out the records that are there now, and then returns None.

        A record that is logged during the pass causes no further batch, but a batch that is due anyway may include it.
        Otherwise each record of a busy trainer would travel in a message of its own.

        Args:
            final: True if all writers have ended. Then an incomplete frame at the end of a stream is damage.
            round_ends: True if the last records in the spool count as the last of their round. A policy may let only
                the last value of a round leave.

        Raises:
            OSError: the folder cannot be read.
        """
        self._pass_is_explicit = True
        self._round_ends = round_ends
        self._look(final)

    def next_batch(self, max_records: int, max_bytes: int, *, final: bool = False) -> SpoolBatch | None:
        """Return the next unacknowledged frames of one stream, or None if there are none. Streams take turns.

        Until ``settle`` is called for a stream, that stream's next batch starts with the same frame. Without
        ``begin_pass``, this looks at the folder itself when it has nothing left to hand out.

        Args:
            max_records: most records in the batch.
            max_bytes: most bytes of frames. The first frame may be larger.
            final: as for ``begin_pass``; ignored if ``begin_pass`` was called.

        Raises:
            OSError: the folder cannot be read.
        """
        has_looked = False
        while True:
            while self._ready:
                stream = self._ready[0]
                if (batch := self._read(stream, max_records, max_bytes)) is not None:
                    self._ready.rotate(-1)
                    self._turns.take(stream.name)
                    return batch
                self._ready.popleft()
            if self._pass_is_explicit or has_looked:
                self._pass_is_explicit = False
                return None
            self._look(final)
            has_looked = True

    def hold(self, name: str) -> None:
        """Hand out nothing of this stream until ``release`` is called, since its next records wait for their files."""
        stream = self._streams[name]
        stream.is_held = True
        with contextlib.suppress(ValueError):
            self._ready.remove(stream)

    def release(self, name: str, max_records: int, max_bytes: int) -> SpoolBatch | None:
        """Hand out this stream again, and return its next batch. None if there is none.

        Args:
            name: a stream that is held.
            max_records, max_bytes: as for ``next_batch``.
        """
        stream = self._streams[name]
        stream.is_held = False
        batch = self._read(stream, max_records, max_bytes)
        if batch is not None:
            self._turns.take(name)
        return batch

    def has_problems(self) -> bool:
        """Return whether a stream could not be read in this pass."""
        return any(stream.problem for stream in self._streams.values())

    def unplaced_streams(self) -> list[str]:
        """Return the streams whose ``.ack`` file is missing or damaged. Ask the receiver about them, and call `place`.

        Only streams of this reader's first look are returned. A stream that appears later starts at its beginning.
        """
        return [stream.name for stream in self._streams.values() if not stream.is_placed]

    def has_lost_beginning(self) -> bool:
        """Return whether the spool lacks the first records of an unplaced stream. They are delivered or lost."""
        return any(stream.first_segment > 0 for stream in self._streams.values() if not stream.is_placed)

    def place(self, name: str, next_seq: int, acked: int) -> None:
        """Place an unplaced stream: continue after the records that the receiver has.

        If a segment cannot be read, the stream stays unplaced, and is skipped until the next look at the folder.

        Args:
            name: the stream.
            next_seq: the number of the record that the receiver expects next; 0 if it has nothing of the stream.
            acked: how many records of the stream the receiver has.
        """
        stream = self._streams[name]
        if next_seq > 0:
            segments = range(max(0, stream.first_segment), stream.last_segment + 1)
            stream.ack = Ack(segments.start, next_seq=next_seq, acked=acked)  # enough for `counts` until it is found
            try:
                place = find_place(self.folder, name, segments, next_seq)
            except OSError as e:
                self._set_aside(stream, e)
                return
            stream.ack = Ack(place.segment, place.offset, next_seq, acked)
            with contextlib.suppress(OSError):  # a full disk; it is stored with the next batch
                write_ack(self.folder, name, self.cursor, stream.ack)
        stream.is_placed = True

    def settle(self, batch: SpoolBatch, refused: Mapping[str, int] | None = None) -> None:
        """Store the receiver's reply to the batch. Delete the files that no reader needs any more.

        Args:
            batch: what ``next_batch`` returned last for its stream.
            refused: reason -> how many of the batch's records the receiver refused; None if it accepted all.

        Raises:
            OSError: the reader's place cannot be stored; the batch will be sent again after a restart.
        """
        stream = self._streams[batch.stream]
        old = stream.ack
        ack = old.after(batch, refused or {})
        try:
            write_ack(self.folder, batch.stream, self.cursor, ack)
        finally:
            # Set this last, also if the write failed: a thread that waits for it may read the file then.
            stream.ack = ack
        stream.is_placed = True
        self._delete_settled(batch, old)

    def give_up_blob(self, name: str) -> None:
        """Give up a blob that cannot be read, or is refused. A gap replaces its record, which is dropped as damaged."""
        self._segments.lost_blobs.add(name)

    def ends(self) -> dict[str, End]:
        """Return where each stream ends now. Streams that are done or held are left out. May be called from any thread.

        Raises:
            OSError: the folder cannot be read.
        """
        return stream_ends(self.folder, self._is_passed_over)

    def has_bytes(self, at_least: int) -> bool:
        """Return whether this many bytes wait to be settled, or a stream has begun a new segment. Reads only sizes.

        Raises:
            OSError: the folder cannot be read.
        """
        waiting = 0
        for name, (segment, offset) in self.ends().items():
            ack = self._ack(name)
            if segment > ack.segment:
                return True
            waiting += offset - ack.offset
        return waiting >= at_least

    def is_past(self, ends: dict[str, End]) -> bool:
        """Return whether everything before these places is settled. May be called from any thread.

        Args:
            ends: what ``ends`` returned.
        """
        acks = {name: self._ack(name) for name in ends}
        return all((acks[name].segment, acks[name].offset) >= end for name, end in ends.items())

    def streams(self) -> list[str]:
        """Return the names of all streams that have files, except the retired ones.

        Raises:
            OSError: the folder cannot be read.
        """
        self._look(final=False)
        return list(self._streams)

    def live_stream(self) -> str | None:
        """Return the name of a stream whose writer lives, or None if there is none.

        Raises:
            OSError: the folder cannot be read.
        """
        self._look(final=True)
        return next((s.name for s in self._streams.values() if s.state is WriterState.ALIVE), None)

    def counts(self, *, until: float | None = None, by_ledger: bool = False) -> dict[str, StreamCount]:
        """Return what became of each stream's records. Reads the unsettled part of the spool to count it.

        Args:
            until: stop reading at this moment of the monotonic clock. The streams that are not read by then are counted
                by their ledgers, which do not know of damage.
            by_ledger: read no records, and count everything by the ledgers.

        Returns:
            Stream -> its count. `RETIRED` has the counts of all retired streams.

        Raises:
            OSError: the folder cannot be read.
        """
        self._look(final=False)
        counts = {name: self._count(stream, until, by_ledger) for name, stream in self._streams.items()}
        assert self._retirement is not None
        if self._retirement.total.streams:
            counts[RETIRED] = count_retired(self._retirement.total)
        return counts

    def retired_streams(self) -> int:
        """Return how many streams are retired."""
        return 0 if self._retirement is None else self._retirement.total.streams

    def tidy_up(self) -> None:
        """Delete files that a crash left over, and the files of ended streams if these are many or large.

        Call it after a pass, and only while this process holds the lock of `trackhub.spool.reader_lock`. Never raises.
        """
        try:
            if not self._is_swept:
                self._sweep()
            self._retire()
        except OSError as e:
            _log.debug("cannot tidy up %s: %s", self.folder, e)

    def _is_passed_over(self, name: str) -> bool:
        stream = self._streams.get(name)
        return stream is not None and (stream.is_done or stream.is_held)

    def _ack(self, name: str) -> Ack:
        stream = self._streams.get(name)
        return Ack() if stream is None else stream.ack

    def _look(self, final: bool) -> None:
        """Look at the folder, and note which streams have something to hand out."""
        if self._retirement is None:
            self._retirement = Retirement(self.folder, self.cursor, self.info.cursors)
        self._ask_writers(final)
        is_first = not self._streams
        look(self.folder, self._streams, self._new_stream)
        if is_first and self._streams:
            self._turns.begin(self._streams)
        self._has_looked = True
        self._turns.add(self._streams)
        self._is_final = final
        self._ready = deque(
            stream
            for stream in map(self._streams.__getitem__, self._turns)
            if not (stream.is_done or stream.is_held)
            and (final or stream.is_behind() or stream.state is WriterState.ENDED)
        )

    def _ask_writers(self, final: bool) -> None:
        """Ask which writers live.

        Do it before the look, so that the look shows everything that an ended writer has left.
        """
        now = time.monotonic()
        if final or now >= self._ask_at:
            self._ask_at = now + _ASK_EVERY_S
            for stream in self._streams.values():
                if not stream.is_done:
                    stream.state = writer_state(ledger_file(self.folder, stream.name))

    def _new_stream(self, name: str) -> FollowedStream | None:
        assert self._retirement is not None
        if self._retirement.has(name):
            return None
        ack = find_ack(self.folder, name, self.cursor)
        stream = FollowedStream(name, ack or Ack())
        stream.is_placed = ack is not None or self._has_looked
        # This look may miss records that the writer appends now. So do not mark the writer as ended here. A later look
        # does so, when it has found everything that the writer left.
        if writer_state(ledger_file(self.folder, name)) is WriterState.ALIVE:
            stream.state = WriterState.ALIVE
        return stream

    def _read(self, stream: FollowedStream, max_records: int, max_bytes: int) -> SpoolBatch | None:
        """Return the stream's next batch of this pass. None if there is none, or it cannot be read."""
        if stream.problem:
            self._name_problem(stream, stream.problem)
            return None
        if stream.is_behind() or self._is_final:
            ack = stream.ack
            extent = Extent(stream.name, stream.last_segment, self._is_final or stream.state is WriterState.ENDED)
            place = Place(ack.next_seq, ack.segment, ack.offset)
            try:
                batch = self._segments.next_batch(extent, place, max_records, max_bytes)
            except OSError as e:
                self._set_aside(stream, e)
                return None
            if batch is not None:
                return batch if self._withholding is None else self._withhold(self._withholding, stream, batch)
        stream.is_done = stream.state is WriterState.ENDED
        return None

    def _withhold(self, withholding: Withholding, stream: FollowedStream, batch: SpoolBatch) -> SpoolBatch | None:
        """Return the part of a batch that may leave.

        Return None if the policy needs later records, or the end of the round, to decide about the first record.
        """
        ended = self._round_ends or self._is_final or stream.state is WriterState.ENDED
        if stream.undecided_end == stream.end and not ended:
            return None
        more = (batch.segment, batch.offset) < stream.end
        left = withholding.apply(batch, stream.ack.seen, more=more, ended=ended and not more)
        stream.undecided_end = stream.end if left is None else None
        return left

    def _set_aside(self, stream: FollowedStream, error: OSError) -> None:
        """Skip this stream until the next look at the folder."""
        stream.problem = f"{error.filename or 'a segment'}: {error.strerror}"
        self._name_problem(stream, stream.problem)

    def _name_problem(self, stream: FollowedStream, problem: str) -> None:
        """Warn that a stream cannot be read. A pass comes often, so warn at most once a minute."""
        self._warnings.warn(
            stream.name,
            f"stream {stream.name} of the spool in {self.folder} cannot be read ({problem}). Its records are counted "
            "as unreadable. Other streams are delivered, and this one is tried again. Give the sender's user the right "
            "to read its files, or check the disk",
        )

    def _delete_settled(self, batch: SpoolBatch, old: Ack) -> None:
        """Delete segments and blobs that every reader has passed. If it fails, they stay until their stream retires."""
        others = [read_ack(self.folder, batch.stream, c) for c in self.info.cursors if c != self.cursor]
        reached = min([batch.segment, *(other.segment for other in others)])
        with contextlib.suppress(OSError):
            self._delete_blobs(batch.next_seq, [blob.name for blob in batch.blobs + batch.lost_blobs], others)
            for segment in range(max(0, old.segment - 1), reached):
                (self.folder / segment_name(batch.stream, segment)).unlink(missing_ok=True)

    def _delete_blobs(self, next_seq: int, names: list[str], others: list[Ack]) -> None:
        """Delete those of these blobs whose records every reader has passed."""
        reached = min([next_seq, *(other.next_seq for other in others)])
        for name in names:
            if int(name.rpartition("-")[2]) < reached:
                blob_file(self.folder, name).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Delete files that an earlier reader should have deleted, and left when it died."""
        assert self._retirement is not None
        self._retirement.clean_up()
        for stream in self._streams.values():
            others = [read_ack(self.folder, stream.name, c) for c in self.info.cursors if c != self.cursor]
            blobs = [name.removesuffix(".blob") for name in stream.files if name.endswith(".blob")]
            self._delete_blobs(stream.ack.next_seq, blobs, others)
        self._is_swept = True

    def _retire(self) -> None:
        """If many or large streams are done, retire some: at most 16 stay, with at most an eighth of the spool."""
        done = [stream for stream in self._streams.values() if stream.is_done]
        for part in (name for stream in done for name in stream.files if name.endswith(".part")):
            (self.folder / part).unlink(missing_ok=True)  # the writer was killed while it wrote this file
        size = sum(stream.size for stream in done)
        most = self.info.max_bytes // _KEPT_SHARE
        if self._retirement is None or (len(done) <= _KEPT_STREAMS and size <= most):
            return
        chosen: list[FollowedStream] = []
        for stream in done:
            if len(done) - len(chosen) <= _KEPT_STREAMS // 2 and size <= most:
                break
            chosen.append(stream)
            size -= stream.size
        # First count, since that reads the files. Then delete the data, which makes room on a full disk. Then store the
        # counts in that room.
        counts = {stream.name: self._count(stream, None, by_ledger=False) for stream in chosen}
        self._retirement.free({stream.name: stream.ack for stream in chosen})
        self._retirement.retire(counts)
        for stream in chosen:
            del self._streams[stream.name]
            self._turns.remove(stream.name)

    def _count(self, stream: FollowedStream, until: float | None, by_ledger: bool) -> StreamCount:
        # Read the ledger first. Otherwise records that are logged during the count would seem to be missing.
        try:
            ledger = read_ledger(ledger_file(self.folder, stream.name))
        except OSError as e:
            self._name_problem(stream, f"{e.filename}: {e.strerror}")
            count = self._count_with(LedgerCounts(0, {}, {}, 0, is_counted=False), stream, until, by_ledger)
            return msgspec.structs.replace(count, is_complete=False)
        return self._count_with(ledger, stream, until, by_ledger)

    def _count_with(
        self, ledger: LedgerCounts, stream: FollowedStream, until: float | None, by_ledger: bool
    ) -> StreamCount:
        ack = stream.ack
        if stream.problem:
            return count_by_ledger(ack, ledger, is_readable=False)
        if by_ledger and not stream.is_done:
            return count_by_ledger(ack, ledger)
        place, spooled, explained = Place(ack.next_seq, ack.segment, ack.offset), 0, Counter(ack.explained)
        extent = Extent(stream.name, stream.last_segment, has_ended=True)
        try:
            while not stream.is_done and (batch := self._segments.next_batch(extent, place, 1 << 30, MAX_BODY_BYTES)):
                if until is not None and time.monotonic() >= until:
                    return count_by_ledger(ack, ledger)
                spooled += batch.records
                explained.update(batch.explained)
                place = batch.next_place
        except OSError as e:
            self._set_aside(stream, e)
            return count_by_ledger(ack, ledger, is_readable=False)
        logged = max(ledger.logged, place.seq)
        count = count_stream(ack, logged=logged, dropped=ledger.dropped, spooled=spooled, explained=explained)
        if (tail := count.dropped.get(DAMAGED, 0) - explained[DAMAGED]) > 0:
            self._damage.missing_tail(self.folder, stream.name, tail, logged)
        # Only the receiver knows whether missing records at the start of an unplaced stream were delivered or lost.
        knows_begin = stream.is_placed or stream.first_segment == 0 or count.logged == 0
        is_complete = knows_begin and (ledger.is_counted or place.seq > 0)
        return msgspec.structs.replace(count, altered=ledger.left_out, is_complete=is_complete)
