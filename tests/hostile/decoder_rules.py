# SPDX-License-Identifier: Apache-2.0
"""What the decoder and the gate must do with any bytes. A test and a fuzzer hand them some."""

from __future__ import annotations

import itertools
import struct
import zlib
from contextlib import suppress

import msgspec

from trackhub.delivery import wire
from trackhub.delivery.check_received_batch import Contents, KnownKeys, RefusedRecordError, check_record, examine
from trackhub.framing import (
    MAX_BODY_BYTES,
    CorruptFrameError,
    Frame,
    decode_body,
    decode_head,
    metrics_bodies,
    pass_metrics,
    scan_frames,
)
from trackhub.records import Kind
from trackhub.testing.sample_calls_and_requests import Stream, artifact, histogram, image, table, text

_STREAM = "0123456789abcdef" * 2


def real_requests() -> list[bytes]:
    """Return what an honest sender makes, with every kind of record."""
    calls = [text("t", "x"), image("i"), histogram("h"), table("d"), artifact("a", b"content")]
    _, chunks, sent = Stream("real").append(calls)
    counts = wire.SiteCounts(logged=5, acked=5)
    requests: list[wire.Request] = [wire.Hello(), *chunks, sent, wire.KeepAlive(counts, "s", 1), wire.Final(counts)]
    return [wire.encode(request) for request in requests]


def real_bodies() -> list[bytes]:
    """Return the bodies of its frames, each with its size and kind in front, as `framed` takes them."""
    found = []
    for request in map(wire.decode_request, real_requests()):
        if isinstance(request, wire.Batch):
            for part in scan_frames(request.frames):
                body = request.frames[part.body : part.end]
                found.append(struct.pack("<HB", len(body), part.kind) + body)
    return [*found, bytes([len(found)]) + b"".join(found)]


def framed(data: bytes) -> bytes:
    """Return frames with right checksums. Changed bytes would never get past the checksums otherwise."""
    frames, at = [], 0
    while at + 3 <= len(data):
        size, kind = struct.unpack_from("<HB", data, at)
        body = data[at + 3 : at + 3 + size]
        frames.append(_frame(kind, body))
        at += 3 + size
    return b"".join(frames)


def _frame(kind: int, body: bytes) -> bytes:
    checked = struct.pack("<IB", len(body), kind) + body
    return struct.pack("<I", zlib.crc32(checked)) + checked


def check_decoder(data: bytes) -> None:
    """Check that these bytes raise nothing but what is declared, as a request, as frames, and as a record.

    Raises:
        AssertionError: two ways of reading disagree, or what has passed the gate does not pass it again.
    """
    with suppress(msgspec.DecodeError):
        request = wire.decode_request(data)
        assert wire.decode_request(wire.encode(request)) == request
        if isinstance(request, wire.Batch):
            _check_gate(request)
    _check_frames(data)
    if 0 < len(data) <= MAX_BODY_BYTES:
        _check_body(data)
        _check_frames(framed(data))
        _check_gate(wire.Batch(_STREAM, 0, data[0], data[0], framed(data[1:])))


def _check_frames(data: bytes) -> None:
    """Check that the three ways to walk over frames see the same ones."""
    frames: list[Frame] = []
    with suppress(CorruptFrameError):
        frames.extend(scan_frames(data))
    assert all(a.end == b.start for a, b in itertools.pairwise(frames))
    count, _, end = pass_metrics(data, 0)
    bodies, same_end = metrics_bodies(data, 0, len(data) + 1)
    assert (count, end) == (len(bodies), same_end)
    metrics = 0
    while metrics < len(frames) and frames[metrics].kind == Kind.METRICS:
        metrics += 1
    assert metrics == count


def _check_body(body: bytes) -> None:
    """Check these bytes as the body of a record, in a frame of each kind, with the right checksum."""
    seq = 0
    with suppress(msgspec.DecodeError):
        decode_body(body)
    with suppress(msgspec.DecodeError):
        seq = decode_head(body).seq
    for kind in (*Kind, 42):
        _check_gate(wire.Batch(_STREAM, seq, seq + 1, 1, _frame(kind, body)))
    with suppress(RefusedRecordError):
        check_record(_STREAM, body[0], body, KnownKeys())


def no_file(name: str) -> None:
    """Say of a blob that it is not at the receiver yet."""


def _check_gate(batch: wire.Batch) -> None:
    found = examine(batch, KnownKeys(), no_file)
    if not isinstance(found, Contents):
        return
    assert found.batch.records + len(found.refused) == batch.records
    wire.encode(found.batch)
    again = examine(found.batch, KnownKeys(), no_file) if not found.refused and found.batch.frames else found
    assert again == found
