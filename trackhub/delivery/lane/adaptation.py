# SPDX-License-Identifier: Apache-2.0
"""What every backend needs done to records, done once: refuse what it cannot store, fit keys, steps and numbers.

A shaper belongs to one run in one lane. It sees the records in journal order and remembers what it needs; its memory
is stored with the lane's confirmed cursor, so that after a restart the same records are shaped to the same entries.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence

import msgspec

from trackhub.records import KIND_OF, Kind, Metrics, Params, Payload, Record, Tags
from trackhub.spi import Capabilities, Entry, Rejection

__all__ = ["Shaper", "escape_key", "unescape_key"]

_LOOKS_ESCAPED = re.compile(r"_(?=x[0-9A-F]{4})")
_ESCAPE = re.compile(r"_x([0-9A-F]{4,6})_")
_HASH_CHARS = 16
_encode = msgspec.msgpack.Encoder(order="deterministic").encode


class _Memory(msgspec.Struct):
    """What a shaper remembers.

    Attributes:
        ordinals: stream to key to the number of its records without a step.
        last_steps: key to the highest step, for backends that cannot store late steps.
        params: key to the first value, encoded, for backends that cannot change it.
    """

    ordinals: dict[str, dict[str, int]] = {}
    last_steps: dict[str, int] = {}
    params: dict[str, bytes] = {}


class Shaper:
    """Turns records into entries that a backend with these capabilities can store. Used by one thread."""

    def __init__(self, capabilities: Capabilities, memory: bytes = b"") -> None:
        """Start anew, or from the memory of an earlier shaper of the same run and lane."""
        self._can = capabilities
        self._memory = msgspec.msgpack.decode(memory, type=_Memory) if memory else _Memory()
        self._fit_key = key_fitter(capabilities)
        self._fitted: dict[str, str] = {}
        self._fit_already: set[str] = set()
        self._keeps_keys = not capabilities.key_chars and capabilities.max_key_chars is None
        self._takes_any_metrics = (
            Kind.METRICS in capabilities.kinds and capabilities.nonfinite and capabilities.late_steps
        )

    def memory(self) -> bytes:
        """Return what a later shaper needs to go on from here."""
        return msgspec.msgpack.encode(self._memory)

    def shape(self, stream: str, record: Record, position: int) -> tuple[Entry | Rejection, Sequence[str]]:
        """Return what to hand over in place of this record, and the names of the alterations that were needed."""
        payload = record.payload
        if (
            type(payload) is Metrics  # nearly all are, and nothing about them needs a look, or nothing any more
            and self._takes_any_metrics
            and record.step is not None
            and (self._keeps_keys or self._fit_already.issuperset(payload.values))
        ):
            return Entry(position, record.time, record.step, record.round, payload, stream, record.seq), ()
        return self._shape(stream, record, position)

    def _shape(self, stream: str, record: Record, position: int) -> tuple[Entry | Rejection, list[str]]:
        payload, altered = record.payload, list[str]()
        kind = KIND_OF.get(type(payload))
        if kind not in self._can.kinds:
            name = kind.name.lower() if kind else type(payload).__name__
            return Rejection(position, "unsupported_kind", f"{name} cannot be stored by this backend"), altered
        if not self._keeps_keys:
            payload = self._with_fitted_keys(payload, altered)
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
        if step is None and not self._can.optional_step and not isinstance(payload, Params | Tags):
            step = self._ordinal(stream, payload)
        if not self._can.late_steps and step is not None and not self._in_order(payload, step):
            return Rejection(position, "late_step", f"step {step} is lower than an earlier one"), altered
        return Entry(position, record.time, step, record.round, payload, stream, record.seq), altered

    def _ordinal(self, stream: str, payload: Payload) -> int:
        """Number the records without a step by key; for several keys in one record, go on from the highest."""
        counts = self._memory.ordinals.setdefault(stream, {})
        keys = _keys(payload)
        ordinal = max((counts.get(key, 0) for key in keys), default=0)
        for key in keys:
            counts[key] = ordinal + 1
        return ordinal

    def _in_order(self, payload: Payload, step: int) -> bool:
        last = self._memory.last_steps
        keys = _keys(payload)
        if any(step < last.get(key, 0) for key in keys):
            return False
        for key in keys:
            last[key] = step
        return True

    def _first_params(
        self, stream: str, record: Record, position: int, payload: Params, altered: list[str]
    ) -> tuple[Entry | Rejection, list[str]]:
        known = self._memory.params
        # Compared as encoded: NaN is equal to itself, and 1, 1.0 and True differ, as they do where they are stored.
        new = {key: _encode(value) for key, value in payload.values.items()}
        changed = [key for key, value in new.items() if known.get(key, value) != value]
        if changed:
            kept = {key: value for key, value in payload.values.items() if key not in changed}
            if not kept:
                return Rejection(position, "param_changed", f"{changed} had another value before"), altered
            payload = Params(kept)
            altered.append("param_changed")
        known.update({key: new[key] for key in payload.values})
        return Entry(position, record.time, None, record.round, payload, stream, record.seq), altered

    def _with_fitted_keys(self, payload: Payload, altered: list[str]) -> Payload:
        if isinstance(payload, Metrics | Params | Tags):
            if self._fit_already.issuperset(payload.values):
                return payload
            fitted = {self._fit(key): value for key, value in payload.values.items()}
            if fitted.keys() == payload.values.keys():
                return payload
            altered.append("key_escaped")
            return type(payload)(fitted)  # type: ignore[arg-type]
        key: str = payload.key  # type: ignore[union-attr]  # every other kind has one; gaps never come here
        if (fitted_key := self._fit(key)) == key:
            return payload
        altered.append("key_escaped")
        return msgspec.structs.replace(payload, key=fitted_key)

    def _fit(self, key: str) -> str:
        fitted = self._fitted.get(key)
        if fitted is None:
            fitted = self._fitted[key] = self._fit_key(key)
            if fitted == key:
                self._fit_already.add(key)
        return fitted


def _keys(payload: Payload) -> list[str]:
    if isinstance(payload, Metrics | Params | Tags):
        return list(payload.values)
    return [payload.key]  # type: ignore[union-attr]  # every other kind has one; gaps never come here


def escape_key(key: str, allowed: re.Pattern[str]) -> str:
    """Write each character that ``allowed`` does not match as ``_xHHHH_``, reversibly and without merging two keys.

    Source: the convention of ECMA-376 (Office Open XML), part 1, 22.4.2.4, for characters that a name cannot hold.
    """
    literal = _LOOKS_ESCAPED.sub("_x005F_", key)
    return "".join(c if allowed.fullmatch(c) else f"_x{ord(c):04X}_" for c in literal)


def unescape_key(key: str) -> str:
    """Return the key that ``escape_key`` was given."""
    return _ESCAPE.sub(lambda match: chr(int(match[1], 16)), key)


def key_fitter(capabilities: Capabilities) -> Callable[[str], str]:
    """Return the function that makes a key acceptable to a backend: reversible, or ending in a hash if too long."""
    allowed = re.compile(f"[{capabilities.key_chars}]") if capabilities.key_chars else None
    limit = capabilities.max_key_chars

    def fit(key: str) -> str:
        escaped = key if allowed is None else escape_key(key, allowed)
        if limit is None or len(escaped) <= limit:
            return escaped
        # A cut key ends in a hash of all of it, so that two long keys with one beginning stay two.
        digest = hashlib.sha256(key.encode()).hexdigest()[:_HASH_CHARS]
        return f"{escaped[: limit - _HASH_CHARS - 1]}_{digest}"

    return fit
