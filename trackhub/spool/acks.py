# SPDX-License-Identifier: Apache-2.0
"""The files that a reader of a spool stores: how far it got in each stream, and the counts of retired streams.

The sender's end of the spool writes both. Writers read them to learn what was acknowledged.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trackhub.open_without_links import read_plain
from trackhub.plain_values_to_structs import prepare
from trackhub.spool.batch import SpoolBatch
from trackhub.spool.layout import SEGMENT_HEADER
from trackhub.spool.write_on_full_disk import write_start

__all__ = ["Ack", "Retired", "ack_file", "find_ack", "read_ack", "read_retired", "write_ack", "write_retired"]

_HEADER = struct.Struct("<II")  # size and checksum of the body


class Ack(msgspec.Struct, array_like=True):
    """How far one reader got in one stream.

    Attributes:
        segment: the segment of the next unacknowledged frame.
        offset: where that frame starts in the segment.
        next_seq: the ``seq`` of the next record to be acknowledged.
        acked: records that the receiver acknowledged.
        refused: reason -> records that the receiver refused.
        explained: reason -> records in gaps and in damaged places. Records that a policy withheld have the reason
            ``withheld``.
        withheld: rule -> records that it withheld.
        altered: rule -> values that it left out of other records or changed.
        seen: what `trackhub.policy.thinning` remembers of the stream at this place.
    """

    segment: int = 0
    offset: int = len(SEGMENT_HEADER)
    next_seq: int = 0
    acked: int = 0
    refused: dict[str, int] = {}
    explained: dict[str, int] = {}
    withheld: dict[str, int] = {}
    altered: dict[str, int] = {}
    seen: dict[str, tuple[int, float]] = {}

    def after(self, batch: SpoolBatch, refused: Mapping[str, int]) -> Ack:
        """Return how far the reader has got after this batch was accepted.

        Args:
            batch: the batch.
            refused: reason -> how many of its records the receiver refused.
        """
        return Ack(
            batch.segment,
            batch.offset,
            batch.next_seq,
            self.acked + batch.records - sum(refused.values()),
            _sum(self.refused, refused),
            _sum(self.explained, batch.explained),
            _sum(self.withheld, batch.withheld),
            _sum(self.altered, batch.altered),
            batch.seen,
        )


def _sum(counts: Mapping[str, int], more: Mapping[str, int]) -> dict[str, int]:
    total = Counter(counts)
    total.update(more)
    return dict(total)


class Retired(msgspec.Struct, array_like=True):
    """The counts of all streams that this reader has retired, added up.

    Attributes:
        streams: how many streams are retired.
        logged, withheld, acked: as in `trackhub.spool.counts.StreamCount`.
        dropped, refused: reason -> records, as in `trackhub.spool.counts.StreamCount`.
        names: the retired streams that may still have files, because another reader needs them or a crash left them.
        altered, withheld_by_rule, altered_by_rule: as in `trackhub.spool.counts.StreamCount`.
    """

    streams: int = 0
    logged: int = 0
    withheld: int = 0
    acked: int = 0
    dropped: dict[str, int] = {}
    refused: dict[str, int] = {}
    names: tuple[str, ...] = ()
    altered: dict[str, int] = {}
    withheld_by_rule: dict[str, int] = {}
    altered_by_rule: dict[str, int] = {}


prepare(Ack, Retired)


def ack_file(folder: Path, stream: str, cursor: str) -> Path:
    """Return the file that says how far a reader got in a stream.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        cursor: the reader's name.
    """
    return folder / f"{stream}.{cursor}.ack"


def find_ack(folder: Path, stream: str, cursor: str) -> Ack | None:
    """Return how far this reader got. None if the file is missing or damaged.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        cursor: the reader's name.
    """
    body = _read(ack_file(folder, stream, cursor))
    try:
        return None if body is None else msgspec.msgpack.decode(body, type=Ack)
    except msgspec.DecodeError:
        return None


def read_ack(folder: Path, stream: str, cursor: str) -> Ack:
    """Return how far this reader got. Return the stream's beginning if the file is missing or damaged.

    Starting again at the beginning is safe: the receiver recognises records that it has.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        cursor: the reader's name.
    """
    return find_ack(folder, stream, cursor) or Ack()


def write_ack(folder: Path, stream: str, cursor: str, ack: Ack) -> None:
    """Store how far this reader got. A killed reader leaves the old or the new state.

    Args:
        folder: the spool's folder.
        stream: the stream's id.
        cursor: the reader's name.
        ack: how far it got.

    Raises:
        OSError: the file cannot be written.
    """
    os.close(write_start(ack_file(folder, stream, cursor), _with_header(msgspec.msgpack.encode(ack))))


def read_retired(folder: Path, cursor: str) -> Retired:
    """Return the counts of the streams that this reader has retired. They are zero if the file is missing or damaged.

    Args:
        folder: the spool's folder.
        cursor: the reader's name.
    """
    body = _read(_retired_file(folder, cursor))
    try:
        return Retired() if body is None else msgspec.msgpack.decode(body, type=Retired)
    except msgspec.DecodeError:
        return Retired()


def write_retired(folder: Path, cursor: str, retired: Retired) -> None:
    """Store the counts of the retired streams. A killed reader leaves the old or the new ones.

    Args:
        folder: the spool's folder.
        cursor: the reader's name.
        retired: the counts.

    Raises:
        OSError: the file cannot be written.
    """
    path = _retired_file(folder, cursor)
    # Write a new file and rename it. The names may need more than one block, and a torn write would lose all counts.
    partial = path.with_name(f"{path.name}.new")
    os.close(write_start(partial, _with_header(msgspec.msgpack.encode(retired))))
    partial.replace(path)


def _retired_file(folder: Path, cursor: str) -> Path:
    return folder / f"{cursor}.retired"


def _with_header(body: bytes) -> bytes:
    return _HEADER.pack(len(body), zlib.crc32(body)) + body


def _read(path: Path) -> bytes | None:
    """Return the body of an ``.ack`` or ``.retired`` file; None if it is missing, unreadable or damaged."""
    try:
        data = read_plain(path)
        size, crc = _HEADER.unpack_from(data)
    except (OSError, struct.error):
        return None
    body = data[_HEADER.size : _HEADER.size + size]
    return body if len(body) == size and zlib.crc32(body) == crc else None
