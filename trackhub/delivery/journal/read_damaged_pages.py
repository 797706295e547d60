# SPDX-License-Identifier: Apache-2.0
"""Reads rows from the pages of a damaged SQLite file, without the trees that lead to them. `repair` calls it.

SQLite finds a row through the pages above it. If one of these is damaged, SQLite finds no row below it. This module
reads each page alone, and yields the rows in it. A page in the write-ahead log replaces the same page of the file.

Source: https://www.sqlite.org/fileformat.html (SQLite 3.50). Names in brackets are from that document.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from trackhub.open_without_links import open_plain

__all__ = ["Cell", "PageReader", "Value"]

Value = int | float | str | bytes | None

_MAGIC = b"SQLite format 3\0"
_DEFAULT_PAGE_BYTES = 4096
_FILE_HEADER_BYTES = 100
_TABLE_LEAF, _INDEX_LEAF, _INDEX_INTERIOR = 0x0D, 0x0A, 0x02
_HEADER_BYTES = {_TABLE_LEAF: 8, _INDEX_LEAF: 8, _INDEX_INTERIOR: 12}
_LOG_MAGIC = 0x377F0682  # plus 1 where the checksums are big-endian
_LOG_HEADER_BYTES, _FRAME_HEADER_BYTES = 32, 24
_MAX_PAYLOAD_BYTES = 1 << 30
_INT_BYTES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}
_WORD = 0xFFFFFFFF


class Cell(NamedTuple):
    """One row of a table, or one entry of an index.

    Attributes:
        rowid: the row's id; None in an index, and in a table without ids.
        values: the columns. The last one is cut short if its overflow pages cannot be read.
    """

    rowid: int | None
    values: list[Value]


class PageReader:
    """Reads the pages of one file. A context manager. A page that the disk cannot read counts as damaged."""

    def __init__(self, path: Path) -> None:
        """Open the file and its write-ahead log, if it has one.

        Raises:
            OSError: the file cannot be opened.
        """
        self._fd = open_plain(path, os.O_RDONLY)
        self._size = os.fstat(self._fd).st_size
        header = self._read(0, _FILE_HEADER_BYTES) or b""
        try:
            with open(path.with_name(f"{path.name}-wal"), "rb", opener=open_plain) as file:
                log = file.read()
        except OSError:
            log = b""
        self._page_bytes = _page_bytes(header, log)
        reserved = header[20] if header[:16] == _MAGIC else 0
        self._usable = self._page_bytes - reserved
        self._logged = _committed_pages(log, self._page_bytes)
        self._free = self._free_pages(header)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def places(self) -> Iterator[tuple[int, int]]:
        """Yield the place of each cell that may hold a row: the page's number, and the cell's number on that page."""
        last = max(-(-self._size // self._page_bytes), *self._logged, 0)
        for number in range(1, last + 1):
            page = None if number in self._free else self._page(number)
            if page is None:
                continue
            start = _FILE_HEADER_BYTES if number == 1 else 0
            header = _HEADER_BYTES.get(page[start])
            if header is not None:
                most = (self._page_bytes - start - header) // 2
                cells = min(most, int.from_bytes(page[start + 3 : start + 5]))
                yield from ((number, cell) for cell in range(cells))

    def read(self, number: int, cell: int, *, first_bytes: bool = False) -> Cell | None:
        """Return what is in a cell; None if it makes no sense.

        Args:
            number: the page's number.
            cell: the cell's number on it.
            first_bytes: read only what is on the page itself, so that long columns are cut short.
        """
        page = self._page(number)
        if page is None:
            return None
        start = _FILE_HEADER_BYTES if number == 1 else 0
        kind = page[start]
        try:
            pointer = start + _HEADER_BYTES[kind] + 2 * cell
            at = int.from_bytes(page[pointer : pointer + 2])
            if at < pointer + 2:
                return None
            if kind == _INDEX_INTERIOR:
                at += 4  # these bytes are the number of the page with the smaller entries
            size, at = _varint(page, at)
            rowid = None
            if kind == _TABLE_LEAF:
                rowid, at = _varint(page, at)
            if not 0 < size <= _MAX_PAYLOAD_BYTES:
                return None
            payload = self._payload(page, at, size, is_table=kind == _TABLE_LEAF, first_bytes=first_bytes)
            return Cell(rowid, _values(payload, size))
        except (IndexError, KeyError, ValueError, struct.error):
            return None

    def _payload(self, page: bytes, at: int, size: int, *, is_table: bool, first_bytes: bool) -> bytes:
        """Return the bytes of a record, from its page and from its overflow pages."""
        usable = self._usable
        most_here = usable - 35 if is_table else (usable - 12) * 64 // 255 - 23  # [X]
        if size <= most_here:
            return page[at : at + size]
        least_here = (usable - 12) * 32 // 255 - 23  # [M]
        here = least_here + (size - least_here) % (usable - 4)  # [K]
        here = here if here <= most_here else least_here
        parts, left = [page[at : at + here]], size - here
        number = int.from_bytes(page[at + here : at + here + 4])
        seen: set[int] = set()
        while left > 0 and not first_bytes and number and number not in seen:
            seen.add(number)
            part = self._page(number)
            if part is None:
                break
            parts.append(part[4 : min(usable, 4 + left)])
            left -= usable - 4
            number = int.from_bytes(part[:4])
        return b"".join(parts)

    def _page(self, number: int) -> bytes | None:
        page = self._logged.get(number) or self._read((number - 1) * self._page_bytes, self._page_bytes)
        return page if page and len(page) == self._page_bytes else None

    def _read(self, offset: int, size: int) -> bytes | None:
        try:
            return os.pread(self._fd, size, offset)
        except OSError:
            return None  # a bad sector

    def _free_pages(self, header: bytes) -> set[int]:
        """Return the pages that are not in use ("freelist"). They may hold old rows."""
        first = self._logged.get(1, header)
        free: set[int] = set()
        number = int.from_bytes(first[32:36]) if first[:16] == _MAGIC else 0
        while number and number not in free and (page := self._page(number)) is not None:
            free.add(number)
            count = min(int.from_bytes(page[4:8]), self._page_bytes // 4 - 2)
            free.update(struct.unpack_from(f">{count}I", page, 8))
            number = int.from_bytes(page[:4])
        return free


def _page_bytes(header: bytes, log: bytes) -> int:
    """Return the size of a page from the file's header. If that cannot be read, take it from the write-ahead log."""
    size = int.from_bytes(header[16:18]) if header[:16] == _MAGIC else int.from_bytes(log[8:12])
    size = 65536 if size == 1 else size
    return size if 512 <= size <= 65536 and size & (size - 1) == 0 else _DEFAULT_PAGE_BYTES


def _committed_pages(log: bytes, page_bytes: int) -> dict[int, bytes]:
    """Return number -> page, for the pages in a write-ahead log up to its last commit."""
    magic = int.from_bytes(log[:4])
    if len(log) < _LOG_HEADER_BYTES or magic not in (_LOG_MAGIC, _LOG_MAGIC + 1):
        return {}
    order = ">" if magic & 1 else "<"
    checksum = _checksum(log[:24], order, (0, 0))
    pages: dict[int, bytes] = {}
    pending: dict[int, bytes] = {}
    for at in range(
        _LOG_HEADER_BYTES, len(log) - _FRAME_HEADER_BYTES - page_bytes + 1, _FRAME_HEADER_BYTES + page_bytes
    ):
        number, pages_after_commit, *rest = struct.unpack_from(">6I", log, at)
        page = log[at + _FRAME_HEADER_BYTES : at + _FRAME_HEADER_BYTES + page_bytes]
        checksum = _checksum(page, order, _checksum(log[at : at + 8], order, checksum))
        if tuple(rest) != (*struct.unpack_from(">2I", log, 16), *checksum):
            break  # this frame is left from an earlier use of the log, or is damaged
        pending[number] = page
        if pages_after_commit:
            pages.update(pending)
            pending.clear()
    return pages


def _checksum(data: bytes, order: str, start: tuple[int, int]) -> tuple[int, int]:
    a, b = start
    for x, y in struct.iter_unpack(f"{order}2I", data):
        a = (a + x + b) & _WORD
        b = (b + y + a) & _WORD
    return a, b


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Return a number of one to nine bytes, and where it ends."""
    value = 0
    for i in range(8):
        byte = data[at + i]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + i + 1
    value = value << 8 | data[at + 8]
    return value - (1 << 64 if value >= 1 << 63 else 0), at + 9


def _values(payload: bytes, size: int) -> list[Value]:
    """Return the columns of a record of ``size`` bytes. Only the last column may be cut short.

    Raises:
        ValueError, IndexError: the bytes are not a record.
    """
    header_end, at = _varint(payload, 0)
    end = header_end
    values: list[Value] = []
    while at < header_end:
        kind, at = _varint(payload, at)
        start = end
        value: Value
        if kind in _INT_BYTES:
            end += _INT_BYTES[kind]
            value = int.from_bytes(payload[start:end], signed=True)
        elif kind == 7:
            end += 8
            (value,) = struct.unpack(">d", payload[start:end])
        elif kind in (0, 8, 9):
            value = None if kind == 0 else kind - 8
        elif kind >= 12:
            end += (kind - 12) // 2
            value = payload[start:end] if kind % 2 == 0 else payload[start:end].decode()
        else:
            raise ValueError(f"no column is of kind {kind}")
        if end > len(payload) and at < header_end:
            raise ValueError("a column before the last one is cut short")
        values.append(value)
    if at != header_end or end != size:
        raise ValueError("the columns are not as long as the record")
    return values
