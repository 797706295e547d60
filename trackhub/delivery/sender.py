# SPDX-License-Identifier: Apache-2.0
"""The sender: follows a site's spool, and sends what appears in it to one receiver, batch by batch.

The FLARE widgets, `trackhub.local_tracking`, a replay or another system's transport creates it. It reads the spool with
`trackhub.spool.reading`, makes its requests through a `Channel`, and marks in the spool what the receiver has accepted.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import msgspec

from trackhub.delivery.channel import Channel
from trackhub.delivery.count_spool_passes import SpoolPasses
from trackhub.delivery.file_sender import FileSender, Ready
from trackhub.delivery.request_retry import Exchange
from trackhub.delivery.sender_session import Session
from trackhub.delivery.wire import (
    MAX_STREAMS,
    Accepted,
    Batch,
    NeedBlob,
    Refused,
    Reply,
    SiteCounts,
    SiteFacts,
    StreamState,
)
from trackhub.errors import SpoolError
from trackhub.job_and_run_info import RunStatus
from trackhub.limits import Limits
from trackhub.printable import printable
from trackhub.process_lock import ProcessLock
from trackhub.runnable_commands import command_for
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.counts import StreamCount, add_up
from trackhub.spool.layout import close_spool
from trackhub.spool.reader_lock import SpoolHold
from trackhub.spool.reading import SpoolReader
from trackhub.spool.repeated_warnings import RepeatedWarnings
from trackhub.spool.round_file import RoundFile

__all__ = ["Sender"]

_ENOUGH_BYTES = 64 << 10  # a thousand records of one metric; the sender does not wait for more than this
_FILES_S = 1.0  # how long a flush waits for files. A large file on a slow channel must not delay each round.
_JOIN_MARGIN_S = 1.0  # for the work of the thread after its last request
_COUNT_S = 1.0  # for reading a spool to count its records. The ledgers count whatever is left unread.
_log = logging.getLogger(__name__)


class Sender:
    """Sends one spool to one receiver, from a thread of its own. Its methods may be called from any thread.

    One request is on its way at a time. A batch is repeated until the receiver accepts or refuses it. Files are sent in
    pieces. Between two pieces, the sender sends the batches that are due. No error reaches the training: what cannot be
    sent stays in the spool, and the log says so.

    A sender sends only while it holds the lock of its cursor. It waits while another sender or a replay holds it.

    Attributes:
        site: the site that the spool belongs to.
        folder: the spool's folder.
        facts: further facts about the site, which the transport sets. They may change until ``close``.
        job_status: how the job ends, as the receiver said in reply to the final message. None if it did not say so.
    """

    def __init__(
        self,
        spool: Path,
        channel: Channel,
        *,
        cursor: str = "server",
        limits: Limits | None = None,
        lock: ProcessLock | None = None,
    ) -> None:
        """Prepare a sender; ``start`` starts it.

        Args:
            spool: the spool's folder, which was given to `create_spool`. If the disk was full, the spool may still be
                missing there. ``cursor`` must be one of its cursors.
            channel: carries the requests to the receiver. Called from the sender's thread alone.
            cursor: the name of the receiver that this sender serves. Each receiver of a site has a sender and a cursor.
            limits: sizes, pauses and waits, as in `trackhub.limits.Limits`.
            lock: the lock of this cursor, if the caller has taken it. The sender gives it back when it ends.

        Raises:
            SpoolError: the folder holds no spool and none is expected there, or the spool has no such cursor.
            ConfigError: the spool's rules for what may leave the site cannot be read.
        """
        self.folder = spool
        self.facts = SiteFacts()
        self.job_status: RunStatus | None = None
        self._limits = limits or Limits()
        self._reader = SpoolReader(spool, cursor)
        self.site = self._reader.info.site
        self._round = RoundFile(spool, sets=True)
        self._hold = SpoolHold(spool, cursor, lock)
        # At most half of the silence that the receiver tolerates. A sender that waits for a reply sends nothing else.
        # With a longer wait, one lost reply would make the site look dead.
        request_s = min(self._limits.request_s, self._limits.silence_s / 2)
        self._exchange = Exchange(
            channel, site=self.site, timeout_s=request_s, longest_s=self._limits.sites_s,
            max_bytes=self._limits.batch_bytes,
        )  # fmt: skip
        self._files = FileSender(self._reader, self._exchange, self._limits.batch_bytes)
        self._passes = SpoolPasses()
        self._wake = threading.Event()
        self._sent_at = -math.inf
        self._keep_alive_at = time.monotonic()
        self._session = Session()
        self._refused: Refused | None = None
        self._failed = False
        self._warnings = RepeatedWarnings(_log)
        self._counts = SiteCounts()
        self._thread = threading.Thread(target=self._main, name=f"trackhub-sender-{cursor}", daemon=True)

    def start(self) -> None:
        """Start sending. Call it once."""
        self._thread.start()

    def set_round(self, value: int | None) -> None:
        """Set the federated round that the site's writers put on their records from now on; None outside rounds."""
        self._round.set(value)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the receiver has all that was logged before this call. It waits at most a second for files.

        Returns False at once if the receiver refused the site, if the sender does not run, or if the previous flush
        timed out and the receiver has not replied since. So a receiver that does not reply costs one timeout, not one
        per round. If a part of the spool cannot be read, it returns False as soon as the receiver has the rest.

        Args:
            timeout_s: the longest wait, in seconds; by default ``limits.barrier_s``.

        Returns:
            True if the receiver has all of it, except for images and artifacts that are still on their way.
        """
        deadline = time.monotonic() + (self._limits.barrier_s if timeout_s is None else timeout_s)
        try:
            ends = None if self._hold.is_waiting_for_room() else self._reader.ends()
        except OSError:
            ends = None  # the next pass fails in the same way, and logs why
        passes = self._passes
        with passes.changed:
            has_replied = passes.replies_at_timeout != self._exchange.replies
            if not has_replied or self._refused is not None or not self._thread.is_alive():
                return False
            # A running pass may have looked at the spool before this call. The next pass looks after this call.
            target = passes.done + (2 if passes.running else 1)
            passes.waiting += 1
            was_complete = True
            try:
                while passes.done < target:
                    if ends is not None and self._reader.is_past(ends):
                        break
                    self._wake.set()  # each time, since the sender clears it when it wakes
                    left_s = deadline - time.monotonic()
                    if not self._thread.is_alive():
                        return False  # `_main` has logged why
                    if left_s <= 0:
                        self._give_up_flush()
                        return False
                    # Wait for one poll at most. The reader may get past the ends in the middle of a pass, and nothing
                    # notifies this thread then.
                    passes.changed.wait(min(left_s, self._limits.poll_s))
                else:
                    was_complete = passes.was_complete
                left_s = 0.0 if passes.is_slow else min(_FILES_S, max(0.0, deadline - time.monotonic()))
                passes.is_slow = not passes.changed.wait_for(lambda: not passes.files_left, left_s)
                return was_complete
            finally:
                passes.waiting -= 1

    def _give_up_flush(self) -> None:
        self._passes.replies_at_timeout = self._exchange.replies
        _log.warning(
            "the receiver did not acknowledge the records of site %s in time; training goes on, and does not wait "
            "again until the receiver replies; the records stay in %s",
            self.site, self.folder,
        )  # fmt: skip

    def close(self, timeout_s: float, *, failed: bool = False) -> SiteCounts:
        """Send the final message and stop. Before you call it, close all of the site's writers.

        Blocks up to ``timeout_s``, plus the time for one request and two seconds. While a file still progresses, it
        blocks up to ``limits.files_s``, unless ``timeout_s`` is 0. Marks the spool as closed, so that no ``Writer()``
        finds it through a leftover environment variable. Does not raise. Idempotent.

        Args:
            timeout_s: the longest time to try, in seconds. Records that are not acknowledged by then stay in the spool.
            failed: the site's training ended with an error.

        Returns:
            What became of every record of the site.
        """
        self._failed = failed
        now = time.monotonic()
        self._exchange.close_by(now + timeout_s, now + self._limits.files_s if timeout_s > 0 else now)
        self._wake.set()
        if self._thread.ident is None:  # it was not started
            self._hold.take(at_once=True)
            self._count(until=time.monotonic() + timeout_s)
            self._end()
        else:
            self._join()
        if self._thread.is_alive():
            # The channel does not return. Only the sender's thread may count with the reader.
            self._counts = msgspec.structs.replace(self._counts, complete=False)
            _log.warning(
                "the sender of site %s does not return from a request. After the job, deliver what is left with "
                "`%s`", self.site, command_for("trackhub replay", self.folder),
            )  # fmt: skip
        self._say_what_is_left()
        return self._counts

    def _join(self) -> None:
        """Wait until the thread has ended, or until it is clear that a request does not return."""
        while self._thread.is_alive():
            request_s = max(self._exchange.timeout_s, self._exchange.in_flight_s())
            self._thread.join(self._exchange.left_s() + request_s + _COUNT_S + _JOIN_MARGIN_S)
            if self._exchange.is_late():  # otherwise a file's progress has moved the deadline
                return

    def counts(self) -> SiteCounts:
        """Return what became of the site's records, as of the last keep-alive or ``close``."""
        return self._counts

    def _main(self) -> None:
        try:
            self._run()
        except Exception:  # a defect of trackhub; training must go on
            self._counts = msgspec.structs.replace(self._counts, complete=False)
            _log.exception(
                "the sender of site %s ended unexpectedly. Its records stay in its spool; after the job, run `%s`",
                self.site, command_for("trackhub replay", self.folder),
            )  # fmt: skip
        finally:
            self._end()
            with self._passes.changed:
                self._passes.changed.notify_all()

    def _run(self) -> None:
        while not self._exchange.is_closing():
            pause_s = self._limits.poll_s
            if self._refused is not None:
                pause_s = self._limits.keepalive_s  # nothing to do but to wait for ``close``
            elif self._hold.take():
                if self._is_time_to_send():
                    self._pass(final=False)
                self._keep_alive()
                self._send_files()
                if self._files.has_work():
                    pause_s = min(pause_s, self._files.wait_s())
            self._wake.wait(pause_s)
            self._wake.clear()
        is_owner = self._hold.take(at_once=True)
        if is_owner:
            self._send_rest()
        self._count(until=time.monotonic() + max(self._exchange.left_s(), _COUNT_S))
        if self._refused is None and is_owner:
            reply = self._exchange.ask(self._session.final(self._counts, failed=self._failed))
            if isinstance(reply, Accepted) and reply.status in set(RunStatus):
                self.job_status = RunStatus(reply.status)

    def _send_rest(self) -> None:
        """Send all that is left. All writers are closed, so no record comes later."""
        while True:
            self._pass(final=True)
            if self._refused is not None or self._exchange.is_late() or not self._files.has_work():
                return
            self._exchange.pause(self._files.wait_s())
            self._keep_alive()
            self._send_files()

    def _keep_alive(self) -> None:
        if time.monotonic() >= self._keep_alive_at:
            self._keep_alive_at = time.monotonic() + self._limits.keepalive_s
            self._count()
            # One attempt is enough, since the next keep-alive carries newer counts.
            self._exchange.ask_once(self._session.keep_alive(self._counts))

    def _send_files(self) -> None:
        """Send pieces of files, and the records whose files have arrived, until it is time to look at the spool."""
        until = time.monotonic() + self._limits.poll_s
        while self._files.has_work() and self._files.wait_s() == 0 and not self._exchange.is_late():
            ready = self._files.send_piece()
            if ready is not None:
                self._deliver_ready(ready)
            if time.monotonic() >= until:
                break
        self._passes.note_files(left=self._files.has_work())

    def _deliver_ready(self, ready: Ready) -> None:
        """Send records whose files have arrived, then the stream's next records, until one must wait for its file."""
        most = ready.records
        while batch := self._reader.release(ready.stream, most, self._exchange.pace.max_bytes):
            if not self._deliver(batch) or self._files.holds(ready.stream):
                return
            most = self._limits.batch_records

    def _end(self) -> None:
        """Mark the spool as closed, and give up its ownership."""
        if self._hold.is_owner and not self._hold.is_waiting_for_room():
            try:
                close_spool(self.folder)
            except SpoolError as e:
                _log.warning("site %s cannot mark its spool as closed: %s", self.site, e)
        self._hold.release()

    def _say_what_is_left(self) -> None:
        if left := self._counts.spooled + self._counts.unreadable:
            _log.warning(
                "site %s: %d records were not acknowledged; they stay in %s. Deliver them with `%s`",
                self.site, left, self.folder, command_for("trackhub replay", self.folder),
            )  # fmt: skip

    def _is_time_to_send(self) -> bool:
        """Return whether a flush waits, the last batch was ``linger_s`` ago, or there are enough bytes for a batch."""
        if time.monotonic() >= self._sent_at + self._limits.linger_s or self._passes.waiting > 0:
            return True
        try:
            return self._reader.has_bytes(_ENOUGH_BYTES)
        except OSError:
            return True  # the pass fails in the same way, and logs why

    def _pass(self, *, final: bool) -> None:
        """Send all that is in the spool now, unless the receiver refuses the site or the deadline passes."""
        self._passes.begin()
        self._round.look_again()  # the round's file may have been missing on a full disk
        if self._greet() and (complete := self._drain(final)) is not None:
            self._reader.tidy_up()
            self._passes.end(complete=complete)

    def _greet(self) -> bool:
        """Say hello, once. Return False if the receiver refuses the site, or does not reply before the deadline."""
        if self._session.is_greeted:
            return True
        if self._refused is not None:
            return False
        reply = self._exchange.ask(self._session.hello())
        if isinstance(reply, Refused):
            self._refused = reply
            _log.error("the receiver refuses site %s (%s): %s; its records stay in %s. Remove the cause, and deliver "
                       "them with `%s` after the job", self.site, *reply.for_log(), self.folder,
                       command_for("trackhub replay", self.folder))  # fmt: skip
            return False
        self._session.is_greeted = reply is not None
        return self._session.is_greeted

    def _drain(self, final: bool) -> bool | None:
        """Send what the spool has now.

        Args:
            final: True if no writer is alive any more. Then nothing follows the last record of a stream.

        Returns:
            True if everything could be read, False if not; None if the deadline passed first.
        """
        is_first = True  # after the deadline, one batch is still tried: the deadline may be 0
        try:
            self._reader.begin_pass(final=final, round_ends=self._passes.waiting > 0)
            if not self._place_streams():
                return None
            while batch := self._reader.next_batch(self._limits.batch_records, self._exchange.pace.max_bytes):
                if not is_first and self._exchange.is_late():
                    return None
                is_first = False
                if not self._deliver(batch):
                    return None
        except OSError as e:
            self._warnings.warn(
                "read",
                f"site {self.site} cannot read its spool in {self.folder}: {e}. The sender tries again. See whether "
                "the folder is there and readable, and whether its disk is sound",
            )
            return False
        return not self._reader.has_problems() and not self._hold.is_waiting_for_room()

    def _place_streams(self) -> bool:
        """Ask the receiver what it has of the streams whose ``.ack`` file is lost. Return False if it does not reply.

        Without this, records that the receiver has would count as lost if the spool has deleted them, and would be sent
        again if it has not.
        """
        unplaced = self._reader.unplaced_streams() if self._session.may_ask else []
        for i in range(0, len(unplaced), MAX_STREAMS):
            names = tuple(unplaced[i : i + MAX_STREAMS])
            reply = self._exchange.ask(self._session.hello(names))
            if reply is None:
                return False
            if not isinstance(reply, Accepted) or reply.job != self._reader.info.job:
                # The receiver is of another job, or its journal begins in the middle of this job. So the sender sends
                # all that the spool has.
                self._session.may_ask = False
                self._session.is_unsure = self._reader.has_lost_beginning()
                return True
            for name in names:
                state = reply.streams.get(name, StreamState(0, 0))
                self._reader.place(name, state.next_seq, state.records)
        return True

    def _deliver(self, batch: SpoolBatch) -> bool:
        """Send a batch and settle it, or hold it until its files have arrived.

        Returns:
            False if the deadline passes first.
        """
        if not self._files.has_all(batch):
            self._files.hold(batch)
            self._passes.note_files(left=True)
            return True
        batch, reply = self._ask(batch)
        if reply is None:
            return False
        if isinstance(reply, NeedBlob):
            if any(blob.name == reply.name for blob in batch.blobs):
                # The receiver had acknowledged the blob, and has lost it. Send the blob and the batch again.
                self._files.lost(reply.name)
                self._files.hold(batch)
                return True
            reply = Refused("blob_unknown", reply.name)
        refused: Mapping[str, int] = {}
        if isinstance(reply, Refused):
            refused = {reply.reason: batch.records}
            _log.error("the receiver refused %d records of site %s (%s): %s", batch.records, self.site,
                       *reply.for_log())  # fmt: skip
        elif isinstance(reply, Accepted) and reply.refused and sum(reply.refused.values()) <= batch.records:
            refused = reply.refused
            _log.error(
                "the receiver refused some of %d records of site %s, by reason: %s; see docs/delivery.md",
                batch.records, self.site, printable(", ".join(f"{reason} {n}" for reason, n in refused.items())),
            )  # fmt: skip
        self._settle(batch, refused)
        return True

    def _ask(self, batch: SpoolBatch) -> tuple[SpoolBatch, Reply | None]:
        """Send a batch, or only its first records if the channel is too slow for it.

        Return what was sent, and the reply.
        """

        def shorten() -> Batch:
            nonlocal batch
            first = self._reader.release(batch.stream, batch.records, self._exchange.pace.max_bytes)
            if first is not None and first.next_seq <= batch.next_seq:  # None if the segment cannot be read now
                batch = first
            return _request(batch)

        reply = self._exchange.ask(_request(batch), shorten)
        return batch, reply

    def _settle(self, batch: SpoolBatch, refused: Mapping[str, int]) -> None:
        """Mark a batch in the spool as accepted, except for the records that the receiver refused."""
        self._sent_at = time.monotonic()
        self._files.settled(batch)
        try:
            self._reader.settle(batch, refused)
        except OSError as e:
            again = "after a restart, it sends these records again"
            self._warnings.warn("settle", f"site {self.site} cannot store how far it got: {e}; {again}")

    def _count(self, until: float | None = None) -> None:
        """Count the site's records. Without ``until``, only the ledgers are read, which is fast."""
        try:
            counts = _site_counts(self._reader.counts(until=until, by_ledger=until is None).values())
        except OSError as e:
            counts = msgspec.structs.replace(self._counts, complete=False)
            self._warnings.warn("count", f"site {self.site} cannot count its spool: {e}; trying again")
        if self._hold.is_waiting_for_room() or self._session.is_unsure:
            counts.complete = False
        counts.retries = self._exchange.retries
        self.facts.add_to(counts)
        self._counts = counts


def _request(batch: SpoolBatch) -> Batch:
    return Batch(batch.stream, batch.first_seq, batch.next_seq, batch.records, batch.frames)


def _site_counts(counts: Iterable[StreamCount]) -> SiteCounts:
    """Return the counts of all of a site's streams together."""
    total = add_up(counts)
    return SiteCounts(
        logged=total.logged,
        withheld=total.withheld,
        dropped=total.dropped,
        refused=total.refused,
        acked=total.acked,
        spooled=total.spooled,
        unreadable=total.unreadable,
        altered=total.altered,
        complete=total.is_complete,
    )
