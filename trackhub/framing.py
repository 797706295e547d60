# SPDX-License-Identifier: Apache-2.0
"""How records are encoded: the frame that carries one record in the spool, on the channel and in the journal.

A writer encodes a record once. A lane decodes it once, before it hands the record to a backend::

    frame   = crc32 (uint32) · size (uint32) · kind (uint8) · body (size bytes)     little-endian
    body    = msgpack array [seq, time, step, round, payload]
    payload = msgpack array [kind, field, field, ...]

The checksum covers size, kind and body. ``kind`` is in the frame and in the body. So a reader can carry and count a
record of a kind that it does not know, from a trackhub that is one minor version newer.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from trackhub.records import Kind, Payload, Record

__all__ = [
    "FORMAT_VERSION",
    "MAX_BODY_BYTES",
    "CorruptFrameError",
    "Frame",
    "Head",
    "decode_body",
    "decode_head",
    "encode_frame",
    "pass_metrics",
    "scan_frames",
]

FORMAT_VERSION = (1, 0)
"""Major and minor version of frames and records. A new payload kind or trailing field raises the minor version."""

MAX_BODY_BYTES = 1 << 20
"""Largest body of one frame. Larger values belong into an artifact, whose bytes travel beside the frames."""


class Head(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The beginning of a `Record`, which can be read whatever the payload is."""

    seq: int
    time: float


class Frame(NamedTuple):
    """Where one frame lies in a buffer: it starts at ``start``, its body is ``buffer[body:end]``.

    ``kind`` is a plain int: it may be a kind that this version does not know.
    """

    kind: int
    start: int
    body: int
    end: int


class CorruptFrameError(ValueError):
    """A frame fails its checksum or its size is impossible; what follows it cannot be trusted to be aligned.

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
_encode = msgspec.msgpack.Encoder().encode
_decode_record = msgspec.msgpack.Decoder(Record).decode
_decode_head = msgspec.msgpack.Decoder(Head).decode
_KIND_OF = {cls: int(cls.__struct_config__.tag) for cls in Payload.__args__}


def encode_frame(record: Record) -> bytes:
    """Return the frame that carries this record.

    Raises:
        ValueError: the encoded record is larger than ``MAX_BODY_BYTES``.
    """
    body = _encode(record)
    size = len(body)
    if size > MAX_BODY_BYTES:
        raise ValueError(f"the record takes {size} bytes encoded, the limit is {MAX_BODY_BYTES}")
    checked = _pack_checked(size, _KIND_OF[type(record.payload)]) + body
    return _pack_crc(zlib.crc32(checked)) + checked


def decode_body(body: bytes | memoryview) -> Record:
    """Return the record in a frame's body.

    Raises:
        msgspec.DecodeError: the body is not a record of a format that this version knows (its subclass
            ``msgspec.ValidationError`` for well-formed msgpack of another shape).
    """
    return _decode_record(body)


def decode_head(body: bytes | memoryview) -> Head:
    """Return where and when the record in a frame's body was logged, also of a kind that this version does not know.

    Raises:
        msgspec.DecodeError: the body is no record.
    """
    return _decode_head(body)


def scan_frames(buffer: bytes | bytearray | memoryview, offset: int = 0) -> Iterator[Frame]:
    """Yield each whole frame from ``offset`` on, its checksum verified; stop before an incomplete one at the end.

    The body is not decoded. A buffer that ends within a frame is normal (its writer is about to write the rest, or
    was killed): compare the last frame's ``end`` with the buffer's length.

    Raises:
        CorruptFrameError: a frame's checksum is wrong or its size is impossible; the frames before it were yielded.
    """
    length = len(buffer)
    header = _HEADER.size
    crc32 = zlib.crc32
    unpack = _HEADER.unpack_from
    new = tuple.__new__  # half of what Frame(...) takes
    while length - offset >= header:
        crc, size, kind = unpack(buffer, offset)
        if size > MAX_BODY_BYTES or kind == 0:
            raise CorruptFrameError(f"frame of {size} bytes and kind {kind} at offset {offset}", offset)
        body = offset + header
        end = body + size
        if end > length:
            return
        # A slice of bytes is a copy, and of a few bytes still quicker than a view of them.
        if crc32(buffer[offset + _CRC_BYTES : end]) != crc:
            raise CorruptFrameError(f"checksum does not match at offset {offset}", offset)
        yield new(Frame, (kind, offset, body, end))
        offset = end


def pass_metrics(
    buffer: bytes | bytearray | memoryview, offset: int, max_frames: int | None = None, max_end: int | None = None
) -> tuple[int, int]:
    """Return how many whole, sound frames of metrics follow each other from ``offset`` on, and where they end.

    What most batches consist of, counted at a third of ``scan_frames``'s cost. Stops before whatever is something
    else: another kind, damage, an incomplete frame. It is for the caller to see what.

    Args:
        max_frames: stop after so many; not negative.
        max_end: stop before a frame that ends after this offset.
    """
    limit = len(buffer) if max_end is None else min(len(buffer), max_end)
    header = _HEADER.size
    last = limit - header
    most = limit // header if max_frames is None else max_frames
    crc32 = zlib.crc32
    unpack = _HEADER.unpack_from
    metrics = int(Kind.METRICS)
    for count in range(most):
        if offset > last:
            return count, offset
        crc, size, kind = unpack(buffer, offset)
        end = offset + header + size
        if kind != metrics or size > MAX_BODY_BYTES or end > limit or crc32(buffer[offset + _CRC_BYTES : end]) != crc:
            return count, offset
        offset = end
    return most, offset
