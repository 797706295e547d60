# SPDX-License-Identifier: Apache-2.0
"""The TFRecord format of TensorBoard's event files: one frame per event.

::

    frame = size (uint64) · crc of size (uint32) · payload (size bytes) · crc of payload (uint32)     little-endian

Both checksums are CRC-32C, rotated and offset ("masked"), since a plain checksum of data that holds its own checksum is
weak. `event_files`, `events` and `hparams_file` call this module.

Source: TensorFlow, ``core/lib/io/record_writer.h``; the same in ``tensorboard/summary/writer/record_writer.py`` 2.21.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import lru_cache
from mmap import mmap

from google_crc32c import value as _crc32c

__all__ = ["FOOTER", "HEADER", "frame", "frames"]

HEADER = 12
"""Bytes before a frame's payload."""

FOOTER = 4
"""Bytes after a frame's payload."""

_pack_size = struct.Struct("<Q").pack
_size_at = struct.Struct("<Q").unpack_from
_pack_crc = struct.Struct("<I").pack


def frame(payload: bytes) -> bytes:
    """Return the frame that holds this payload."""
    return b"".join((_header(len(payload)), payload, _masked_crc(payload)))


def frames(buffer: bytes | mmap) -> Iterator[tuple[int, int]]:
    """Yield where the payload of each whole frame starts and ends. Stop before a frame that is cut short.

    This reads only sizes, so a payload may still be damaged: compare the frame with ``frame(payload)``. A size of zero
    also ends the walk. No event is empty, but a power cut may leave zeros at the end of a file.
    """
    length = len(buffer)
    start = HEADER
    while start < length:
        (size,) = _size_at(buffer, start - HEADER)
        end = start + size
        if size == 0 or end + FOOTER > length:
            return
        yield start, end
        start = end + FOOTER + HEADER


@lru_cache(1024)  # the events of a run have few sizes, and a header takes a third of the time of a frame
def _header(length: int) -> bytes:
    size = _pack_size(length)
    return size + _masked_crc(size)


def _masked_crc(data: bytes) -> bytes:
    crc = _crc32c(data)
    return _pack_crc(((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
