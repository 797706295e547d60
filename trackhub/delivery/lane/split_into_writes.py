# SPDX-License-Identifier: Apache-2.0
"""Splits entries into writes, each of which takes a backend a bounded time.

`Isolation` calls it for the entries that it queues. Other runs get their turns only between two writes. So a write is
limited in values as well as in records: a request of a site may hold a hundred thousand values in a few records.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from trackhub.records import KEYED, Artifact, Image, Metrics, Payload, count_values
from trackhub.spi import Entry

__all__ = ["MAX_VALUES_OF_WRITE", "split_into_writes"]

MAX_VALUES_OF_WRITE = 5000
"""The most values in one write, unless one record has more. MLflow's SDK needs 1 to 1.5 s for so many new keys. A
thousand records of five values are still one write."""

_EXTRA_VALUES = 50  # a text, file, histogram or table counts as this many values more: SDKs need 1 to 4 ms for it
_BYTES_OF_VALUE = 1 << 16  # a file counts as one value more for each 64 KiB. Backends copy about a gigabyte a second


def split_into_writes(entries: Sequence[Entry], max_batch: int) -> Iterator[list[Entry]]:
    """Yield the entries in their order, in writes.

    Args:
        entries: what is to be written.
        max_batch: the most entries in one write.
    """
    for start in range(0, len(entries), max_batch):
        batch = list(entries[start : start + max_batch])
        payloads = [entry.payload for entry in batch]
        sizes = [len(payload.values) if type(payload) is Metrics else _size_of(payload) for payload in payloads]
        if sum(sizes) <= MAX_VALUES_OF_WRITE:
            yield batch
        else:
            yield from _split(batch, sizes)


def _split(entries: Sequence[Entry], sizes: Sequence[int]) -> Iterator[list[Entry]]:
    batch: list[Entry] = []
    left = MAX_VALUES_OF_WRITE
    for entry, size in zip(entries, sizes, strict=True):
        left -= size
        if batch and left < 0:
            yield batch
            batch, left = [], MAX_VALUES_OF_WRITE - size
        batch.append(entry)
    yield batch


def _size_of(payload: Payload) -> int:
    if isinstance(payload, Image | Artifact):
        return _EXTRA_VALUES + payload.blob.size // _BYTES_OF_VALUE
    return count_values(payload) + (0 if isinstance(payload, KEYED) else _EXTRA_VALUES)
