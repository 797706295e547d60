# SPDX-License-Identifier: Apache-2.0
"""What a store must hold after some log calls, worked out from the calls and from what the backend declares.

First the core handles each call: it rejects what ``capabilities`` do not claim, and fits keys and steps. Then the
contract class's ``canonical_*`` hooks say how the store keeps the rest. The checks and `scenario_delivery`
call `expect`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from trackhub.delivery.lane.fit_keys_to_backend import key_fitter
from trackhub.records import (
    KIND_OF,
    STEPLESS,
    Artifact,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    Payload,
    Summary,
    Table,
    Tags,
    Text,
)
from trackhub.spi import Capabilities
from trackhub.testing.contract_hooks import ContractHooks
from trackhub.testing.readback import ArtifactItem, HistogramItem, ImageItem, Point, ReadBack, TableItem, TextItem
from trackhub.testing.sample_calls_and_requests import Call, FuturePayload

__all__ = ["Expected", "expect", "kind_of"]

_T = TypeVar("_T")


class Expected(NamedTuple):
    """What must become of the calls of one run.

    Attributes:
        held: what is in the store.
        rejected: reason -> how many records the report rejects.
        confirmed: how many records the report confirms.
    """

    held: ReadBack
    rejected: Counter[str]
    confirmed: int


def kind_of(call: Call) -> Kind | None:
    """Return the kind of the logged record. None if this version of trackhub does not know the kind."""
    return None if isinstance(call.payload, FuturePayload) else KIND_OF[type(call.payload)]


def expect(
    logged: Iterable[tuple[str, Call]], can: Capabilities, hooks: ContractHooks, *, timed: bool = True
) -> Expected:
    """Return what must become of these calls of one run.

    Args:
        logged: stream and call, times filled in, in the order in which they are in the journal.
        can: what the backend claims.
        hooks: how the store keeps records.
        timed: False if nobody knows the times of the calls. All times are None then.
    """
    held = ReadBack(
        points=[],
        params={},
        tags={},
        summary={},
        texts=[],
        images=[],
        histograms=[],
        tables=[],
        artifacts=[],
        status=None,
    )
    rejected: Counter[str] = Counter()
    confirmed = 0
    core = _Core(can)
    for stream, call in logged:
        reason, payload, step = core.treat(stream, call)
        if payload is None:
            rejected[reason] += 1
        else:
            confirmed += 1
            _add(held, payload, step, call, hooks, core, timed=timed)
    held.params = dict(hooks.canonical_params(held.params or {}))
    held.summary = dict(hooks.canonical_summary(held.summary or {}))
    return Expected(held, rejected, confirmed)


class _Core:
    """A second implementation of what the core promises for records that a backend cannot store.

    It shares no code with the core, so a defect of the core shows. Only keys are fitted by the core's own code, which
    has other tests.
    """

    def __init__(self, can: Capabilities) -> None:
        self.can = can
        self.fit = {kind: key_fitter(can.key_rules.get(kind, can.key_rule)) for kind in Kind}
        self.ordinals: dict[tuple[str, str], int] = {}
        self.highest: dict[str, int] = {}
        self.params: dict[str, object] = {}

    def treat(self, stream: str, call: Call) -> tuple[str, Payload | None, int | None]:
        """Return why the call is rejected, or an empty string and what is left of the call: its payload and step."""
        payload, step = call.payload, call.step
        if isinstance(payload, FuturePayload):
            return "unknown_kind", None, None
        if KIND_OF[type(payload)] not in self.can.kinds:
            return "unsupported_kind", None, None
        if isinstance(payload, Metrics) and not self.can.nonfinite:
            payload = Metrics({key: value for key, value in payload.values.items() if math.isfinite(value)})
            if not payload.values:
                return "nonfinite", None, None
        if isinstance(payload, STEPLESS):
            if isinstance(payload, Params) and not self.can.changing_params:
                first = {k: v for k, v in payload.values.items() if self.params.setdefault(k, v) == v}
                return ("", Params(first), None) if first else ("param_changed", None, None)
            return "", payload, None
        keys = list(payload.values) if isinstance(payload, Metrics) else [payload.key]  # type: ignore[union-attr]
        if step is None and not self.can.optional_step:
            step = max(self.ordinals.get((stream, key), 0) for key in keys)
            self.ordinals.update({(stream, key): step + 1 for key in keys})
        if step is not None and not self.can.late_steps:
            if any(step < self.highest.get(key, 0) for key in keys):
                return "late_step", None, None
            self.highest.update(dict.fromkeys(keys, step))
        return "", payload, step


def _add(
    held: ReadBack, payload: Payload, step: int | None, call: Call, hooks: ContractHooks, core: _Core, *, timed: bool
) -> None:
    """Add what the store keeps of one payload."""
    assert call.time is not None or not timed
    time = hooks.canonical_time(call.time or 0.0) if timed else None
    step = None if step is None else hooks.canonical_step(step)
    kind = KIND_OF[type(payload)]

    def name(key: str) -> str:
        return hooks.canonical_key(kind, core.fit[kind](key))

    match payload:
        case Metrics(values):
            held.points += [Point(name(k), step, hooks.canonical_value(v), time) for k, v in values.items()]
        case Params(values):
            assert held.params is not None
            held.params.update({name(k): v for k, v in values.items()})
        case Tags(values):
            assert held.tags is not None
            held.tags.update({name(k): v for k, v in values.items()})
        case Summary(values):
            assert held.summary is not None
            held.summary.update({name(k): v for k, v in values.items()})
        case Text(key, text):
            _list(held.texts).append(TextItem(name(key), step, text, time))
        case Image():
            _list(held.images).append(ImageItem(name(payload.key), step, call.content or b"", payload.caption, time))
        case Histogram(key, edges, counts):
            _list(held.histograms).append(HistogramItem(name(key), step, edges, counts, time))
        case Table(key, columns, rows):
            cells = [[hooks.canonical_cell(cell) for cell in row] for row in rows]
            _list(held.tables).append(TableItem(name(key), step, columns, cells, time))
        case Artifact():
            content = call.content or b""
            item = ArtifactItem(name(payload.key), content, payload.filename, payload.artifact_type, step, time)
            _list(held.artifacts).append(item)


def _list(items: list[_T] | None) -> list[_T]:
    assert items is not None
    return items
