# SPDX-License-Identifier: Apache-2.0
"""Sends the bytes of images and artifacts in pieces, so that other records need not wait for them.

`Sender` gives a `FileSender` each batch whose files the receiver may lack, and sends other batches between two pieces.
The `FileSender` sends each piece through an `Exchange`. Meanwhile the `SpoolReader` holds the stream of the batch.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from trackhub.delivery.backoff import Backoff
from trackhub.delivery.request_retry import Exchange
from trackhub.delivery.wire import Accepted, Busy, Chunk
from trackhub.open_without_links import open_plain
from trackhub.records import Blob
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.layout import blob_file
from trackhub.spool.reading import SpoolReader

__all__ = ["FileSender", "Pace", "Ready"]

_MIN_PIECE_BYTES = 16 << 10
_FIRST_PIECE_BYTES = 64 << 10
_PIECE_S = 1.0
_BATCH_S = 1.0  # records whose files have arrived wait no longer than this for further files
_LOST_AGAIN_S = 0.1
_log = logging.getLogger(__name__)


class Pace:
    """How many bytes to send in one piece, so that it takes about a second. A batch waits for one piece at most.

    Attributes:
        piece_bytes: the size of the next piece.
    """

    def __init__(self, max_bytes: int, timeout_s: float) -> None:
        """Start with small pieces.

        Args:
            max_bytes: the most bytes in a piece.
            timeout_s: the longest wait for the reply to a piece, in seconds. A piece should take a third of this time
                at most.
        """
        self._max_bytes = max_bytes
        self._piece_s = min(_PIECE_S, timeout_s / 3)
        self.piece_bytes = min(_FIRST_PIECE_BYTES, max_bytes)

    def arrived(self, size: int, took_s: float) -> None:
        """Note that the reply to a piece of ``size`` bytes came after ``took_s`` seconds."""
        if size < self.piece_bytes and took_s < self._piece_s:
            return  # a short last piece does not show whether a larger piece would be as quick
        self._set(size * min(2.0, self._piece_s / max(took_s, 1e-6)))

    def timed_out(self) -> None:
        """Note that no reply came in time."""
        self._set(self.piece_bytes / 2)

    def _set(self, size: float) -> None:
        self.piece_bytes = min(self._max_bytes, max(_MIN_PIECE_BYTES, int(size)))


class Ready(NamedTuple):
    """Records that can be sent now.

    Attributes:
        stream: the stream that has them.
        records: how many of the stream's next records can be sent. The record after them waits for its file.
    """

    stream: str
    records: int


@dataclass(slots=True)
class _Held:
    """A batch whose files are on their way.

    Attributes:
        batch: the batch.
        whole: how many of the batch's files, counted from the first, the receiver has completely.
        offset: where the next piece of the next file starts. None if the receiver must be asked first.
        whole_at: when the first file of this batch became whole, on the monotonic clock.
    """

    batch: SpoolBatch
    whole: int
    offset: int | None = None
    whole_at: float = math.inf


class FileSender:
    """Sends the files of one site, one piece at a time. Used by the sender's thread.

    The receiver says how much of a file it has, and the sender goes on from there. So a restart of either side repeats
    no piece that has arrived. A file that the receiver does not have whole stays in the spool.
    """

    def __init__(self, reader: SpoolReader, exchange: Exchange, max_bytes: int) -> None:
        """Prepare to send.

        Args:
            reader: reads the spool that holds the files.
            exchange: asks the receiver.
            max_bytes: the most bytes of a file in one request.
        """
        self._reader = reader
        self._exchange = exchange
        self._pace = Pace(max_bytes, exchange.timeout_s)
        self._held: deque[_Held] = deque()
        self._whole: set[str] = set()
        self._reached: dict[str, int] = {}
        self._not_before = 0.0
        self._backoff = Backoff(first_s=0.1, max_s=1.0)

    def has_all(self, batch: SpoolBatch) -> bool:
        """Return whether the receiver is known to have all files of a batch."""
        return self._whole.issuperset(blob.name for blob in batch.blobs)

    def hold(self, batch: SpoolBatch) -> None:
        """Send the files of a batch. The batch's stream is held until `send_piece` returns it."""
        whole = next(i for i, blob in enumerate(batch.blobs) if blob.name not in self._whole)
        self._reader.hold(batch.stream)
        self._held.append(_Held(batch, whole))

    def holds(self, stream: str) -> bool:
        """Return whether records of this stream wait for their files."""
        return any(held.batch.stream == stream for held in self._held)

    def has_work(self) -> bool:
        """Return whether there are files to send."""
        return bool(self._held)

    def wait_s(self) -> float:
        """Return after how many seconds `send_piece` should be called; 0 for at once."""
        return max(0.0, self._not_before - time.monotonic())

    def settled(self, batch: SpoolBatch) -> None:
        """Forget the files of a batch that was accepted or refused."""
        for blob in batch.blobs + batch.lost_blobs:
            self._whole.discard(blob.name)
            self._reached.pop(blob.name, None)

    def lost(self, name: str) -> None:
        """Say that the receiver has lost a file that it had whole. The file is sent again, after a moment."""
        self._whole.discard(name)
        self._not_before = time.monotonic() + _LOST_AGAIN_S

    def send_piece(self) -> Ready | None:
        """Send one piece of a file, in one request. Streams take turns, a whole file each.

        Returns:
            Records that can be sent now, if there are any. Their stream must be released.
        """
        held = self._held.popleft()
        blob = held.batch.blobs[held.whole]
        is_given_up = not self._send(held, blob)
        if blob.name in self._whole:
            held.whole, held.offset = held.whole + 1, None
            held.whole_at = min(held.whole_at, time.monotonic())
        is_done = is_given_up or held.whole == len(held.batch.blobs)
        if is_done or time.monotonic() >= held.whole_at + _BATCH_S:
            # At least one: if the first file was given up, a gap takes the place of its record.
            return Ready(held.batch.stream, max(1, held.whole))
        # One file after another, since a receiver keeps only a few incomplete files.
        if held.offset is None and blob.name in self._whole:
            self._held.append(held)
        else:
            self._held.appendleft(held)
        return None

    def _send(self, held: _Held, blob: Blob) -> bool:
        """Send a piece of a file. If the file must be given up, tell the reader so, and return False."""
        may_have_begun = blob.name in self._reached or blob.size > self._pace.piece_bytes
        must_ask = held.offset is None and may_have_begun
        offset = held.offset or 0
        data, problem = (b"", "") if must_ask else self._read(blob, offset)
        started = time.monotonic()
        reply = self._exchange.ask_once(Chunk(blob.name, blob.size, blob.sha256, offset, data))
        took_s = time.monotonic() - started
        if reply is None or isinstance(reply, Busy):
            if reply is None and took_s >= self._exchange.timeout_s:
                self._pace.timed_out()
            held.offset = None  # the receiver may have stored the piece although no reply came
            self._not_before = time.monotonic() + self._backoff.next_wait_s()
            return True
        self._backoff.reset()
        if not isinstance(reply, Accepted):
            _log.warning("the receiver refuses the file %s of site %s: %s", blob.name, self._reader.info.site, reply)
            self._reader.give_up_blob(blob.name)
            return False
        self._note_reached(blob, reply.next)
        if data:
            self._pace.arrived(len(data), took_s)
        held.offset = reply.next
        if not data and not must_ask and reply.next < blob.size:
            _log.warning("site %s cannot read the bytes of %s: %s", self._reader.info.site, blob.name, problem)
            self._reader.give_up_blob(blob.name)
            return False
        return True

    def _note_reached(self, blob: Blob, reached: int) -> None:
        if reached >= blob.size:
            self._whole.add(blob.name)
        if reached > self._reached.get(blob.name, 0):
            self._reached[blob.name] = reached
            self._exchange.note_progress()

    def _read(self, blob: Blob, offset: int) -> tuple[bytes, str]:
        """Return the next piece, and a problem to log in case the piece is empty and the receiver wants more."""
        try:
            with open(blob_file(self._reader.folder, blob.name), "rb", opener=open_plain) as file:
                file.seek(offset)
                return file.read(self._pace.piece_bytes), f"the file ends after {offset} of {blob.size} bytes"
        except OSError as e:
            # An empty piece asks whether the receiver has the blob. After a crash, the sender may repeat a record whose
            # blob was acknowledged and then deleted here.
            return b"", str(e)
