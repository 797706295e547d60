# SPDX-License-Identifier: Apache-2.0
"""Backends that store the wrong thing: kinds, steps, times, numbers."""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Sequence
from typing import Any

import msgspec

from tests.contract.mutants.base import (
    ANYTHING,
    CAN,
    NEIGHBOURS,
    Bad,
    Tampered,
    caught_by,
    each,
    payloads,
    steps,
    values,
)
from trackhub.builtin.jsonl import JsonlBackend, JsonlRun
from trackhub.spi import (
    Artifact,
    Entry,
    Histogram,
    Image,
    Kind,
    Metrics,
    Params,
    PermanentError,
    RunInfo,
    Summary,
    Table,
    Tags,
    Text,
    WriteReport,
)


class _Last(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return list(batch[:-1])


@caught_by("test_kind_as_declared[metrics]", also=ANYTHING)
class DropsTheLastRecord(Bad):
    run = _Last


@caught_by(
    "test_kind_as_declared[params]",
    also=(
        "test_changing_params_as_declared",
        r"test_keys_.*",
        "test_one_key_serves_every_kind",
    ),
)
class WritesParamsAsMetrics(Bad):
    run = payloads(
        lambda p: (
            Metrics({k: float(v) for k, v in p.values.items() if isinstance(v, int | float)})
            if isinstance(p, Params)
            else p
        )
    )


@caught_by("test_kind_as_declared[tags]", also=(r"test_keys_.*",))
class KeepsOneTag(Bad):
    run = payloads(lambda p: Tags(dict(list(p.values.items())[-1:])) if isinstance(p, Tags) else p)


@caught_by("test_kind_as_declared[summary]", also=("test_keys_.*summary.*", "test_one_key_serves_every_kind"))
class KeepsTheFirstFinalValue(Bad):
    run = payloads(lambda p: None if isinstance(p, Summary) and "sizes" in p.values else p)


@caught_by(
    "test_kind_as_declared[text]",
    also=(
        "test_one_key_serves_every_kind",
        r"test_keys_.*\[text\]",
        "test_records_of_a_newer_trackhub_are_rejected",
    ),
)
class ClaimsTextButHasNone(Bad):
    run = payloads(lambda p: None if isinstance(p, Text) else p)


@caught_by("test_kind_as_declared[text]")
class HasTextButClaimsNone(Bad):
    capabilities = msgspec.structs.replace(CAN, kinds=CAN.kinds - {Kind.TEXT})


@caught_by("test_kind_as_declared[image]")
class LosesCaptions(Bad):
    run = payloads(lambda p: msgspec.structs.replace(p, caption="") if isinstance(p, Image) else p)


@caught_by(
    "test_kind_as_declared[histogram]",
    also=("test_one_key_serves_every_kind", r"test_keys_(of_the_key_rule|that_look_alike)_stay_apart\[histogram\]"),
)
class LosesTheLastBin(Bad):
    run = payloads(lambda p: Histogram(p.key, p.edges[:-1], p.counts[:-1]) if isinstance(p, Histogram) else p)


@caught_by("test_kind_as_declared[table]", also=("test_one_key_serves_every_kind", r"test_keys_.*\[table\]"))
class TurnsCellsIntoText(Bad):
    run = payloads(
        lambda p: Table(p.key, p.columns, [list(map(str, r)) for r in p.rows]) if isinstance(p, Table) else p
    )


@caught_by(
    "test_kind_as_declared[artifact]",
    also=("test_one_key_serves_every_kind", r"test_keys_(of_the_key_rule|that_look_alike)_stay_apart\[artifact\]"),
)
class LosesTheNamesOfFiles(Bad):
    run = payloads(lambda p: msgspec.structs.replace(p, filename="file") if isinstance(p, Artifact) else p)


class _FirstParams(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._seen: set[str] = set()

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        kept = []
        for entry in batch:
            payload = entry.payload
            if isinstance(payload, Params):
                payload = Params({k: v for k, v in payload.values.items() if k not in self._seen})
                self._seen.update(payload.values)
            kept.append(msgspec.structs.replace(entry, payload=payload))
        return kept


@caught_by("test_changing_params_as_declared")
class KeepsTheFirstParams(Bad):
    run = _FirstParams


@caught_by("test_changing_params_as_declared")
class ChangesParamsButClaimsNot(Bad):
    capabilities = msgspec.structs.replace(CAN, changing_params=False)


class _OneKind(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._kinds: dict[str, type] = {}

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        def first(entry: Entry) -> bool:
            kind = type(entry.payload)
            names = getattr(entry.payload, "values", None) or [entry.payload.key]  # type: ignore[union-attr]
            return all(self._kinds.setdefault(name, kind) is kind for name in names)

        return [entry for entry in batch if first(entry)]


@caught_by(
    "test_one_key_serves_every_kind",
    also=(
        r"test_keys_.*",
        r"test_kind_as_declared\[summary\]",
        *NEIGHBOURS,
    ),
)
class GivesAKeyToTheFirstKind(Bad):
    run = _OneKind


class _Lenient(Tampered):
    def write(self, batch: Sequence[Entry]) -> WriteReport | None:
        for entry in batch:
            try:
                self.inner.write([entry])
            except PermanentError:
                logging.getLogger(__name__).warning("passed over")
        return None


@caught_by(
    "test_record_without_its_content_is_rejected",
    also=("test_redelivery_after_an_error_as_declared", *NEIGHBOURS),
)
class PassesOverMissingContent(Bad):
    run = _Lenient


@caught_by("test_site_with_a_difficult_name", also=ANYTHING)
class ReplacesTheSitesName(Bad):
    def open_run(self, info: RunInfo) -> Any:
        site = re.sub(r"[^\w-]", "_", info.site)
        return super().open_run(msgspec.structs.replace(info, site=site))


class _Reversed(Tampered):
    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        return [
            msgspec.structs.replace(entry, position=position)
            for entry, position in zip(reversed(batch), [entry.position for entry in batch], strict=True)
        ]


@caught_by(
    "test_order_is_kept",
    also=(
        "test_changing_params_as_declared",
        r"test_kind_as_declared\[.*",
    ),
)
class Reorders(Bad):
    run = _Reversed


class _StepFilter(Tampered):
    def __init__(self, inner: JsonlRun, backend: JsonlBackend, info: RunInfo) -> None:
        super().__init__(inner, backend, info)
        self._highest: dict[str, int] = {}

    def keep(self, step: int, highest: int) -> bool:
        raise NotImplementedError

    def tamper(self, batch: Sequence[Entry]) -> list[Entry]:
        kept = []
        for entry in batch:
            if not isinstance(entry.payload, Metrics) or entry.step is None:
                kept.append(entry)
                continue
            key = next(iter(entry.payload.values))
            if self.keep(entry.step, self._highest.get(key, -1)):
                kept.append(entry)
            self._highest[key] = max(entry.step, self._highest.get(key, -1))
        return kept


class _NotLate(_StepFilter):
    def keep(self, step: int, highest: int) -> bool:
        return step >= highest


class _NotEqual(_StepFilter):
    def keep(self, step: int, highest: int) -> bool:
        return step != highest


@caught_by(
    "test_late_steps_as_declared",
    also=(
        *NEIGHBOURS,
        "test_outage_loses_nothing",
        "test_probe_as_declared",
    ),
)
class DropsLateSteps(Bad):
    run = _NotLate


@caught_by("test_late_steps_as_declared")
class HasLateStepsButClaimsNone(Bad):
    capabilities = msgspec.structs.replace(CAN, late_steps=False)


@caught_by(
    "test_equal_steps_are_all_kept",
    also=(
        *NEIGHBOURS,
        "test_outage_loses_nothing",
        "test_probe_as_declared",
        "test_two_processes_of_a_site_share_its_run",
    ),
)
class DropsEqualSteps(Bad):
    run = _NotEqual


@caught_by("test_steps_with_gaps", also=("test_largest_step",))
class Has32BitSteps(Bad):
    run = steps(lambda step: None if step is None else step % 2**31)


@caught_by("test_largest_step")
class HasFloatSteps(Bad):
    run = steps(lambda step: None if step is None else min(int(float(step)), 2**63 - 2))


@caught_by(
    "test_optional_step_as_declared",
    also=(
        r"test_kind_as_declared\[.*",
        "test_one_key_serves_every_kind",
        "test_two_processes_of_a_site_share_its_run",
        r"test_keys_.*\[artifact\]",
    ),
)
class PutsPointsWithoutStepAtZero(Bad):
    run = steps(lambda step: step or 0)


@caught_by("test_times_are_those_of_the_log_calls", also=ANYTHING)
class StampsItsOwnTime(Bad):
    run = each(lambda entry: msgspec.structs.replace(entry, time=time.time()))


@caught_by("test_nonfinite_as_declared")
class LosesNaN(Bad):
    run = values(lambda value: None if math.isnan(value) else value)


@caught_by("test_nonfinite_as_declared")
class HasNaNButClaimsNone(Bad):
    capabilities = msgspec.structs.replace(CAN, nonfinite=False)


@caught_by("test_extreme_numbers", also=("test_calls_of_the_writer",))
class RoundsToSixDigits(Bad):
    run = values(lambda value: float(f"{value:.6g}"))


@caught_by("test_calls_of_the_writer", also=("test_extreme_numbers",))
class LosesTheLargestInteger(Bad):
    run = values(lambda value: None if abs(value) == 2.0**63 else value)
