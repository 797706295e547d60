# SPDX-License-Identifier: Apache-2.0
"""The messages between a sender and a receiver: one request, one reply, whatever carries them.

Over FLARE's channel they travel as one bytes value; a receiver in the same process gets the same bytes by a call. Every
request may be sent again after a lost reply: the receiver recognises what it has.
"""

from __future__ import annotations

import msgspec

from trackhub.framing import FORMAT_VERSION

__all__ = [
    "Accepted",
    "Batch",
    "Busy",
    "Bye",
    "Chunk",
    "Hello",
    "NeedBlob",
    "Refused",
    "Reply",
    "Report",
    "Request",
    "SiteLedger",
    "decode_reply",
    "decode_request",
    "encode",
    "is_compatible",
]


class SiteLedger(msgspec.Struct, kw_only=True):
    """What became of a site's records, counted at the site; ``logged`` is the sum of all others.

    Attributes:
        logged: log calls that returned, in all processes of the site.
        withheld: kept back by the site's policy.
        dropped: lost at the site, by reason (``spool_full``, ``disk_full``, ``io_error``, ``damaged``, ...).
        refused: not accepted by the receiver, by reason.
        acked: accepted by the receiver.
        spooled: still in the spool.
    """

    logged: int = 0
    withheld: int = 0
    dropped: dict[str, int] = {}
    refused: dict[str, int] = {}
    acked: int = 0
    spooled: int = 0

    def is_balanced(self) -> bool:
        """Return whether every logged record has exactly one outcome."""
        gone = self.withheld + sum(self.dropped.values()) + sum(self.refused.values())
        return self.logged == gone + self.acked + self.spooled


class Hello(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """First message of a sender: which format it speaks."""

    version: tuple[int, int] = FORMAT_VERSION


class Batch(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """Consecutive frames of one stream, exactly as they stand in the spool.

    Attributes:
        stream: the writing process.
        first_seq, next_seq: the batch covers ``seq`` from first_seq to below next_seq, gaps included.
        records: the number of frames that are not gaps.
        frames: the frames' bytes.
    """

    stream: str
    first_seq: int
    next_seq: int
    records: int
    frames: bytes


class Chunk(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """A piece of a blob; pieces of one blob arrive in order of their offset.

    Attributes:
        name, sha256, size: as in the blob that a later record refers to; size of the whole blob.
        offset: where ``data`` starts, in bytes.
    """

    name: str
    size: int
    sha256: str
    offset: int
    data: bytes


class Report(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """Keep-alive: the site still runs, and this is its count."""

    ledger: SiteLedger


class Bye(msgspec.Struct, frozen=True, array_like=True, tag=5):
    """Last message of a sender: nothing will follow, and this is its final count.

    Attributes:
        failed: the site's training ended with an error.
    """

    ledger: SiteLedger
    failed: bool = False


class Accepted(msgspec.Struct, frozen=True, array_like=True, tag=1):
    """The request is done: a batch is in the journal, a chunk on the disk.

    Attributes:
        next: for a chunk, the offset that the receiver expects next, in bytes; else 0.
        job: in reply to Hello, the job that the receiver records for.
    """

    next: int = 0
    job: str = ""


class Refused(msgspec.Struct, frozen=True, array_like=True, tag=2):
    """The receiver will never accept this request; do not send it again."""

    reason: str
    detail: str = ""


class Busy(msgspec.Struct, frozen=True, array_like=True, tag=3):
    """The receiver cannot accept the request now (its disk is full, it is starting or closing); send it again later."""

    detail: str


class NeedBlob(msgspec.Struct, frozen=True, array_like=True, tag=4):
    """The batch refers to a blob that the receiver does not have whole; send that first."""

    name: str


Request = Hello | Batch | Chunk | Report | Bye
Reply = Accepted | Refused | Busy | NeedBlob

encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_replies: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)


def decode_request(data: bytes) -> Request:
    """Return the request in these bytes.

    Raises:
        msgspec.DecodeError: they are no request of a version that is known here.
    """
    return _requests.decode(data)


def decode_reply(data: bytes) -> Reply:
    """Return the reply in these bytes.

    Raises:
        msgspec.DecodeError: they are no reply of a version that is known here.
    """
    return _replies.decode(data)


def is_compatible(theirs: tuple[int, int]) -> bool:
    """Return whether the two ends may work together: the same major version, at most one minor version apart."""
    major, minor = FORMAT_VERSION
    return theirs[0] == major and abs(theirs[1] - minor) <= 1
