# SPDX-License-Identifier: Apache-2.0
"""A logging method that is called with wrong arguments counts the call, and does not end the training."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import new_spool, spool_of
from tests.unit.test_writer_bad_values import Evil, payloads
from trackhub.errors import RecordError
from trackhub.records import Image, Metrics
from trackhub.spool.reading import SpoolReader
from trackhub.writer import MLflowWriter, SummaryWriter, WandBWriter
from trackhub.writer.writer import Writer

LOG_CALLS = ("log", "add_", "set_tag", "summarize")


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"))


def dropped(writer: Writer) -> dict[str, int]:
    found: dict[str, int] = {}
    for count in SpoolReader(spool_of(writer).folder, "server").counts().values():
        for reason, number in count.dropped.items():
            found[reason] = found.get(reason, 0) + number
    return found


def methods_of(cls: Any) -> Iterator[str]:
    for name in dir(cls):
        if name.startswith(LOG_CALLS) and callable(getattr(cls, name)):
            yield name


@pytest.mark.parametrize("cls", [Writer, WandBWriter, MLflowWriter, SummaryWriter])
def test_a_logging_method_with_missing_arguments_counts_the_call(writer: Writer, cls: Any) -> None:
    owner = writer if cls is Writer else cls(writer=writer)
    for name in methods_of(cls):
        getattr(owner, name)()
        assert sum(dropped(writer).values()) > 0, name


def test_a_plain_writer_counts_arguments_that_it_does_not_have(writer: Writer) -> None:
    methods = list(methods_of(Writer))
    for name in methods:
        getattr(writer, name)(*[1] * 12)
        getattr(writer, name)(unknown=1)

    assert dropped(writer) == {"invalid_call": 2 * len(methods)}
    assert len(methods) > 10


def test_a_strict_writer_raises_for_a_wrong_call(tmp_path: Path) -> None:
    writer: Any = Writer(new_spool(tmp_path / "spool"), strict=True)
    for call in (lambda: writer.log({"a": 1.0}, 1, "x"), lambda: writer.log_params(lr=0.1), writer.log_text):
        with pytest.raises(RecordError, match=r"^log"):
            call()


def test_a_writer_without_tracking_does_not_look_at_its_arguments(caplog: pytest.LogCaptureFixture) -> None:
    writer: Any = Writer()
    caplog.clear()
    for name in methods_of(Writer):
        getattr(writer, name)(unknown=1)
    assert not caplog.records


def test_log_has_the_signature_and_the_docstring_that_it_declares() -> None:
    assert list(inspect.signature(Writer.log).parameters) == ["self", "metrics", "step"]
    assert (Writer.log.__doc__ or "").startswith("Log scalars as one record")


def test_one_bad_figure_of_several_costs_itself_whatever_the_tag_is(writer: Writer) -> None:
    from matplotlib.figure import Figure

    summary: Any = SummaryWriter(writer=writer)
    summary.add_figure("f", [5, Figure(figsize=(1, 1))])
    summary.add_figure(Evil(), [Figure(figsize=(1, 1))])
    summary.add_scalar("loss", 1.0)

    found = payloads(writer)
    assert [p.key for p in found if isinstance(p, Image)] == ["f/1"]
    assert Metrics({"loss": 1.0}) in found
    assert dropped(writer) == {"invalid_call": 2}


def test_what_cannot_be_converted_is_counted_whatever_its_detail_is(writer: Writer) -> None:
    anything: Any = Evil()
    writer.count_unconvertible(anything)

    assert dropped(writer) == {"unconvertible": 1}
