# SPDX-License-Identifier: Apache-2.0
"""How records are encoded: the frame that carries one record in the spool, on the channel and in the journal.

A writer encodes a record once. The receiver decodes it to check it, and a lane decodes it for its backend::

    frame   = crc32 (uint32) · size (uint32) · kind (uint8) · body (size bytes)     little-endian
    body    = msgpack array [seq, time, step, round, payload]
    payload = msgpack array [kind, field, field, ...]

The checksum covers size, kind and body. ``kind`` is in the frame as well as in the body. So a reader can carry and
count a record of a kind that it does not know. A trackhub that is one minor version newer may send such a kind.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, NamedTuple, TypeVar

import msgspec

from trackhub.errors import RecordError
from trackhub.records import KIND_OF, MAX_METRICS_OF_RECORD, Count, Kind, Metrics, Record, size_problem

__all__ = [
    "DECODED_IN_TRANSIT",
    "FORMAT_VERSION",
    "MAX_BODY_BYTES",
    "CorruptFrameError",
    "Frame",
    "Head",
    "MetricsRecord",
    "decode_body",
    "decode_head",
    "decode_metrics",
    "encode_frame",
    "metrics_bodies",
    "pass_metrics",
    "scan_frames",
]

FORMAT_VERSION = (1, 0)
"""Major and minor version of frames and records. A new payload kind or trailing field raises the minor version."""

MAX_BODY_BYTES = 1 << 20
"""Largest body of one frame. A larger value belongs in an artifact, whose bytes travel beside the frames."""

DECODED_IN_TRANSIT = frozenset({Kind.GAP, Kind.IMAGE, Kind.ARTIFACT})
"""Kinds of records that the spool's reader decodes: a gap says how many records are missing, an image or artifact
refers to a blob. The reader passes on records of all other kinds without decoding them."""


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The beginning of a `Record`, which can be decoded whatever the payload is."""

    seq: Count
    time: float


class MetricsRecord(Record, frozen=True, array_like=True, gc=False):
    """A `Record` of metrics. Its decoder takes nothing else."""

    payload: Metrics


class Frame(NamedTuple):
    """Where one frame is in a buffer.

    Attributes:
        kind: a plain int, since it may be a kind that this version does not know.
        start: where the frame starts.
        body: where its body starts.
        end: where its body ends, and with it the frame.
    """

    kind: int
    start: int
    body: int
    end: int


class CorruptFrameError(ValueError):
    """A frame's checksum, size or kind is wrong, so nobody knows where the next frame starts.

    Attributes:
        offset: where the frame starts in the scanned buffer.
    """

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


_HEADER = struct.Struct("<IIB")
_pack_checked = struct.Struct("<IB").pack
_pack_crc = struct.Struct("<I").pack
_CRC_BYTES = 4
_MAX_SIZES = 1000
_Value = TypeVar("_Value")
_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_metrics = msgspec.msgpack.Decoder(MetricsRecord).decode
_decode_head = msgspec.msgpack.Decoder(Head).decode


def encode_frame(record: Record) -> bytes:
    """Return the frame that carries this record.

    Raises:
        RecordError: the encoded record is larger than ``MAX_BODY_BYTES``, or has more values than a record may have.
    """
    body = _encode(record)
    size = len(body)
    if size > MAX_BODY_BYTES:
        raise RecordError(
            f"{_name_of(record)}: the record takes {size} bytes encoded; the limit is {MAX_BODY_BYTES}; log a larger "
            "value with log_artifact"
        )
    if size > MAX_METRICS_OF_RECORD and (problem := size_problem(record.payload)):
        raise RecordError(f"{_name_of(record)}: {problem}")
    checked = _pack_checked(size, KIND_OF[type(record.payload)]) + body
    return _pack_crc(zlib.crc32(checked)) + checked


def _name_of(record: Record) -> str:
    key = getattr(record.payload, "key", "")
    return type(record.payload).__name__ + (f" {key[:80]!r}" if key else "")


def decode_body(body: bytes | memoryview) -> Record:
    """Return the record in a frame's body.

    Raises:
        msgspec.DecodeError: the body is not a record that this version knows. Well-formed msgpack of another shape
            raises the subclass ``msgspec.ValidationError``.
    """
    try:
        return _decode_record(body)
    except (UnicodeDecodeError, RecursionError) as e:  # text that is not UTF-8; arrays nested thousands deep
        raise msgspec.DecodeError(f"{type(e).__name__}: {e}") from e


def decode_metrics(bodies: Sequence[bytes]) -> list[MetricsRecord]:
    """Return the records in the bodies of several frames. All of them are metrics.

    Raises:
        msgspec.DecodeError: one of them is not a record of metrics that this version knows.
    """
    try:
        return list(map(_decode_metrics, bodies))
    except (UnicodeDecodeError, RecursionError) as e:
        raise msgspec.DecodeError(f"{type(e).__name__}: {e}") from e


def decode_head(body: bytes | memoryview) -> Head:
    """Return ``seq`` and time of the record in a frame's body, even if this version does not know its kind.

    Raises:
        msgspec.DecodeError: the body is not a record.
    """
    try:
        return _decode_head(body)
    except RecursionError as e:  # no UnicodeDecodeError: text is in later fields, which this skips
        raise msgspec.DecodeError(f"{type(e).__name__}: {e}") from e


def scan_frames(buffer: bytes | bytearray | memoryview, offset: int = 0) -> Iterator[Frame]:
    """Yield each whole frame from ``offset`` on. Verifies the checksum and does not decode the body.

    Stops before an incomplete frame at the end. That is normal: its writer is about to write the rest, or was killed.
    To notice it, compare the last frame's ``end`` with the buffer's length.

    Raises:
        CorruptFrameError: a frame's checksum, size or kind is wrong. The frames before it were yielded.
    """
    length = len(buffer)
    header = _HEADER.size
    crc32 = zlib.crc32
    unpack = _HEADER.unpack_from
    new = tuple.__new__  # takes half the time of Frame(...)
    while length - offset >= header:
        crc, size, kind = unpack(buffer, offset)
        if size > MAX_BODY_BYTES or kind == 0:
            raise CorruptFrameError(f"frame of {size} bytes and kind {kind} at offset {offset}", offset)
        body = offset + header
        end = body + size
        if end > length:
            return
        # A slice copies the bytes. For a few bytes, that is quicker than a memoryview.
        if crc32(buffer[offset + _CRC_BYTES : end]) != crc:
            raise CorruptFrameError(f"checksum does not match at offset {offset}", offset)
        yield new(Frame, (kind, offset, body, end))
        offset = end


def pass_metrics(
    buffer: bytes | bytearray | memoryview, offset: int, max_frames: int | None = None, max_end: int | None = None
) -> tuple[int, int, int]:
    """Count the complete, intact frames of metrics that follow each other from ``offset`` on.

    Most batches consist of such frames, and this takes a third of the time of ``scan_frames``. It stops before a frame
    that is of another kind, damaged or incomplete. The caller must find out which of these it is.

    Args:
        buffer: where the frames are.
        offset: where the first of them starts.
        max_frames: stop after this many; not negative. None sets no limit.
        max_end: stop before a frame that ends after this offset. None sets no limit.

    Returns:
        How many frames there are, where the last of them starts, and where it ends. If there are none, both places are
        ``offset``.
    """
    limit = len(buffer) if max_end is None else min(len(buffer), max_end)
    header = _HEADER.size
    last = limit - header
    most = limit // header if max_frames is None else max_frames
    crc32 = zlib.crc32
    unpack = _HEADER.unpack_from
    metrics = int(Kind.METRICS)
    start = offset
    for count in range(most):
        if offset > last:
            return count, start, offset
        crc, size, kind = unpack(buffer, offset)
        end = offset + header + size
        if kind != metrics or size > MAX_BODY_BYTES or end > limit or crc32(buffer[offset + _CRC_BYTES : end]) != crc:
            return count, start, offset
        start, offset = offset, end
    return most, start, offset


def metrics_bodies(buffer: bytes, offset: int, max_frames: int) -> tuple[list[bytes], int]:
    """Return the bodies of the complete, intact frames of metrics that follow each other from ``offset`` on.

    It stops where `pass_metrics` stops. The receiver uses it, since it looks into every record (docs/adr/0004).

    Args:
        buffer: where the frames are.
        offset: where the first of them starts.
        max_frames: stop after this many.

    Returns:
        The bodies, and where the last frame ends.
    """
    view, limit, header = memoryview(buffer), len(buffer), _HEADER.size
    crc32, unpack, metrics, heads, layouts = zlib.crc32, _HEADER.unpack_from, int(Kind.METRICS), _heads, _layouts
    bodies: list[bytes] = []
    before = -1  # the size of the last body
    while offset + header <= limit and len(bodies) < max_frames:
        crc, size, kind = unpack(buffer, offset)
        start, end = offset + header, offset + header + size
        if kind != metrics or size > MAX_BODY_BYTES or end > limit:
            break
        if size != before:
            body = buffer[start:end]
            if crc32(body, heads[size]) != crc:
                break
            bodies.append(body)
            offset, before = end, size
            continue
        # This is the second frame of the same size. A loop that logs one key makes many of them, one after the other.
        # Reading them together takes 60 % of the time.
        layout, head, known = layouts[size], heads[size], len(bodies)
        most = min((limit - offset) // layout.size, max_frames - known)
        for crc, found, kind, body in layout.iter_unpack(view[offset : offset + most * layout.size]):
            if found != size or kind != metrics or crc32(body, head) != crc:
                break
            bodies.append(body)
        if len(bodies) == known:
            break
        offset += (len(bodies) - known) * layout.size
    return bodies, offset


class _BySize(dict[int, _Value], Generic[_Value]):
    """The parts that all frames of metrics of one size have in common, made once for each size."""

    def __init__(self, make: Callable[[int], _Value]) -> None:
        super().__init__()
        self._make = make

    def __missing__(self, size: int) -> _Value:
        made = self._make(size)
        if len(self) < _MAX_SIZES:  # without a bound, a site that sends every size would fill the memory
            self[size] = made
        return made


# The checksum of the bytes before the body. The body's bytes are added to it later.
_heads = _BySize(lambda size: zlib.crc32(_pack_checked(size, Kind.METRICS)))
_layouts = _BySize(lambda size: struct.Struct(f"<IIB{size}s"))
