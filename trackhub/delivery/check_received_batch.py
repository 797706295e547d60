# SPDX-License-Identifier: Apache-2.0
"""Checks each batch that a site sent, before `Receiver` stores anything of it. The documentation calls it the gate.

A lane checks each record again when it reads the journal, since somebody may have copied the journal from elsewhere.
The check has three parts:

1. The types and ranges of a message's fields. `trackhub.delivery.wire` declares them, and its decoder checks them.
2. The types and ranges of a record's fields. `trackhub.records` declares them, and `trackhub.framing` checks them.
3. What a type cannot say: kinds, keys, numbers, shapes, and names of blobs. This module checks it.

A record that fails is refused alone, and is counted by reason. The whole batch is refused if its frames do not match
the numbers that it declares, or if a gap fails the check. Then nobody can tell which records the batch holds.

==================  ================================================================================
reason              the record is refused, because
==================  ================================================================================
``undecodable``     it is not valid msgpack or UTF-8, or a field has a wrong type or is out of its range
``wrong_kind``      the kind in its frame differs from the kind of its payload
``bad_key``         `trackhub.records.key_problem` finds a problem in a key
``bad_value``       a param or cell is not a plain value, a row of a table has a wrong length, or a histogram has wrong
                    edges or counts
``too_deep``        a param is nested deeper than `MAX_DEPTH`
``bad_blob``        its blob is not named STREAM-SEQ, the blob's file has another size than the record says, or Linux
                    allows no such file name
``bad_image``       its file has no PNG or JPEG header, or type, width or height differ from the record
``too_large``       the file of an image is larger than `MAX_IMAGE_BYTES`, or its caption than `MAX_CAPTION_CHARS`
``too_many_keys``   the site has used more keys than a receiver remembers
``too_many_values`` it has more values than a record may have (`trackhub.records.size_problem`), or its batch has more
                    than fit into memory
==================  ================================================================================
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from trackhub.delivery.wire import Batch, Refused
from trackhub.framing import (
    CorruptFrameError,
    Frame,
    decode_body,
    decode_head,
    decode_metrics,
    metrics_bodies,
    scan_frames,
)
from trackhub.image_header import IMAGE_TYPES, BadImageError, ImageHeader, read_image_header
from trackhub.open_without_links import open_plain
from trackhub.records import (
    KEYED,
    KIND_OF,
    MAX_CAPTION_CHARS,
    MAX_DEPTH,
    MAX_IMAGE_BYTES,
    MAX_METRICS_OF_RECORD,
    Artifact,
    Gap,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    Payload,
    Record,
    Summary,
    Table,
    count_values,
    key_problem,
    size_problem,
)

__all__ = ["Contents", "KnownKeys", "RefusedRecordError", "check_blob", "check_record", "examine"]

MAX_KEYS = 100_000
MAX_KEY_CHARS_IN_ALL = 16 << 20
"""How many different keys a receiver remembers for a site, and the sum of their lengths. Lanes have the same limits."""

MAX_VALUES = 1 << 20
"""Most values in the records of one batch, metrics not counted. A value of one byte can take 60 bytes once it is
decoded. In a batch of 1 MiB, only lists that are nearly empty could reach this limit."""

_AT_ONCE = 256
"""How many records are decoded together, before they are checked. With more, so many objects live at the same time that
Python's garbage collector runs for each group of records."""

_KINDS = frozenset(map(int, Kind))
_NOT_IN_FILENAMES = frozenset("/\0")
_NO_FILENAMES = frozenset({"", ".", ".."})
_MAX_FILENAME_BYTES = 255


class RefusedRecordError(ValueError):
    """A record that a site may not send.

    Attributes:
        reason: the word under which it is counted.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Contents(NamedTuple):
    """What the receiver must know before it stores a batch.

    Attributes:
        batch: the batch without the refused records.
        time: of the first record or gap that was accepted, in unix seconds. None if there is none.
        gaps: reason -> how many records the site says it does not have.
        blobs: the names of the blobs that the records refer to.
        refused: number and reason of each refused record, in order.
        detail: what was wrong with the first refused record, for the log; empty if there is none.
    """

    batch: Batch
    time: float | None
    gaps: Counter[str]
    blobs: list[str]
    refused: list[tuple[int, str]]
    detail: str


class KnownKeys:
    """The keys that one site has used, each checked once. Used by one thread at a time."""

    def __init__(self) -> None:
        """Start without keys."""
        self.keys: set[str] = set()
        self._chars = 0

    def check(self, keys: Iterable[str]) -> None:
        """Check these keys, and remember them.

        Raises:
            RefusedRecordError: one of them is not a valid key, or the site has used too many.
        """
        for key in keys:
            if key in self.keys:
                continue
            if problem := key_problem(key):
                raise RefusedRecordError("bad_key", f"key {key[:80]!r} {problem}")
            if len(self.keys) >= MAX_KEYS or self._chars + len(key) > MAX_KEY_CHARS_IN_ALL:
                raise RefusedRecordError(
                    "too_many_keys", f"the site has used {len(self.keys)} keys; a receiver remembers no more"
                )
            self.keys.add(key)
            self._chars += len(key)


class _Room:
    """Counts the values in records, so that they fit into memory."""

    def __init__(self) -> None:
        self._left = MAX_VALUES

    def take(self, values: int) -> None:
        self._left -= values
        if self._left < 0:
            raise RefusedRecordError("too_many_values", f"there are more than {MAX_VALUES} values in one batch")


def check_record(stream: str, kind: int, body: bytes, keys: KnownKeys, room: _Room | None = None) -> Record:
    """Decode and check the record in a frame's body, and return it.

    Args:
        stream: the stream that it comes from.
        kind: the kind in the frame's header, one of `Kind`.
        body: the frame's body.
        keys: the keys that the site has used.
        room: counts the values of the batch. None if the record is read alone.

    Raises:
        RefusedRecordError: a site may not send this record.
    """
    try:
        record = decode_body(body)
    except msgspec.DecodeError as e:
        raise RefusedRecordError("undecodable", str(e)) from e
    payload = record.payload
    if KIND_OF[type(payload)] != kind:
        raise RefusedRecordError(
            "wrong_kind", f"the frame says kind {kind}, but the payload is {type(payload).__name__}"
        )
    if len(body) > MAX_METRICS_OF_RECORD and (problem := size_problem(payload)):
        raise RefusedRecordError("too_many_values", problem)
    if type(payload) is Metrics and keys.keys.issuperset(payload.values):
        return record  # nearly all records need no further check (docs/adr/0004)
    if room is not None and not isinstance(payload, Metrics):
        room.take(count_values(payload))
    try:
        _check_payload(stream, record.seq, payload, keys)
    except RecursionError as e:
        raise RefusedRecordError("too_deep", str(e)) from e
    return record


def _check_payload(stream: str, seq: int, payload: Payload, keys: KnownKeys) -> None:
    if isinstance(payload, Gap):
        return
    keys.check(payload.values if isinstance(payload, KEYED) else (payload.key,))
    if isinstance(payload, Params | Summary):
        for value in payload.values.values():
            _check_value(value, 0)
    elif isinstance(payload, Image | Artifact):
        if payload.blob.name != f"{stream}-{seq}":
            raise RefusedRecordError("bad_blob", f"blob {payload.blob.name!r}; expected {stream}-{seq}")
        if isinstance(payload, Artifact) and not _is_filename(payload.filename):
            raise RefusedRecordError("bad_blob", f"file name {payload.filename!r}; expected the last part of a path")
        if isinstance(payload, Image):
            if payload.blob.size > MAX_IMAGE_BYTES:
                raise RefusedRecordError("too_large", f"an image of {payload.blob.size} bytes; limit {MAX_IMAGE_BYTES}")
            if len(payload.caption) > MAX_CAPTION_CHARS:
                detail = f"a caption of {len(payload.caption)} characters; limit {MAX_CAPTION_CHARS}"
                raise RefusedRecordError("too_large", detail)
            if payload.blob.media_type not in IMAGE_TYPES:
                raise RefusedRecordError("bad_image", f"it is {payload.blob.media_type[:80]!r}; expected PNG or JPEG")
    elif isinstance(payload, Histogram):
        edges, counts = payload.edges, payload.counts
        rising = all(a < b for a, b in itertools.pairwise(edges)) and all(map(math.isfinite, edges))
        if not counts or len(edges) != len(counts) + 1 or not rising:
            raise RefusedRecordError("bad_value", "histogram: expected n + 1 finite rising edges and n counts")
        if not all(count >= 0 and math.isfinite(count) for count in counts):
            raise RefusedRecordError("bad_value", "histogram: expected finite counts >= 0")
    elif isinstance(payload, Table):
        if any(len(row) != len(payload.columns) for row in payload.rows):
            raise RefusedRecordError("bad_value", "table: expected one cell for each column in each row")
        for cell in itertools.chain.from_iterable(payload.rows):
            if cell is not None and type(cell) not in (str, float, int, bool):
                detail = f"table: a cell is a {type(cell).__name__}; expected str, int, float, bool or None"
                raise RefusedRecordError("bad_value", detail)


def _is_filename(name: str) -> bool:
    """Return whether a file of a Linux system can have this name."""
    may_be = name not in _NO_FILENAMES and _NOT_IN_FILENAMES.isdisjoint(name)
    return may_be and len(name.encode()) <= _MAX_FILENAME_BYTES


def _check_value(value: Any, depth: int) -> None:
    """Check a param's value: None, bool, int, float, str, or lists and dicts of these, at most `MAX_DEPTH` deep."""
    if value is None or type(value) in (str, float, int, bool):
        return
    if type(value) not in (list, dict):
        raise RefusedRecordError("bad_value", f"a param is a {type(value).__name__}")
    if depth >= MAX_DEPTH:
        raise RefusedRecordError("too_deep", f"a param is nested more than {MAX_DEPTH} deep")
    for item in value:
        if type(value) is dict:
            if type(item) is not str or key_problem(item):
                raise RefusedRecordError("bad_key", f"a param has the key {str(item)[:80]!r}, which cannot be a key")
            _check_value(value[item], depth + 1)
        else:
            _check_value(item, depth + 1)


def check_blob(payload: Image | Artifact, path: Path) -> None:
    """Check the file of a blob: its size and, for an image, its header. Call it before a decoder reads the file.

    Raises:
        RefusedRecordError: a site may not send this record.
        OSError: the file cannot be read.
    """
    with open(path, "rb", opener=open_plain) as file:
        size = os.fstat(file.fileno()).st_size
        if size != payload.blob.size:
            raise RefusedRecordError("bad_blob", f"its file has {size} bytes; the record says {payload.blob.size}")
        if isinstance(payload, Artifact):
            return
        try:
            header = read_image_header(file)
        except BadImageError as e:
            raise RefusedRecordError("bad_image", str(e)) from e
    said = ImageHeader(payload.blob.media_type, payload.width, payload.height)
    if header != said:
        raise RefusedRecordError("bad_image", f"its file is {header}; the record says {said}")


def examine(
    batch: Batch,
    keys: KnownKeys,
    path_of: Callable[[str], Path | None],
    on_metrics: Callable[[set[str], Sequence[Record]], None] | None = None,
) -> Contents | Refused:
    """Check a batch: whether it holds the records that it declares, and each of these records.

    Args:
        batch: what the site sent.
        keys: the keys that the site has used.
        path_of: name of a blob -> its file; None if the file is not there yet.
        on_metrics: called with the keys and the records of all accepted metrics, piece by piece in their order. None
            if nobody needs them. The batch may still be refused afterwards.

    Returns:
        The contents of the batch, or the reason why the whole batch is refused.
    """
    examination = _Examination(batch, keys, path_of, on_metrics)
    try:
        examination.run()
    except CorruptFrameError as e:
        return Refused("malformed", str(e))
    if not batch.frames or examination.seq != batch.next_seq or examination.records != batch.records:
        return Refused(
            "malformed",
            f"the batch covers seq {batch.first_seq} to {batch.next_seq} and declares {batch.records} records; its "
            f"frames hold {examination.records} records and lead to seq {examination.seq}. This is a defect of the "
            "sender: report it",
        )
    return examination.contents()


class _Examination:
    """One walk over the frames of a batch.

    Attributes:
        seq: the number of the next record.
        records: how many records were seen, refused ones included.
    """

    def __init__(
        self,
        batch: Batch,
        keys: KnownKeys,
        path_of: Callable[[str], Path | None],
        on_metrics: Callable[[set[str], Sequence[Record]], None] | None,
    ) -> None:
        self.seq = batch.first_seq
        self.records = 0
        self._batch = batch
        self._keys = keys
        self._path_of = path_of
        self._on_metrics = on_metrics
        self._room = _Room()
        self._time: float | None = None
        self._gaps: Counter[str] = Counter()
        self._blobs: list[str] = []
        self._refused: list[tuple[int, str]] = []
        self._detail = ""
        self._kept: list[tuple[int, int]] = []  # (start, end) of the accepted frames before each refused frame
        self._keep_from = 0

    def run(self) -> None:
        """Walk to the end.

        Raises:
            CorruptFrameError: the next bytes are not a frame, a record has the wrong number, or a gap is not valid.
        """
        frames, offset = self._batch.frames, 0
        while offset < len(frames):
            bodies, end = metrics_bodies(frames, offset, _AT_ONCE)
            if not (bodies and self._are_plain_metrics(bodies)):
                end = offset
                for frame in itertools.islice(scan_frames(frames, offset), max(1, len(bodies))):
                    self._take(frame)
                    end = frame.end
                if end == offset:
                    raise CorruptFrameError(f"half a frame at offset {offset}", offset)
            offset = end

    def _are_plain_metrics(self, bodies: list[bytes]) -> bool:
        """Return whether all bodies are valid metrics with the next numbers of the stream. If so, count them.

        Nearly all batches consist of valid metrics, and `_take` would need three times as long. If this returns False,
        `_take` finds out what is wrong.
        """
        try:
            records = decode_metrics(bodies)
            if [record.seq for record in records] != list(range(self.seq, self.seq + len(records))):
                return False
            keys = set[str]().union(*[record.payload.values for record in records])
            if len(keys) > MAX_METRICS_OF_RECORD and any(
                len(r.payload.values) > MAX_METRICS_OF_RECORD for r in records
            ):
                return False
            new = keys - self._keys.keys
            if new:  # in the order of the records: if the site has too many keys, the first ones are remembered
                self._keys.check(dict.fromkeys(key for r in records for key in r.payload.values if key in new))
        except (msgspec.DecodeError, RefusedRecordError):
            return False
        if self._on_metrics is not None:
            self._on_metrics(keys, records)
        self.seq += len(bodies)
        self.records += len(bodies)
        self._time = records[0].time if self._time is None else self._time
        return True

    def _take(self, frame: Frame) -> None:
        """Check one frame."""
        body = self._batch.frames[frame.body : frame.end]
        if frame.kind == Kind.GAP:
            self._take_gap(frame, body)
            return
        self.records += 1
        self.seq += 1
        try:
            self._check(frame.kind, body)
        except RefusedRecordError as e:
            self._refused.append((self.seq - 1, e.reason))
            self._detail = self._detail or f"record {self.seq - 1} ({e.reason}): {str(e)[:200]}"
            self._kept.append((self._keep_from, frame.start))
            self._keep_from = frame.end

    def _check(self, kind: int, body: bytes) -> None:
        try:
            seq, time = msgspec.structs.astuple(decode_head(body))
        except msgspec.DecodeError as e:
            raise RefusedRecordError("undecodable", str(e)) from e
        if seq != self.seq - 1:
            raise CorruptFrameError(f"a record has seq {seq}; expected {self.seq - 1}", 0)
        if kind not in _KINDS:  # a site with a newer trackhub sent it. Each lane rejects it, and counts it.
            return
        record = check_record(self._batch.stream, kind, body, self._keys, self._room)
        self._time = time if self._time is None else self._time
        if isinstance(record.payload, Metrics):
            if self._on_metrics is not None:
                self._on_metrics(set(record.payload.values), [record])
        elif isinstance(record.payload, Image | Artifact):
            name = record.payload.blob.name
            if (path := self._path_of(name)) is not None:
                check_blob(record.payload, path)
            self._blobs.append(name)

    def _take_gap(self, frame: Frame, body: bytes) -> None:
        try:
            record = check_record(self._batch.stream, Kind.GAP, body, self._keys)
        except RefusedRecordError as e:
            raise CorruptFrameError(f"the gap at offset {frame.start} is not valid: {e}", frame.start) from e
        gap = record.payload
        assert isinstance(gap, Gap)
        if record.seq != self.seq:
            raise CorruptFrameError(f"a gap has seq {record.seq}; expected {self.seq}", frame.start)
        self._gaps[gap.reason] += gap.count
        self._time = record.time if self._time is None else self._time
        self.seq += gap.count

    def contents(self) -> Contents:
        """Return what was found."""
        batch = self._batch
        if self._refused:
            view = memoryview(batch.frames)
            kept = [*self._kept, (self._keep_from, len(view))]
            frames = b"".join(view[start:end] for start, end in kept)
            batch = msgspec.structs.replace(batch, records=batch.records - len(self._refused), frames=frames)
        return Contents(batch, self._time, self._gaps, self._blobs, self._refused, self._detail)
