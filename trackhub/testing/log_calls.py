# SPDX-License-Identifier: Apache-2.0
"""What a site logs in a contract test: calls, and the frames that they become."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Iterable, Sequence

import msgspec

from trackhub.delivery.wire import Batch, Chunk
from trackhub.framing import encode_frame
from trackhub.records import Artifact, Blob, Histogram, Image, Metrics, Payload, Record, Table, Text

__all__ = ["BASE_TIME", "Call", "Stream", "artifact", "histogram", "image", "metric", "png", "series", "table", "text"]

BASE_TIME = 1_700_000_000.0
"""Calls are logged from here on, a minute apart: every store can tell such times apart, and keeps them exactly."""

_NO_BLOB = Blob("", 0, "", "")
_CHUNK_BYTES = 1 << 20


class Call(msgspec.Struct, frozen=True):
    """One log call.

    Attributes:
        payload: what is logged; for an image or artifact without its blob.
        step, round: as in `trackhub.records.Record`.
        time: unix seconds (UTC); None for a minute after the call before.
        content: the bytes of an image or artifact.
        media_type: of the content.
    """

    payload: Payload
    step: int | None = None
    time: float | None = None
    round: int | None = None
    content: bytes | None = None
    media_type: str = "application/octet-stream"


def metric(key: str, value: float, step: int | None = None, time: float | None = None) -> Call:
    """Return a call that logs one scalar."""
    return Call(Metrics({key: value}), step, time)


def series(key: str, steps: Iterable[int | None], scale: float = 0.125) -> list[Call]:
    """Return calls that log a scalar at each of these steps, with values that differ and float32 holds exactly."""
    return [metric(key, number * scale, step) for number, step in enumerate(steps)]


def text(key: str, content: str, step: int | None = None) -> Call:
    """Return a call that logs a text."""
    return Call(Text(key, content), step)


def image(key: str, step: int | None = None, *, shade: int = 0, caption: str = "") -> Call:
    """Return a call that logs a small PNG, another one for each shade."""
    size = 8
    return Call(Image(key, _NO_BLOB, size, size, caption), step, content=png(size, shade), media_type="image/png")


def histogram(key: str, step: int | None = None, *, counts: Sequence[float] = (1.0, 4.0, 2.0)) -> Call:
    """Return a call that logs a histogram over [-1, ...), in bins of width 0.5."""
    return Call(Histogram(key, [-1.0 + 0.5 * i for i in range(len(counts) + 1)], list(counts)), step)


def table(key: str, step: int | None = None) -> Call:
    """Return a call that logs a table with a cell of each type."""
    rows = [[None, True, 7, 0.5, "cat"], [None, False, -1, 2.25, "a|b `c` <d> & e_f"]]
    return Call(Table(key, ["nothing", "flag", "count", "score", "name"], rows), step)


def artifact(key: str, content: bytes, *, filename: str = "weights.bin", artifact_type: str = "file") -> Call:
    """Return a call that logs a file."""
    return Call(Artifact(key, _NO_BLOB, filename, artifact_type), content=content)


def png(size: int, shade: int) -> bytes:
    """Return a square grey PNG file with a gradient that starts at ``shade``."""
    rows = b"".join(b"\0" + bytes((shade + 3 * (x + y)) % 256 for x in range(size)) for y in range(size))
    head = struct.pack(">IIBBBBB", size, size, 8, 0, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


class Stream:
    """One writing process: numbers the calls and turns them into the requests that a sender would send."""

    def __init__(self, name: str) -> None:
        """Start at seq 0. ``name`` is any word; the stream's id is made from it."""
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
