# SPDX-License-Identifier: Apache-2.0
"""The wire format: the requests that a sender makes, and the replies that a receiver gives.

The sender encodes a request to bytes, a channel carries it, and `Receiver.handle` decodes it and returns an encoded
reply. After a lost reply, a sender may make any request again: the receiver recognises what it has already.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from trackhub.framing import FORMAT_VERSION
from trackhub.printable import printable
from trackhub.records import STREAM_PATTERN, Count, Reason

__all__ = [
    "MAX_BATCH_RECORDS",
    "MAX_REASONS",
    "MAX_REQUEST_BYTES",
    "MAX_STREAMS",
    "Accepted",
    "Batch",
    "Busy",
    "Chunk",
    "Final",
    "Hello",
    "KeepAlive",
    "NeedBlob",
    "Refused",
    "Reply",
    "Request",
    "SiteCounts",
    "SiteFacts",
    "StreamState",
    "busy",
    "decode_reply",
    "decode_request",
    "encode",
    "is_compatible",
    "refusal",
]

MAX_REQUEST_BYTES = (8 << 20) + (64 << 10)
"""The largest request that a sender makes: frames of the largest ``Limits.batch_bytes``, and the message around them.

A server may answer a larger body with an error before it reads it.
"""


MAX_BATCH_RECORDS = 100_000
"""Most records in one batch: the largest ``Limits.batch_records``."""

MAX_REASONS = 64
"""Most reasons under which one site's records are counted. Further reasons are refused, or counted as one."""

MAX_STREAMS = 500
"""How many streams one `Hello` may ask for. The reply is then less than 32 KiB."""

# The decoder checks these limits, most of them before it makes an object: a site may send anything.
_Stream = Annotated[str, Meta(pattern=STREAM_PATTERN)]
_Session = Annotated[str, Meta(max_length=64)]
_Reasons = Annotated[dict[Reason, Count], Meta(max_length=MAX_REASONS)]
_Loggers = Annotated[tuple[Reason, ...], Meta(max_length=8)]


class SiteCounts(msgspec.Struct, kw_only=True):
    """What became of a site's records, counted at the site. ``logged`` is the sum of the other counts of records.

    Attributes:
        logged: log calls that returned, in all processes of the site.
        withheld: records that the site's policy kept back.
        dropped: reason (``spool_full``, ``disk_full``, ``io_error``, ``damaged``, ...) -> records lost at the site.
        refused: reason -> records that the receiver did not accept.
        acked: records that the receiver accepted.
        spooled: records that are still in the spool.
        unreadable: records in the spool that the site's sender cannot read: it lacks the permission, or the disk fails.
        complete: False if the site may have logged more than it could count.
        altered: reason -> values (not records) that were left out of records. The other values of these records count
            as usual.
        at_source: True if the site records FLARE's own log calls where they are made. False if it takes FLARE's
            messages.
        by_message: how many of the records in ``logged`` came in messages of another process. Such a record is counted
            when its message arrives. How many were lost on the way is not known.
        not_captured: other loggers that the site's scripts used, and that the job does not capture.
        not_used: loggers that the job captures, although no process of the site was seen to use them.
        retries: requests that the site's sender had to send again, since no reply came in time or the receiver was
            busy. A sender that is started again begins at 0.
    """

    logged: Count = 0
    withheld: Count = 0
    dropped: _Reasons = {}
    refused: _Reasons = {}
    acked: Count = 0
    spooled: Count = 0
    unreadable: Count = 0
    complete: bool = True
    altered: _Reasons = {}
    at_source: bool = False
    by_message: Count = 0
    not_captured: _Loggers = ()
    not_used: _Loggers = ()
    retries: Count = 0

    def is_balanced(self) -> bool:
        """Return whether every record of the site is counted, and has exactly one outcome."""
        return self.complete and self.adds_up()

    def adds_up(self) -> bool:
        """Return whether every record that was counted has exactly one outcome."""
        gone = self.withheld + sum(self.dropped.values()) + sum(self.refused.values())
        return self.logged == gone + self.acked + self.spooled + self.unreadable


class SiteFacts(msgspec.Struct, kw_only=True):
    """Facts about the site that its spool does not show.

    The transport sets them, and the sender adds them to the counts.

    Attributes:
        at_source, by_message, not_captured, not_used: as in `SiteCounts`.
        may_log_more: True if the site may log records that never reach the spool. Then its counts are not complete.
    """

    at_source: bool = False
    by_message: int = 0
    not_captured: tuple[str, ...] = ()
    not_used: tuple[str, ...] = ()
    may_log_more: bool = False

    def add_to(self, counts: SiteCounts) -> None:
        """Put these facts into a site's counts."""
        counts.at_source, counts.by_message = self.at_source, self.by_message
        counts.not_captured, counts.not_used = self.not_captured, self.not_used
        counts.complete = counts.complete and not self.may_log_more


# Messages are arrays with a number in front. A newer minor version adds fields at the end, which an older one ignores.


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The first request of a sender. It says which version of the format the sender uses.

    Attributes:
        version: the sender's version of the format.
        session: the sender's unique name; empty if the sender does not send it.
        streams: the sender asks how much of these streams the receiver has. `MAX_STREAMS` at most.
    """

    version: tuple[int, int] = FORMAT_VERSION
    session: _Session = ""
    streams: Annotated[tuple[_Stream, ...], Meta(max_length=MAX_STREAMS)] = ()


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Consecutive frames of one stream, byte for byte as they stand in the spool.

    Attributes:
        stream: the id of the stream. Each writing process has one.
        first_seq, next_seq: the batch covers ``seq`` from first_seq to below next_seq, gaps included.
        records: the number of frames that are not gaps.
        frames: the frames' bytes.
    """

    stream: _Stream
    first_seq: Count
    next_seq: Count
    records: Annotated[int, Meta(ge=0, le=MAX_BATCH_RECORDS)]
    frames: bytes


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A piece of a blob. The pieces of one blob are sent in the order of their offsets.

    Attributes:
        name, sha256, size: as in the blob that a later record refers to. The size is of the whole blob, in bytes.
        offset: where ``data`` starts, in bytes.
        data: the bytes of this piece.
    """

    name: str
    size: Count
    sha256: str
    offset: Count
    data: bytes


class KeepAlive(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Says that the site still runs, and what it has counted so far.

    Attributes:
        counts: what became of the site's records.
        session: as in `Hello`.
        number: grows with each message of a session that has counts. So a receiver knows which of two messages is
            older.
    """

    counts: SiteCounts
    session: _Session = ""
    number: Count = 0


class Final(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """The final message of a sender: nothing follows, and these counts are the last.

    Attributes:
        counts: what became of the site's records.
        failed: True if the site's training ended with an error.
        session, number: as in `KeepAlive`.
    """

    counts: SiteCounts
    failed: bool = False
    session: _Session = ""
    number: Count = 0


class StreamState(msgspec.Struct, frozen=True, array_like=True):
    """How far a receiver has one stream.

    Attributes:
        next_seq: the number of the record that the receiver expects next.
        records: how many records of this stream are in its journal.
    """

    next_seq: Count
    records: Count


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The receiver has done what was asked: a batch is in the journal, a chunk on the disk.

    Attributes:
        next: in reply to a chunk, the offset that the receiver expects next, in bytes; otherwise 0.
        job: in reply to Hello, the job whose records the receiver stores. Empty if another journal has the job's first
            records, so that this receiver does not know how the streams began.
        streams: in reply to Hello, stream -> how far the receiver has it, for the streams that were asked for. A stream
            is left out if the receiver does not know it.
        refused: in reply to a batch, reason -> how many of the batch's records the receiver will never accept. The
            receiver has stored the others.
        status: in reply to Final, how the job ends: a value of `RunStatus`, or empty if the receiver does not know yet.
    """

    next: Count = 0
    job: str = ""
    streams: dict[str, StreamState] = {}
    refused: _Reasons = {}
    status: str = ""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The receiver will never accept this request; do not send it again.

    Attributes:
        reason: a word under which the delivery report counts the refused records.
        detail: what was wrong, for people.
    """

    reason: str
    detail: str = ""

    def for_log(self) -> tuple[str, str]:
        """Return reason and detail for a log. A receiver may send control characters, which a terminal would obey."""
        return printable(self.reason), printable(self.detail)


class Busy(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The receiver starts, closes or is busy, or its disk is full. Send the request again later."""

    detail: str


class NeedBlob(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The batch refers to a blob of this name that the receiver does not have whole. Send the blob first."""

    name: str


Request = Hello | Batch | Chunk | KeepAlive | Final
Reply = Accepted | Refused | Busy | NeedBlob

encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def decode_request(data: bytes) -> Request:
    """Return the request in these bytes.

    Raises:
        msgspec.DecodeError: they hold no request of a version that is known here, or a request beyond the limits.
    """
    if len(data) > MAX_REQUEST_BYTES:
        raise msgspec.ValidationError(f"it has {len(data)} bytes; the limit is {MAX_REQUEST_BYTES}")
    try:
        return _requests.decode(data)
    except (UnicodeDecodeError, RecursionError) as e:
        raise msgspec.DecodeError(f"{type(e).__name__}: {e}") from e


def decode_reply(data: bytes) -> Reply:
    """Return the reply in these bytes.

    Raises:
        msgspec.DecodeError: they hold no reply of a version that is known here.
    """
    try:
        return _replies.decode(data)
    except (UnicodeDecodeError, RecursionError) as e:
        raise msgspec.DecodeError(f"{type(e).__name__}: {e}") from e


def busy(detail: str) -> bytes:
    """Return the reply *busy* to a request that failed. It can be encoded whatever the error says."""
    return encode(Busy(printable(detail)[:500]))


def refusal(reason: str, detail: str) -> bytes:
    """Return the reply by which a transport refuses a request in place of a receiver.

    Use it where no receiver will ever answer, for example because none was configured for this site. A sender whose
    first request is refused stops asking and keeps its records in the spool. A batch that is refused later is lost: it
    is counted as refused and not sent again. So raise `ChannelError` instead for every problem that may pass.

    Args:
        reason: one word, under which the delivery report counts what was refused.
        detail: what was wrong and what to do about it, for the sender's log.
    """
    return encode(Refused(reason, detail))


def is_compatible(theirs: tuple[int, int]) -> bool:
    """Return whether the two ends may work together: the same major version, at most one minor version apart."""
    major, minor = FORMAT_VERSION
    return theirs[0] == major and abs(theirs[1] - minor) <= 1
