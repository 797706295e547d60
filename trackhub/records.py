# SPDX-License-Identifier: Apache-2.0
"""What one log call becomes: a record with one payload, and the frame that carries it on disk and on the wire.

The format is the same in the spool, on the channel and in the journal, so that a record is encoded once, by the
process that logged it, and decoded once, by the lane that hands it to a backend::

    frame   = crc32 (uint32) · size (uint32) · kind (uint8) · body (size bytes)     little-endian
    body    = msgpack array [seq, time, step, round, payload]
    payload = msgpack array [kind, field, field, ...]

The checksum covers size, kind and body. ``kind`` stands in the frame as well as in the body, so that a reader which
does not know a kind, from a trackhub one minor version newer, can still carry and count it.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

import msgspec

__all__ = [
    "FORMAT_VERSION",
    "MAX_BODY_BYTES",
    "MAX_KEY_CHARS",
    "MAX_STEP",
    "Artifact",
    "Blob",
    "CorruptFrameError",
    "Frame",
    "Gap",
    "Head",
    "Histogram",
    "Image",
    "Kind",
    "Metrics",
    "Params",
    "Payload",
    "Record",
    "Table",
    "Tags",
    "Text",
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

MAX_KEY_CHARS = 1000
"""Longest key, in characters. Longer than any backend's own limit; backends shorten, the writer refuses."""

MAX_STEP = 2**63 - 1
"""Largest step and round: what TensorBoard's and MLflow's int64 fields hold."""


class Kind(IntEnum):
    """What a record holds. The numbers are part of the format and never change."""

    METRICS = 1
    PARAMS = 2
    TAGS = 3
    TEXT = 4
    IMAGE = 5
    HISTOGRAM = 6
    TABLE = 7
    ARTIFACT = 8
    GAP = 9


class Blob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A reference to bytes that travel beside the record, in chunks, and lie in a file of their own.

    Attributes:
        name: file name, unique within the site: ``<stream>-<seq>``.
        size: length in bytes.
        sha256: hex digest of the content.
        media_type: MIME type, such as ``image/png``.
    """

    name: str
    size: int
    sha256: str
    media_type: str


class Metrics(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Scalars logged together: key to float64. NaN and infinities are kept."""

    values: dict[str, float]


class Params(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Hyperparameters: key to None, bool, int, float, str, or lists and dicts of these."""

    values: dict[str, Any]


class Tags(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Labels of the run: key to string. The last value of a key holds."""

    values: dict[str, str]


class Text(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A piece of text, read as Markdown by backends that render it."""

    key: str
    text: str


class Image(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """One encoded image; the blob holds the PNG or JPEG file's bytes.

    Attributes:
        width, height: in pixels.
        caption: a line of text below it; may be empty.
    """

    key: str
    blob: Blob
    width: int
    height: int
    caption: str = ""


class Histogram(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Counts in bins.

    Attributes:
        edges: n + 1 finite bin limits, rising; bin i is ``[edges[i], edges[i + 1])``, the last one closed.
        counts: n counts, each >= 0.
    """

    key: str
    edges: list[float]
    counts: list[float]


class Table(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Rows of cells; a cell is None, bool, int, float or str, and every row has one cell per column."""

    key: str
    columns: list[str]
    rows: list[list[Any]]


class Artifact(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """A file.

    Attributes:
        key: the artifact's name within the run; may contain ``/``.
        filename: the last part of the path that was logged.
        artifact_type: what it is, in W&B's sense: ``file``, ``model``, ``dataset``, ...
    """

    key: str
    blob: Blob
    filename: str
    artifact_type: str = "file"


class Gap(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Stands in a stream for records that are not in it, so that every hole has a reason.

    The record that carries it has the first missing ``seq``; ``count`` records in a row are missing, for ``reason``
    (``spool_full``, ``disk_full``, ``withheld``, ...). Never handed to a backend.
    """

    count: int
    reason: str


Payload = Metrics | Params | Tags | Text | Image | Histogram | Table | Artifact | Gap


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One log call.

    The site is not in it: the sink knows the site from the authenticated channel, so no record can claim another.

    Attributes:
        seq: position in its stream (one writing process), counted from 0.
        time: unix seconds (UTC) at the log call.
        step: what the caller gave, 0 to ``MAX_STEP``; None when it gave none.
        round: the federated round in which it was logged, where the process knew one.
        payload: what was logged.
    """

    seq: int
    time: float
    step: int | None
    round: int | None
    payload: Payload


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
