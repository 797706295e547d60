# SPDX-License-Identifier: Apache-2.0
"""The site's core: follow the spool, send one batch at a time, and keep sending it until the receiver has answered.

It knows nothing of FLARE: a *channel* carries one request to the receiver and brings the reply.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from pathlib import Path

import msgspec

from trackhub.delivery.channel import Channel, ChannelError
from trackhub.delivery.retry import Backoff
from trackhub.delivery.wire import (
    Accepted,
    Batch,
    Busy,
    Bye,
    Chunk,
    Hello,
    NeedBlob,
    Refused,
    Reply,
    Report,
    Request,
    SiteLedger,
    decode_reply,
    encode,
)
from trackhub.errors import SpoolError
from trackhub.limits import Limits
from trackhub.records import Blob
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.layout import RoundFile, blob_file, close_spool
from trackhub.spool.reading import SpoolReader

__all__ = ["Sender"]

_CLOSING_WAIT_S = 0.5
_ASKED_AGAIN_S = 0.1
_WORTH_A_MESSAGE = 64 << 10  # bytes: what a thousand records of one metric take
_log = logging.getLogger(__name__)


class Sender:
    """Delivers one spool to one receiver, from a thread of its own. The other methods may be called from any thread."""

    def __init__(
        self, spool_dir: Path, channel: Channel, *, site: str, cursor: str = "server", limits: Limits | None = None
    ) -> None:
        """Prepare a sender; ``start`` starts it.

        Args:
            spool_dir: an existing spool that names ``cursor`` among its readers.
            cursor: which of the site's receivers this is.

        Raises:
            SpoolError: it is not such a spool.
        """
        self.site = site
        self._reader = SpoolReader(spool_dir, cursor)
        self.folder = spool_dir
        self._round = RoundFile(spool_dir)
        self._channel = channel
        self._limits = limits or Limits()
        # One lost answer must not make the site look dead: while it waits for one, it says nothing else.
        self._request_s = min(self._limits.request_s, self._limits.silence_s / 2)
        self._lock = threading.Condition()
        self._wake = threading.Event()
        self._passes = 0
        self._in_pass = False
        self._flushes = 0
        self._sent_at = -math.inf
        self._silent = False
        self._refused_for_good: Refused | None = None
        self._welcome = False
        self._warned = ""
        self._failed = False
        self._closing = threading.Event()
        self._never = threading.Event()
        self._deadline: float | None = None
        self._thread = threading.Thread(target=self._main, name=f"trackhub-sender-{cursor}", daemon=True)
        self._ledger = SiteLedger()

    def start(self) -> None:
        """Start sending."""
        self._thread.start()

    def set_round(self, value: int | None) -> None:
        """Set the federated round that writers of this site stamp on their records from now on."""
        self._round.set(value)

    def flush(self, timeout_s: float | None = None) -> bool:
        """Wait until the receiver has all that was spooled before this call.

        Does not wait for a receiver that has not answered since the last time it was waited for in vain.

        Args:
            timeout_s: the longest wait; by default ``limits.barrier_s``.

        Returns:
            Whether the receiver has it.
        """
        deadline = time.monotonic() + (self._limits.barrier_s if timeout_s is None else timeout_s)
        ends = self._reader.ends()
        with self._lock:
            if self._silent or self._refused_for_good is not None or not self._thread.is_alive():
                return False
            # A pass that began before this call may have looked at the spool too early; the next one has not.
            target = self._passes + (2 if self._in_pass else 1)
            self._flushes += 1
            try:
                while self._passes < target and not self._reader.is_past(ends):
                    self._wake.set()
                    left_s = deadline - time.monotonic()
                    if left_s <= 0 or not self._thread.is_alive():
                        self._silent = True
                        _log.warning(
                            "the receiver did not acknowledge the records of site %s in time; training goes on without "
                            "waiting again until it answers; the records stay in %s", self.site, self.folder,
                        )  # fmt: skip
                        return False
                    self._lock.wait(min(left_s, self._limits.poll_s))
                return True
            finally:
                self._flushes -= 1

    def close(self, timeout_s: float, *, failed: bool = False) -> SiteLedger:
        """Send what is left, say good-bye, and stop. No writer may be alive any more.

        Args:
            timeout_s: the longest time to try. What is then not acknowledged stays in the spool.
            failed: the site's training ended with an error.

        Returns:
            What became of every record of the site.
        """
        self._failed = failed
        self._deadline = time.monotonic() + timeout_s
        self._closing.set()
        self._wake.set()
        if self._thread.ident is not None:
            self._thread.join(timeout_s + self._request_s + 1.0)
        try:
            close_spool(self.folder)
        except SpoolError as e:
            _log.warning("site %s cannot mark its spool as closed: %s", self.site, e)
        self._count()
        if self._ledger.spooled:
            _log.warning(
                "site %s: %d records were not acknowledged; they stay in %s, for `trackhub replay`",
                self.site, self._ledger.spooled, self.folder,
            )  # fmt: skip
        return self._ledger

    def ledger(self) -> SiteLedger:
        """Return the site's count as of the last sign of life."""
        return self._ledger

    def _main(self) -> None:
        try:
            self._run()
        except Exception:
            # A defect of trackhub's own, or the spool's folder is gone; training must go on.
            _log.exception("the sender of site %s ended unexpectedly; records stay in %s", self.site, self.folder)
        finally:
            with self._lock:
                self._lock.notify_all()

    def _run(self) -> None:
        next_report = time.monotonic()
        while not self._closing.is_set():
            pause_s = self._limits.poll_s
            if self._refused_for_good is not None:
                pause_s = self._limits.keepalive_s
            else:
                if self._is_time_to_send():
                    self._pass(final=False)
                if time.monotonic() >= next_report:
                    next_report = time.monotonic() + self._limits.keepalive_s
                    self._count()
                    self._ask_once(Report(self._ledger))
            self._wake.wait(pause_s)
            self._wake.clear()
        self._pass(final=True)
        self._count()
        if self._refused_for_good is None:
            self._ask(Bye(self._ledger, self._failed))

    def _is_time_to_send(self) -> bool:
        """Return whether somebody waits, the last message was long ago, or there is enough for a good one."""
        lingered = time.monotonic() >= self._sent_at + self._limits.linger_s
        return lingered or self._flushes > 0 or self._reader.has_bytes(_WORTH_A_MESSAGE)

    def _pass(self, *, final: bool) -> None:
        """Send all that is in the spool now, unless the receiver refuses it or the deadline passes."""
        with self._lock:
            self._in_pass = True
        if self._hello() and self._drain(final):
            with self._lock:
                self._passes += 1
                self._in_pass = False
                self._lock.notify_all()

    def _hello(self) -> bool:
        """Introduce the sender once; False if the receiver refuses it, or did not answer before the deadline."""
        if self._welcome:
            return True
        if self._refused_for_good is not None:
            return False
        reply = self._ask(Hello())
        if isinstance(reply, Refused):
            self._refused_for_good = reply
            _log.error("the receiver refuses site %s (%s): %s; its records stay in %s", self.site, reply.reason,
                       reply.detail, self.folder)  # fmt: skip
            return False
        self._welcome = reply is not None
        return self._welcome

    def _drain(self, final: bool) -> bool:
        """Send what the spool has now; False if the deadline passed first.

        What is logged meanwhile waits for the next pass: a message for each record would follow the last at once.
        """
        ends: dict[str, tuple[int, int]] | None = None
        while final or ends is None or not self._reader.is_past(ends):
            try:
                batch = self._reader.next_batch(self._limits.batch_records, self._limits.batch_bytes, final=final)
            except OSError as e:
                _log.warning("site %s cannot read its spool: %s; trying again", self.site, e)
                return not final
            if batch is None:
                return True
            if ends is not None and self._is_late():
                return False
            ends = ends or self._reader.ends()
            if not self._deliver(batch):
                return False
        return True

    def _deliver(self, batch: SpoolBatch) -> bool:
        if not all(self._send_blob(blob) for blob in batch.blobs):
            return not self._is_late()  # a blob is lost: read the batch again, without it
        request = Batch(batch.stream, batch.first_seq, batch.next_seq, batch.records, batch.frames)
        reply = self._ask(request)
        if reply is None:
            return False
        if isinstance(reply, NeedBlob):
            if any(blob.name == reply.name for blob in batch.blobs):
                # The receiver has lost it since: the batch comes again, after its blobs.
                self._pause(_ASKED_AGAIN_S)
                return not self._is_late()
            reply = Refused("blob_unknown", reply.name)
        refused = reply.reason if isinstance(reply, Refused) else None
        if isinstance(reply, Refused):
            _log.error("the receiver refused %d records of site %s (%s): %s", batch.records, self.site, reply.reason,
                       reply.detail)  # fmt: skip
        self._settle(batch, refused)
        return True

    def _settle(self, batch: SpoolBatch, refused: str | None) -> None:
        self._sent_at = time.monotonic()
        try:
            self._reader.settle(batch, refused)
        except OSError as e:
            _log.warning("site %s cannot store how far it got: %s; after a restart it sends again", self.site, e)

    def _send_blob(self, blob: Blob) -> bool:
        offset = 0
        while True:
            try:
                with blob_file(self.folder, blob.name).open("rb") as file:
                    file.seek(offset)
                    data = file.read(self._limits.batch_bytes)
                problem = f"they end after {offset} of {blob.size}"
            except OSError as e:
                # The receiver may have them: a record is sent once more when the receiver has lost it, or the site its cursor.
                data, problem = b"", str(e)
            reply = self._ask(Chunk(blob.name, blob.size, blob.sha256, offset, data))
            if reply is None:
                return False
            if not isinstance(reply, Accepted):
                self._reader.give_up_blob(blob.name)
                return False
            if reply.next >= blob.size:
                return True
            if not data:
                _log.warning("site %s cannot read the bytes of %s: %s", self.site, blob.name, problem)
                self._reader.give_up_blob(blob.name)
                return False
            offset = reply.next

    def _ask(self, request: Request) -> Reply | None:
        """Send a request until the receiver answers it; None if the deadline passed first."""
        backoff = Backoff(first_s=0.1, max_s=5.0)
        data = encode(request)
        while True:
            reply = self._ask_once(request, data)
            if reply is not None and not isinstance(reply, Busy):
                return reply
            if self._is_late():
                return None
            self._pause(backoff.next_wait_s())

    def _pause(self, wait_s: float) -> None:
        """Wait, until the end of the job at most; at the end, not for long."""
        if self._closing.is_set():
            self._never.wait(min(wait_s, _CLOSING_WAIT_S))
        else:
            self._closing.wait(wait_s)

    def _ask_once(self, request: Request, data: bytes | None = None) -> Reply | None:
        timeout_s = self._request_s
        if self._deadline is not None:
            timeout_s = max(0.1, min(timeout_s, self._deadline - time.monotonic()))
        try:
            reply = decode_reply(self._channel(data or encode(request), timeout_s))
        except ChannelError as e:
            _log.debug("site %s: no answer from the receiver: %s", self.site, e)
            return None
        except msgspec.DecodeError as e:
            _log.warning("site %s: the receiver's answer cannot be understood: %s", self.site, e)
            return None
        except Exception as e:
            # A defect of the channel's; with the next attempt it may be over, and the records must not stay for it.
            self._warn_once(f"the channel to the receiver failed: {type(e).__name__}: {e}")
            return None
        if not isinstance(reply, Busy):
            self._silent = False
        return reply

    def _warn_once(self, message: str) -> None:
        if message != self._warned:
            self._warned = message
            _log.warning("site %s: %s; trying again", self.site, message)

    def _is_late(self) -> bool:
        return self._deadline is not None and time.monotonic() >= self._deadline

    def _count(self) -> None:
        total = SiteLedger()
        dropped, refused = Counter[str](), Counter[str]()
        try:
            streams = self._reader.counts().values()
        except OSError as e:
            _log.warning("site %s cannot count its spool: %s", self.site, e)
            return
        for stream in streams:
            total.logged += stream.logged
            total.withheld += stream.withheld
            total.acked += stream.acked
            total.spooled += stream.spooled
            dropped.update(stream.dropped)
            refused.update(stream.refused)
        total.dropped, total.refused = dict(dropped), dict(refused)
        self._ledger = total
