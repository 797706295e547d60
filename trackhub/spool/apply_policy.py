# SPDX-License-Identifier: Apache-2.0
"""Applies a site's rules to the batches that a reader hands out, so that only what the rules allow leaves the spool.

`SpoolReader` calls it for each batch, and `trackhub.policy` decides. A record that must not leave is replaced by a gap
with the reason ``withheld``, without its key, time, step and round. The file of such a record is not handed out either.

A policy can *thin*: only some of the values leave that one process logs under a key (`trackhub.policy.thinning`). With
``keep_last``, the last value of a key in each round leaves, too. Whether a value is the last is known only when a later
value of the key comes, or when the round ends. Until then, the reader holds the stream back.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from trackhub.errors import RecordError
from trackhub.framing import decode_body, encode_frame, scan_frames
from trackhub.job_and_run_info import Side
from trackhub.policy import SiteRules
from trackhub.policy.judge import UNREADABLE, Judge, Judgement, judge_of
from trackhub.policy.thinning import Seen, Thinning
from trackhub.records import KIND_OF, STEPLESS, Artifact, Blob, Gap, Image, Kind, Metrics, Payload, Record
from trackhub.spool.batch import SpoolBatch

__all__ = ["Withholding"]

_WITHHELD = "withheld"
_AT_THE_SITE = frozenset({Side.CLIENT, Side.LOCAL})


@dataclass(slots=True)
class _Item:
    """One frame of a batch.

    Attributes:
        seq: the number of its record.
        end: where the frame ends in the batch.
        frame: its bytes.
        record: the record in the frame; None if it cannot be read.
        judgement: what may leave of the record.
        thinned: series (see `_series_key`) -> the rule by which thinning withholds its value.
        seen: what thinning remembers of the record's series after this record.
    """

    seq: int
    end: int
    frame: bytes
    record: Record | None
    judgement: Judgement
    thinned: dict[str, str] = field(default_factory=dict)
    seen: Seen = field(default_factory=dict)

    @property
    def gap(self) -> Gap | None:
        """The gap that the spool has here; None for a record."""
        payload = self.record.payload if self.record is not None else None
        return payload if isinstance(payload, Gap) else None


class Withholding:
    """The rules of one site for one reader of its spool."""

    def __init__(self, judge: Judge) -> None:
        """Apply what ``judge`` decides."""
        self._judge = judge
        # stream -> (seq, series) -> decision. True: thinning would withhold the value, but it is the last of its round,
        # so it leaves. Part of a batch may be read again, and must get the same decision. Otherwise a file could leave
        # without its record.
        self._is_last: dict[str, dict[tuple[int, str], bool]] = {}

    @classmethod
    def for_reader(cls, rules: Mapping[str, Any], cursor: str) -> Withholding | None:
        """Return the rules for a reader; None if it may have all records.

        Args:
            rules: the rules that the spool keeps.
            cursor: the reader's name. If its receiver is at the site itself, only forbidden kinds are withheld.

        Raises:
            ConfigError: the rules cannot be read.
        """
        judge = judge_of(SiteRules.from_plain(rules), leaves_site=cursor not in _AT_THE_SITE)
        return None if judge is None else cls(judge)

    def apply(self, batch: SpoolBatch, seen: Seen, *, more: bool, ended: bool) -> SpoolBatch | None:
        """Return what may leave of a batch. If later records cannot be decided yet, return only the first ones.

        Args:
            batch: what the spool holds.
            seen: what thinning remembers of the stream before this batch.
            more: True if the stream already has records after this batch.
            ended: True if no record follows in this round: this is the stream's last batch, and the round or the stream
                has ended.

        Returns:
            What may leave. None if not even the first record can be decided yet.
        """
        items = list(self._items(batch))
        end = len(items)
        if self._judge.thinning is not None:
            end = self._thin(self._judge.thinning, batch.stream, items, seen, more=more, ended=ended)
        return self._batch(batch, items[:end], seen) if end else None

    def _items(self, batch: SpoolBatch) -> Iterable[_Item]:
        seq = batch.first_seq
        for frame in scan_frames(batch.frames):
            body = batch.frames[frame.body : frame.end]
            record, judgement = self._judged(frame.kind, body)
            item = _Item(seq, frame.end, batch.frames[frame.start : frame.end], record, judgement)
            seq += item.gap.count if item.gap is not None else 1
            yield item

    def _judged(self, kind: int, body: bytes) -> tuple[Record | None, Judgement]:
        """Return a record and what may leave of it. A record that cannot be read does not leave."""
        try:
            record = decode_body(body)
            if KIND_OF[type(record.payload)] == kind:
                return record, self._judge.judge(record.payload)
        except (msgspec.DecodeError, RecursionError):
            pass
        return None, Judgement(None, UNREADABLE, Counter())

    def _thin(self, thinning: Thinning, stream: str, items: list[_Item], seen: Seen, *, more: bool, ended: bool) -> int:
        """Note in the items what thinning withholds. Return how many of the first items are decided."""
        is_last = {place: last for place, last in self._is_last.get(stream, {}).items() if place[0] >= items[0].seq}
        self._is_last[stream] = is_last
        seen = dict(seen)
        undecided: dict[str, int] = {}  # series -> index of the item that may be the last of its round
        current = items[0].record.round if items[0].record is not None else None

        def keep(key: str) -> None:
            item = items[undecided.pop(key)]
            item.thinned.pop(key)
            is_last[item.seq, key] = True

        for i, item in enumerate(items):
            if item.record is None or item.gap is not None:
                continue
            if item.record.round != current:
                current = item.record.round
                for key in list(undecided):
                    keep(key)
            for key in _series(item.judgement.payload):
                undecided.pop(key, None)
                rule = thinning.take(seen, key, item.record.time)
                if key in seen:
                    item.seen[key] = seen[key]
                known = is_last.get((item.seq, key))
                if rule is None or known:
                    continue
                item.thinned[key] = rule
                if thinning.keep_last and known is None:
                    undecided[key] = i
        if ended:
            for key in list(undecided):
                keep(key)
        # If even the whole batch does not decide about its first record, let the record leave. Otherwise the stream
        # would never move on.
        for key in [key for key, i in undecided.items() if i == 0 and more]:
            keep(key)
        end = min(undecided.values(), default=len(items))
        if thinning.keep_last:
            is_last.update(((item.seq, key), False) for item in items[:end] for key in item.thinned)
        return end

    def _batch(self, batch: SpoolBatch, items: list[_Item], seen: Seen) -> SpoolBatch:
        """Return the batch of these items."""
        made = _Made(next((item.record.time for item in items if item.record and _payload(item)[0]), time.time()))
        for item in items:
            made.add(item)
        last = items[-1]
        return msgspec.structs.replace(
            batch,
            next_seq=last.seq + (last.gap.count if last.gap is not None else 1),
            records=made.records,
            frames=made.frames(),
            blobs=tuple(made.blobs),
            lost_blobs=(*batch.lost_blobs, *made.withheld_blobs),
            explained=dict(made.explained),
            offset=batch.offset - (len(batch.frames) - last.end),
            withheld=dict(made.withheld),
            altered=dict(made.altered),
            seen={**seen, **{key: value for item in items for key, value in item.seen.items()}},
        )


class _Made:
    """A batch in the making.

    Attributes:
        records: how many records leave.
        blobs: the blobs that leave.
        withheld_blobs: the blobs that do not leave.
        explained: reason -> how many records are replaced by gaps.
        withheld: rule -> how many records it withholds.
        altered: rule -> how many values it removes or changes in the records that leave.
    """

    def __init__(self, time: float) -> None:
        """Start.

        All gaps for withheld records get this time. A record's own time would tell when it was logged.
        """
        self.records = 0
        self.blobs: list[Blob] = []
        self.withheld_blobs: list[Blob] = []
        self.explained: Counter[str] = Counter()
        self.withheld: Counter[str] = Counter()
        self.altered: Counter[str] = Counter()
        self._time = time
        self._frames: list[bytes] = []
        self._gap_from = self._gap_count = 0

    def add(self, item: _Item) -> None:
        """Add what may leave of an item."""
        payload, rule, altered = _payload(item)
        if item.gap is not None:
            self.explained[item.gap.reason] += item.gap.count
            self._take(item.frame)
            return
        blobs = [item.record.payload.blob] if item.record and isinstance(item.record.payload, Image | Artifact) else []
        frame = item.frame
        if payload is not None and item.record is not None and altered:
            try:
                frame = encode_frame(msgspec.structs.replace(item.record, payload=payload))
            except RecordError:  # a rounded integer may take more bytes, so a record may become too large
                payload, rule = None, UNREADABLE
        if payload is None:
            self._withhold(item.seq, rule)
            self.withheld_blobs += blobs
            return
        self._take(frame)
        self.altered.update(altered)
        self.records += 1
        self.blobs += blobs

    def frames(self) -> bytes:
        """Return the frames of the batch."""
        self._end_gap()
        return b"".join(self._frames)

    def _take(self, frame: bytes) -> None:
        self._end_gap()
        self._frames.append(frame)

    def _withhold(self, seq: int, rule: str) -> None:
        self._gap_from = self._gap_from if self._gap_count else seq
        self._gap_count += 1
        self.withheld[rule] += 1
        self.explained[_WITHHELD] += 1

    def _end_gap(self) -> None:
        if self._gap_count:
            gap = Gap(self._gap_count, _WITHHELD)
            self._frames.append(encode_frame(Record(self._gap_from, self._time, None, None, gap)))
            self._gap_count = 0


def _payload(item: _Item) -> tuple[Payload | None, str, Counter[str]]:
    """Return what leaves of an item.

    Returns:
        Three values: the payload, or None; the rule that withholds it, or an empty string; and rule -> how many values
        were left out or changed.
    """
    payload, rule, altered = item.judgement
    if not item.thinned or payload is None:
        return payload, rule, altered
    if not isinstance(payload, Metrics):
        return None, next(iter(item.thinned.values())), altered
    values = {key: value for key, value in payload.values.items() if _series_key(Kind.METRICS, key) not in item.thinned}
    if not values:
        return None, next(iter(item.thinned.values())), altered
    return Metrics(values), "", altered + Counter(item.thinned.values())


def _series(payload: Payload | None) -> list[str]:
    """Return the series that a record adds to, each named by kind and key.

    A param, tag, final value, artifact or gap adds to none.
    """
    if payload is None or isinstance(payload, (*STEPLESS, Artifact, Gap)):
        return []
    kind = KIND_OF[type(payload)]
    keys = payload.values if isinstance(payload, Metrics) else (payload.key,)
    return [_series_key(kind, key) for key in keys]


def _series_key(kind: Kind, key: str) -> str:
    return f"{int(kind)}{key}"
