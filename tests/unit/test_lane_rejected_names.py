# SPDX-License-Identifier: Apache-2.0
"""The log line of a rejected record names its keys, whoever rejects it."""

from __future__ import annotations

import logging

import pytest

from tests.unit.readers_and_bad_backends import MemoryBackend
from tests.unit.rigs import Bench, run_of
from trackhub.delivery.lane.describe_record import show_keys
from trackhub.records import Metrics, Record, Text
from trackhub.spi import Kind, Rejection, WriteReport


def test_a_record_that_the_core_rejects_is_logged_with_its_key(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.add([Record(0, 1.0, 1, None, Text("a note", "x")), Record(1, 1.0, 2, None, Metrics({"loss": 1.0}))])
    with caplog.at_level(logging.WARNING):
        bench.lane(MemoryBackend(kinds=frozenset({Kind.METRICS})))
        assert run_of(bench.finish()).rejected == {"unsupported_kind": 1}

    assert "record 0 is rejected (unsupported_kind: text 'a note': " in caplog.text


def test_a_record_that_a_backend_rejects_is_logged_with_its_key(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    def behave(method: str, argument: object) -> WriteReport | None:
        return WriteReport(rejected=(Rejection(0, "odd", "not round"),)) if method == "write" else None

    bench.add([Record(0, 1.0, 1, None, Metrics({"train/loss": 1.0}))])
    with caplog.at_level(logging.WARNING):
        bench.lane(MemoryBackend(behave))
        assert run_of(bench.finish()).rejected == {"odd": 1}

    assert "record 0 is rejected (odd: metrics 'train/loss': not round)" in caplog.text


def test_keys_are_cut_and_hold_nothing_that_a_terminal_obeys() -> None:
    assert show_keys(Metrics({"a\x1b[31m\u202eb": 1.0})) == r"metrics 'a\x1b[31m\u202eb'"
    assert show_keys(Text("x" * 200, "")) == f"text '{'x' * 77}...'"
    assert show_keys(Metrics(dict.fromkeys("abcd", 1.0))) == "metrics 'a', 'b', 'c', ..."
