# SPDX-License-Identifier: Apache-2.0
"""Sample jobs, and the log calls that the kit makes in place of a site, with the requests that a sender would send.

Checks and scenarios make `Call` objects with the functions here. A `ReceiverRig` has one `Stream` for each writing
process, and sends the requests to its receiver.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence
from uuid import uuid4

import msgspec

from trackhub.delivery.wire import Batch, Chunk
from trackhub.framing import encode_frame
from trackhub.job_and_run_info import JobInfo
from trackhub.records import Artifact, Blob, Histogram, Image, Kind, Metrics, Payload, Record, Table, Text

__all__ = [
    "BASE_TIME",
    "LOGGED_KINDS",
    "Call",
    "FuturePayload",
    "Stream",
    "artifact",
    "histogram",
    "image",
    "metric",
    "new_job",
    "png",
    "series",
    "table",
    "text",
]

BASE_TIME = 1_700_000_000.0
"""The time of a stream's first call. The others follow a minute apart, and every store keeps such times exactly."""

LOGGED_KINDS = tuple(kind for kind in Kind if kind is not Kind.GAP)
"""The kinds that a backend may claim. It never gets a gap."""

_NO_BLOB = Blob("", 0, "", "")
_CHUNK_BYTES = 1 << 20


class FuturePayload(msgspec.Struct, frozen=True, array_like=True, tag=max(Kind) + 1):
    """A payload of a kind that this trackhub does not know, such as a newer one may send."""

    key: str
    content: str


class Call(msgspec.Struct, frozen=True):
    """One log call.

    Attributes:
        payload: what is logged; an image or artifact without its blob.
        step: as in `trackhub.records.Record`.
        time: unix seconds (UTC); None for a minute after the call before.
        round: as in `trackhub.records.Record`.
        content: the bytes of an image or artifact.
        media_type: MIME type of the content.
    """

    payload: Payload | FuturePayload
    step: int | None = None
    time: float | None = None
    round: int | None = None
    content: bytes | None = None
    media_type: str = "application/octet-stream"


def new_job(name: str = "contract-kit") -> JobInfo:
    """Return a job with an id of its own, and a name that other jobs may have, too."""
    return JobInfo(f"job-{uuid4().hex[:8]}", name, "Made by trackhub's *contract kit*.", ("contract-kit",))


def metric(key: str, value: float, step: int | None = None, time: float | None = None) -> Call:
    """Return a call that logs one scalar.

    Args:
        key: its key.
        value: its value.
        step: its step, if it has one.
        time: unix seconds (UTC) of the call; None for a minute after the call before.
    """
    return Call(Metrics({key: value}), step, time)


def series(key: str, steps: Iterable[int | None], scale: float = 0.125) -> list[Call]:
    """Return calls that log a scalar at each of these steps.

    Args:
        key: the scalar's key.
        steps: a step for each call.
        scale: the values are 0, 1, 2, ... times this. Multiples of 1/8 are exact in float32, too.
    """
    return [metric(key, number * scale, step) for number, step in enumerate(steps)]


def text(key: str, content: str, step: int | None = None) -> Call:
    """Return a call that logs a text.

    Args:
        key: the text's key.
        content: the text.
        step: its step, if it has one.
    """
    return Call(Text(key, content), step)


def image(key: str, step: int | None = None, *, shade: int = 0, caption: str = "") -> Call:
    """Return a call that logs a small PNG.

    Args:
        key: the image's key.
        step: its step, if it has one.
        shade: 0 to 255; each shade gives other bytes.
        caption: its caption.
    """
    size = 8
    return Call(Image(key, _NO_BLOB, size, size, caption), step, content=png(size, shade), media_type="image/png")


def histogram(key: str, step: int | None = None, *, counts: Sequence[float] = (1.0, 4.0, 2.0)) -> Call:
    """Return a call that logs a histogram, whose bins begin at -1 and are 0.5 wide.

    Args:
        key: the histogram's key.
        step: its step, if it has one.
        counts: the count of each bin.
    """
    return Call(Histogram(key, [-1.0 + 0.5 * i for i in range(len(counts) + 1)], list(counts)), step)


def table(key: str, step: int | None = None, *, count: int = 7) -> Call:
    """Return a call that logs a table with a cell of each type; ``count`` is one of the cells.

    Args:
        key: the table's key.
        step: its step, if it has one.
        count: the value of one of the cells.
    """
    rows = [[None, True, count, 0.5, "cat"], [None, False, -1, 2.25, "a|b `c` <d> & e_f"]]
    return Call(Table(key, ["nothing", "flag", "count", "score", "name"], rows), step)


def artifact(key: str, content: bytes, *, filename: str = "weights.bin", artifact_type: str = "file") -> Call:
    """Return a call that logs a file.

    Args:
        key: the artifact's key.
        content: the file's bytes.
        filename: the last part of the path that it was logged from.
        artifact_type: what it is: ``file``, ``model``, ...
    """
    return Call(Artifact(key, _NO_BLOB, filename, artifact_type), content=content)


def png(size: int, shade: int) -> bytes:
    """Return a square grey PNG file with a gradient that starts at ``shade``; ``size`` is its width in pixels."""
    rows = b"".join(b"\0" + bytes((shade + 3 * (x + y)) % 256 for x in range(size)) for y in range(size))
    head = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Stream:
    """One writing process of a site: numbers its calls, and turns them into the requests of a sender."""

    def __init__(self, name: str) -> None:
        """Start at seq 0. The stream's id is made from the name."""
        self.id = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
        self.calls: list[Call] = []

    def append(self, calls: Sequence[Call]) -> tuple[list[Call], list[Chunk], Batch]:
        """Return the calls with their times filled in, the chunks of their blobs, and the batch of their frames."""
        first = len(self.calls)
        chunks: list[Chunk] = []
        frames = bytearray()
        for call in calls:
            seq = len(self.calls)
            when = BASE_TIME + 60.0 * seq if call.time is None else call.time
            timed = msgspec.structs.replace(call, time=when)
            payload = timed.payload
            if isinstance(payload, Image | Artifact):
                payload = self.with_blob(seq, timed)
                chunks += _chunks(payload.blob, call.content or b"")
            self.calls.append(timed)
            if isinstance(payload, FuturePayload):
                frames += _future_frame(seq, when, payload)
            else:
                frames += encode_frame(Record(seq, when, timed.step, timed.round, payload))
        batch = Batch(self.id, first, len(self.calls), len(calls), bytes(frames))
        return self.calls[first:], chunks, batch

    def with_blob(self, seq: int, call: Call) -> Image | Artifact:
        """Return the payload of the call with this number, its blob filled in."""
        payload, content = call.payload, call.content or b""
        assert isinstance(payload, Image | Artifact)
        blob = Blob(f"{self.id}-{seq}", len(content), hashlib.sha256(content).hexdigest(), call.media_type)
        return msgspec.structs.replace(payload, blob=blob)


def _chunks(blob: Blob, content: bytes) -> list[Chunk]:
    offsets = range(0, max(len(content), 1), _CHUNK_BYTES)
    return [Chunk(blob.name, blob.size, blob.sha256, at, content[at : at + _CHUNK_BYTES]) for at in offsets]


def _future_frame(seq: int, time: float, payload: FuturePayload) -> bytes:
    """Return a frame of a kind that `trackhub.framing` refuses to encode; the layout is described there."""
    body = msgspec.msgpack.encode([seq, time, None, None, payload])
    checked = struct.pack("<IB", len(body), FuturePayload.__struct_config__.tag) + body
    return struct.pack("<I", zlib.crc32(checked)) + checked
