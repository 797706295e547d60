# SPDX-License-Identifier: Apache-2.0
"""Adapts records to what a backend declares: rejects what it cannot store, and fits keys, steps and numbers.

`entry_reader` calls it for each record of a run, in journal order. An adaptation remembers facts about earlier records,
such as their last steps. The lane stores that memory with its confirmed cursor. So after a restart, the same records
become the same entries.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.plain_values_to_structs import prepare
from trackhub.records import KEYED, KIND_OF, STEPLESS, Kind, Metrics, Params, Payload, Record
from trackhub.spi import ANY_KEY, Capabilities, Entry, KeyRule, Rejection

__all__ = ["MAX_MEMORY_BYTES", "Adaptation"]

MAX_MEMORY_BYTES = 1 << 20
"""The most bytes that an adaptation remembers: enough for 10,000 long keys. The lane stores them with each
confirmation, and the journal is locked meanwhile. Without a limit, a site with many keys in many streams would make the
lane write hundreds of megabytes each time."""

_DIGEST_BYTES = 32
_FACT_BYTES = 16  # what one fact takes, without its key
_FULL = f"the keys of this run take more than the {MAX_MEMORY_BYTES} bytes that a lane remembers; log fewer keys"
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


class _Memory(msgspec.Struct):
    """What an adaptation remembers.

    Attributes:
        ordinals: stream -> key -> the step that the key's next record without a step gets.
        last_steps: key -> its highest step, for backends that cannot store late steps.
        params: key -> its first value, encoded, for backends that cannot change it. A digest replaces a long value.
    """

    ordinals: dict[str, dict[str, int]] = {}
    last_steps: dict[str, int] = {}
    params: dict[str, bytes] = {}


prepare(_Memory)


class Adaptation:
    """Turns records into entries that a backend with these capabilities can store. Used by one thread."""

    def __init__(self, capabilities: Capabilities, memory: bytes = b"") -> None:
        """Start with no memory, or with the memory of an earlier adaptation of the same run and lane."""
        self._can = capabilities
        self._memory = msgspec.msgpack.decode(memory, type=_Memory) if memory else _Memory()
        self._memory_bytes = _size(self._memory)
        self._keys = {kind: _Keys(capabilities.key_rules.get(kind, capabilities.key_rule)) for kind in Kind}
        self._keeps_metric_keys = self._keys[Kind.METRICS].keeps_all
        self._fine_metric_keys = self._keys[Kind.METRICS].fine
        self._takes_any_metrics = (
            Kind.METRICS in capabilities.kinds and capabilities.nonfinite and capabilities.late_steps
        )

    def memory(self) -> bytes:
        """Return what a later adaptation needs to go on from here."""
        return msgspec.msgpack.encode(self._memory)

    def adapt(self, stream: str, record: Record, position: int) -> tuple[Entry | Rejection, Sequence[str]]:
        """Return the entry or the rejection for this record, and the names of the alterations that were needed.

        Args:
            stream: the stream that the record comes from.
            record: what was logged.
            position: the record's place in its run.
        """
        payload = record.payload
        if (
            type(payload) is Metrics  # nearly all records are, and need no check of key, step or value (docs/adr/0004)
            and self._takes_any_metrics
            and record.step is not None
            and (self._keeps_metric_keys or self._fine_metric_keys.issuperset(payload.values))
        ):
            return Entry(position, record.time, record.step, record.round, payload, stream, record.seq), ()
        return self._adapt(stream, record, position)

    def _adapt(self, stream: str, record: Record, position: int) -> tuple[Entry | Rejection, list[str]]:
        payload, altered = record.payload, list[str]()
        kind = KIND_OF.get(type(payload))
        if kind is None or kind not in self._can.kinds:
            name = kind.name.lower() if kind else type(payload).__name__
            return Rejection(position, "unsupported_kind", f"{name} cannot be stored by this backend"), altered
        payload = _with_fitted_keys(payload, self._keys[kind], altered)
        if isinstance(payload, Metrics):
            if not self._can.nonfinite and not all(map(math.isfinite, payload.values.values())):
                finite = {key: value for key, value in payload.values.items() if math.isfinite(value)}
                if not finite:
                    return Rejection(position, "nonfinite", f"only NaN or infinity in {list(payload.values)}"), altered
                payload = Metrics(finite)
                altered.append("nonfinite_removed")
        elif isinstance(payload, Params) and not self._can.changing_params:
            return self._first_params(stream, record, position, payload, altered)
        step = record.step
        if step is None and not self._can.optional_step and not isinstance(payload, STEPLESS):
            step = self._ordinal(stream, record.seq, payload)
        if not self._can.late_steps and step is not None:
            if not self._has_room(key for key in _keys_of(payload) if key not in self._memory.last_steps):
                return Rejection(position, "too_many_keys", _FULL), altered
            if not self._in_order(payload, step):
                return Rejection(position, "late_step", f"step {step} is lower than an earlier one"), altered
        return Entry(position, record.time, step, record.round, payload, stream, record.seq), altered

    def _ordinal(self, stream: str, seq: int, payload: Payload) -> int:
        """Return the step for a record that has none.

        The first such record of a key gets 0, the next one 1, and so on. For several keys, the highest number counts.
        If the record's keys are not known and cannot be remembered, the step is the record's number in its stream.
        """
        counts = self._memory.ordinals.get(stream, {})
        keys = _keys_of(payload)
        new = [key for key in keys if key not in counts]
        if new and not self._has_room(new if counts else [stream, *new]):
            keys = [key for key in keys if key in counts]
            if not keys:
                return seq  # it grows as well, and nothing must be remembered
        self._memory.ordinals[stream] = counts
        ordinal = max((counts.get(key, 0) for key in keys), default=0)
        for key in keys:
            counts[key] = ordinal + 1
        return ordinal

    def _has_room(self, new: Iterable[str], fact_bytes: int = _FACT_BYTES) -> bool:
        """Return whether there is room to remember a fact for each of these new keys. If so, count the facts."""
        size = _size_of(new, fact_bytes)
        if self._memory_bytes + size > MAX_MEMORY_BYTES:
            return size == 0
        self._memory_bytes += size
        return True

    def _in_order(self, payload: Payload, step: int) -> bool:
        """Return whether no key of the payload had a higher step before. If so, remember this step."""
        last = self._memory.last_steps
        keys = _keys_of(payload)
        if any(step < last.get(key, 0) for key in keys):
            return False
        for key in keys:
            last[key] = step
        return True

    def _first_params(
        self, stream: str, record: Record, position: int, payload: Params, altered: list[str]
    ) -> tuple[Entry | Rejection, list[str]]:
        """Return an entry with the params that are new or unchanged. If there are none, return a rejection."""
        known = self._memory.params
        # Compare the encoded values. There NaN is equal to itself, and 1, 1.0 and True differ, as they do in a store.
        new = {key: _value_or_digest(value) for key, value in payload.values.items()}
        changed = [key for key, value in new.items() if known.get(key, value) != value]
        if changed:
            kept = {key: value for key, value in payload.values.items() if key not in changed}
            if not kept:
                return Rejection(position, "param_changed", f"{changed} had another value before"), altered
            payload = Params(kept)
            altered.append("param_changed")
        unknown = [key for key in payload.values if key not in known]
        if not self._has_room(unknown, _DIGEST_BYTES):
            return Rejection(position, "too_many_keys", _FULL), altered
        known.update({key: new[key] for key in unknown})
        return Entry(position, record.time, None, record.round, payload, stream, record.seq), altered


def _size(memory: _Memory) -> int:
    """Return how many bytes a memory counts as. After a restart, the same memory counts as the same number."""
    counted = _size_of(memory.ordinals) + sum(map(_size_of, memory.ordinals.values()))
    return counted + _size_of(memory.last_steps) + _size_of(memory.params, _DIGEST_BYTES)


def _size_of(keys: Iterable[str], fact_bytes: int = _FACT_BYTES) -> int:
    return sum(len(key.encode()) + fact_bytes for key in keys)


def _value_or_digest(value: object) -> bytes:
    """Return the encoded value if it is shorter than a digest. Otherwise return a digest of it."""
    encoded = _encode(value)
    # The memory is stored with each confirmation. If it held a few large values, gigabytes would be written.
    return encoded if len(encoded) < _DIGEST_BYTES else hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()


class _Keys:
    """The keys of one kind: key -> fitted key, and the keys that need no change."""

    def __init__(self, rule: KeyRule) -> None:
        self._fit_key: Callable[[str], str] = key_fitter(rule)
        self._fitted: dict[str, str] = {}
        self.fine: set[str] = set()
        self.keeps_all = rule == ANY_KEY

    def fit(self, key: str) -> str:
        fitted = self._fitted.get(key)
        if fitted is None:
            fitted = self._fitted[key] = self._fit_key(key)
            if fitted == key:
                self.fine.add(key)
        return fitted


def _with_fitted_keys(payload: Payload, keys: _Keys, altered: list[str]) -> Payload:
    if keys.keeps_all:
        return payload
    if isinstance(payload, KEYED):
        if keys.fine.issuperset(payload.values):
            return payload
        fitted = {keys.fit(key): value for key, value in payload.values.items()}
        if fitted.keys() == payload.values.keys():
            return payload
        altered.append("key_escaped")
        return type(payload)(fitted)  # type: ignore[arg-type]
    key: str = payload.key  # type: ignore[union-attr]  # every other kind has one; gaps never come here
    if (fitted_key := keys.fit(key)) == key:
        return payload
    altered.append("key_escaped")
    return msgspec.structs.replace(payload, key=fitted_key)


def _keys_of(payload: Payload) -> list[str]:
    if isinstance(payload, KEYED):
        return list(payload.values)
    return [payload.key]  # type: ignore[union-attr]  # every other kind has one; gaps never come here
