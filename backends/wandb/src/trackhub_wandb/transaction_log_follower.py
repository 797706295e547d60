# SPDX-License-Identifier: Apache-2.0
"""Follows the ``.wandb`` file of an open run, to learn what the SDK's service has written to disk.

`offline` calls it to confirm records. The file is W&B's transaction log: a 7-byte header, then LevelDB log records
(https://github.com/google/leveldb/blob/main/doc/log_format.md). The log is divided into blocks of 32 KiB, and these
into fragments of checksum, length, type and data. A fragment is ``FULL``, or the ``FIRST``, ``MIDDLE`` or ``LAST`` of a
record that spans blocks. A record's data is a protobuf ``wandb_internal.Record``.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["TransactionLog"]

_FILE_HEADER_BYTES = 7
_BLOCK_BYTES = 32768
_FRAGMENT = struct.Struct("<IHB")
_FULL, _FIRST, _LAST = 1, 2, 4


class TransactionLog:
    """Reads what was appended to the file since the last call.

    Attributes:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        """Start at the first record. The file need not exist yet."""
        self.path = path
        self._offset = _FILE_HEADER_BYTES
        self._begun = b""

    def contains(self, wanted: Callable[[Any], bool]) -> bool:
        """Return whether a wanted record was added since the last call.

        Raises:
            OSError: the file cannot be read.
            google.protobuf.message.DecodeError: the file is damaged.
        """
        from wandb.proto import wandb_internal_pb2

        parse = wandb_internal_pb2.Record.FromString  # type: ignore[attr-defined]  # made at import time
        # Look at the newest records first, since callers wait for what they wrote last.
        return any(wanted(parse(data)) for data in reversed(self._new_records()))

    def _new_records(self) -> list[bytes]:
        with self.path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        records = []
        at = 0
        while True:
            left = _BLOCK_BYTES - (self._offset + at) % _BLOCK_BYTES
            if left < _FRAGMENT.size:
                at += left
                continue
            if at + _FRAGMENT.size > len(data):
                break
            _, length, kind = _FRAGMENT.unpack_from(data, at)
            end = at + _FRAGMENT.size + length
            if kind == 0 or end > len(data):
                break
            body = data[at + _FRAGMENT.size : end]
            self._begun = body if kind in (_FULL, _FIRST) else self._begun + body
            if kind in (_FULL, _LAST):
                records.append(self._begun)
            at = end
        self._offset += min(at, len(data))
        return records
