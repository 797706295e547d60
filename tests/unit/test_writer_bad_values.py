# SPDX-License-Identifier: Apache-2.0
"""A bad value costs a value: it is counted, named once, and everything else of its call is stored. Nothing raises."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import decimal
import enum
import fractions
import io
import logging
import math
import os
import types
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import new_spool, read_spool, settle_all, spool_of
from trackhub.errors import ConfigError, RecordError
from trackhub.records import Histogram, Image, Metrics, Params, Payload, Tags
from trackhub.spool.counts import StreamCount
from trackhub.spool.reading import SpoolReader
from trackhub.writer.writer import Writer


class Colour(enum.Enum):
    RED = "red"
    DEEP = (1, 2)


@dataclasses.dataclass
class Optim:
    lr: float = 0.1
    betas: tuple[float, float] = (0.9, 0.999)


class Struct(msgspec.Struct):
    depth: int = 3


class Pydantic:
    """As an instance of a pydantic 2 model looks from outside."""

    model_fields = {"width": None}

    def __init__(self) -> None:
        self.width = 64


class Evil:
    """Raises whatever it is asked."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)

    def _raise(self, *args: Any) -> Any:
        raise RuntimeError("evil")

    __str__ = __repr__ = __float__ = __index__ = __len__ = __iter__ = __bool__ = __eq__ = __hash__ = _raise


Point = namedtuple("Point", ["x", "y"])


def payloads(writer: Writer) -> list[Payload]:
    return [record.payload for records in read_spool(spool_of(writer).folder).values() for record in records]


def count_of(writer: Writer) -> StreamCount:
    reader = SpoolReader(spool_of(writer).folder, "server")
    settle_all(reader, final=True)
    (count,) = reader.counts().values()
    gone = sum(count.dropped.values()) + count.acked
    assert count.logged == gone
    return count


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"))


def test_a_none_among_metrics_costs_itself_and_is_named_once(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    for step in range(3):
        writer.log({"note": None, "loss": 0.1}, step)

    assert payloads(writer) == [Metrics({"loss": 0.1})] * 3
    count = count_of(writer)
    assert (count.logged, count.dropped, count.altered) == (3, {}, {"invalid_value": 3})
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    for part in ("'note'", "None", "expected a number", "invalid_value"):
        assert part in record.getMessage()


def test_a_call_without_any_good_value_is_a_dropped_record(writer: Writer) -> None:
    writer.log({"note": None, "text": "x"}, 1)
    writer.log({"loss": 0.1}, 2)

    assert payloads(writer)[-1] == Metrics({"loss": 0.1})
    count = count_of(writer)
    assert (count.logged, count.dropped, count.altered) == (2, {"invalid_value": 1}, {})


@pytest.mark.parametrize(
    "call",
    [
        lambda w: w.log(5),
        lambda w: w.log({"a": 1.0}, -1),
        lambda w: w.log({"a": 1.0}, "three"),
        lambda w: w.log_params([1]),
        lambda w: w.set_tags(None),
        lambda w: w.log_text("t", "x", 1.5),
        lambda w: w.log(Evil()),
    ],
    ids=["no mapping", "step below 0", "step of letters", "a list of params", "no tags", "half a step", "evil"],
)
def test_a_call_that_is_wrong_in_itself_is_counted_as_invalid_call(
    writer: Writer, call: Callable[[Any], None], caplog: pytest.LogCaptureFixture
) -> None:
    call(writer)
    call(writer)

    assert count_of(writer).dropped == {"invalid_call": 2}
    assert len(caplog.records) == 1


def test_a_call_after_close_is_counted_as_long_as_the_job_runs(
    writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    writer.log({"a": 1.0})
    writer.close()
    for _ in range(3):
        writer.log({"a": 2.0})
        writer.log_text("t", "x")

    reader = SpoolReader(spool_of(writer).folder, "server")
    settle_all(reader, final=True)
    counts = reader.counts().values()
    assert sum(count.logged for count in counts) == 7
    assert [count.dropped for count in counts if count.dropped] == [{"writer_closed": 6}]
    assert sum("writer_closed" in record.getMessage() for record in caplog.records) == 2


def test_an_empty_mapping_logs_nothing(writer: Writer) -> None:
    writer.log({})
    writer.log({"a": {}})
    writer.log_params({})
    writer.set_tags({})
    assert spool_of(writer).next_seq == 0


def test_nested_dicts_become_keys_with_slashes(writer: Writer) -> None:
    writer.log({"train": {"loss": 1, "acc": {"top1": 0.5, 5: 0.9}}, "lr": 0.1}, 3)
    writer.log_params({"optim": {"name": "adam", "betas": [0.9, 0.99]}, "layers": {}})

    assert payloads(writer) == [
        Metrics({"train/loss": 1.0, "train/acc/top1": 0.5, "train/acc/5": 0.9, "lr": 0.1}),
        Params({"optim/name": "adam", "optim/betas": [0.9, 0.99], "layers": {}}),
    ]


def test_two_keys_that_become_one_are_not_merged_silently(writer: Writer) -> None:
    writer.log({"a": {"b": 1.0}, "a/b": 2.0, "c": 3.0})

    assert payloads(writer) == [Metrics({"a/b": 1.0, "c": 3.0})]
    assert count_of(writer).altered == {"invalid_value": 1}


@pytest.mark.parametrize(
    "params",
    [
        argparse.Namespace(lr=0.1, betas=(0.9, 0.999)),
        types.SimpleNamespace(lr=0.1, betas=(0.9, 0.999)),
        Optim(),
        {"lr": 0.1, "betas": (0.9, 0.999)},
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_object_with_fields_is_a_mapping_of_params(writer: Writer, params: Any) -> None:
    writer.log_params(params)
    writer.log_params({"optim": params})

    plain = {"lr": 0.1, "betas": [0.9, 0.999]}
    assert payloads(writer) == [Params(plain), Params({f"optim/{key}": value for key, value in plain.items()})]


OTHER_PARAMS: list[tuple[Any, Any]] = [
    (Colour.RED, "red"),
    (Colour.DEEP, "DEEP"),
    (Path("/data/x"), "/data/x"),
    (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
    (datetime.date(2026, 1, 2), "2026-01-02"),
    (np.datetime64("2026-01-02", "ns"), "2026-01-02T00:00:00.000000000"),
    (decimal.Decimal("0.10"), "0.10"),
    ({3, 1, 2}, [1, 2, 3]),
    (np.arange(3), [0, 1, 2]),
    (np.zeros(5000).reshape(50, 100), str(np.zeros((50, 100)))),
    (np.float32, "numpy.float32"),
    (np.longdouble(0.5), 0.5),
    (2**64, str(2**64)),
    (1 + 2j, "(1+2j)"),
    (b"x", "b'x'"),
    (range(3), [0, 1, 2]),
    (np.ma.masked_array([1.0, 2.0], [True, False]), [None, 2.0]),
    (pd.NA, None),
    (pd.NaT, None),
    (pd.Timestamp("2026-01-02"), "2026-01-02T00:00:00"),
    ([{None: 1, (1, 2): 3, 4: 5}], [{"None": 1, "(1, 2)": 3, "4": 5}]),
    ([Optim(lr=0.2)], [{"lr": 0.2, "betas": [0.9, 0.999]}]),
    (new_spool, "tests.unit.readers_and_bad_backends.new_spool"),
]


def test_params_of_other_kinds_are_their_value_or_their_text(writer: Writer) -> None:
    for value, _ in OTHER_PARAMS:
        writer.log_params({"p": value, "other": 1})
    assert payloads(writer) == [Params({"p": expected, "other": 1}) for _, expected in OTHER_PARAMS]


def test_configurations_of_several_libraries_are_flattened(writer: Writer) -> None:
    writer.log_params({"a": Struct(), "b": Pydantic(), "c": Point(1, 2)})
    assert payloads(writer) == [Params({"a/depth": 3, "b/width": 64, "c/x": 1, "c/y": 2})]


def test_one_bad_param_or_tag_of_several_costs_itself(writer: Writer) -> None:
    writer.log_params({"good": 1, "bad": Evil(), "surrogate": "\ud800"})
    writer.set_tags({"good": 1, "bad": Evil(), "a\nb": 1})

    assert payloads(writer) == [Params({"good": 1}), Tags({"good": "1"})]
    assert count_of(writer).altered == {"invalid_value": 4}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (decimal.Decimal("0.5"), 0.5),
        (fractions.Fraction(1, 4), 0.25),
        (np.longdouble(0.5), 0.5),
        (np.ma.masked, math.nan),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_float_takes_is_a_metric(writer: Writer, value: Any, expected: float) -> None:
    writer.log({"a": value})
    (found,) = payloads(writer)
    assert isinstance(found, Metrics)
    assert repr(found.values["a"]) == repr(expected)


@pytest.mark.parametrize("step", [3.0, np.float64(3), decimal.Decimal(3), np.array(3)], ids=lambda x: type(x).__name__)
def test_a_whole_number_of_any_type_is_a_step(writer: Writer, step: Any) -> None:
    writer.log({"a": 1.0}, step)
    ((record,),) = read_spool(spool_of(writer).folder).values()
    assert (record.step, type(record.step)) == (3, int)


def test_keys_of_inner_dicts_that_are_no_text_become_text(writer: Writer) -> None:
    writer.log_params({"a": {None: 1, (1, 2): 3, 4: 5}})
    assert payloads(writer) == [Params({"a/None": 1, "a/(1, 2)": 3, "a/4": 5})]


def test_masked_values_are_in_no_histogram_and_no_metric(writer: Writer) -> None:
    masked = np.ma.masked_array([1.0, 2.0, 99.0], [False, False, True])
    writer.log_histogram("h", masked, bins=2)
    writer.log_histogram("h", [masked[:1], masked[1:2], masked[2:]], bins=2)
    writer.log({"one": np.ma.masked_array([1.0], [True])})
    writer.log_histogram("dates", np.array(["2026-01-01"], "M8[ns]"))

    histogram, again, metrics = payloads(writer)
    assert isinstance(histogram, Histogram)
    assert histogram == again
    assert (histogram.edges[-1], histogram.counts) == (2.0, [1.0, 1.0])
    assert isinstance(metrics, Metrics)
    assert math.isnan(metrics.values["one"])
    assert count_of(writer).dropped == {"invalid_value": 1}


def test_a_call_of_too_many_values_is_dropped_and_counted(writer: Writer) -> None:
    writer.log({f"k{i}": 1.0 for i in range(10_001)})
    writer.log_table("t", list("abc"), [[0, 1, 2]] * 40_000)
    writer.log({"loss": 1.0})

    assert payloads(writer)[1:] == [Metrics({"loss": 1.0})]  # after the gap
    assert count_of(writer).dropped == {"invalid_value": 2}


@pytest.mark.parametrize("key", ["می\u200cشود", "a\u00a0b", "全\u3000角", "👩\u200d👧", "Shot 5.01\u202fPM.png"])
def test_ordinary_text_of_any_script_is_a_key(writer: Writer, tmp_path: Path, key: str) -> None:
    (tmp_path / key).write_text("x")
    writer.log({key: 1.0})
    writer.log_params({key: 1})
    writer.set_tags({key: 1})
    writer.log_artifact(tmp_path / key)
    found = payloads(writer)
    assert sorted(getattr(one, "key", None) or next(iter(one.values)) for one in found) == [key] * 4  # type: ignore[union-attr]


def test_a_histogram_with_a_nan_is_that_of_the_other_values(writer: Writer) -> None:
    writer.log_histogram("h", [math.nan, 1.0, 2.0, math.inf], bins=2)

    (found,) = payloads(writer)
    assert isinstance(found, Histogram)
    assert found.counts == [1.0, 1.0]
    assert count_of(writer).altered == {"invalid_value": 1}


def test_an_image_a_rounding_error_out_of_range_is_clipped(writer: Writer) -> None:
    writer.log_image("i", np.array([[-3e-8, 1 + 1e-6], [0.0, 1.0]]))
    (found,) = payloads(writer)
    assert isinstance(found, Image)


@pytest.mark.parametrize("value", ["1", "0"])
def test_the_environment_makes_every_writer_strict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRACKHUB_STRICT", value)
    writer = Writer(new_spool(tmp_path / "spool"))
    if value == "1":
        with pytest.raises(RecordError, match="'note'"):
            writer.log({"note": None})
    else:
        writer.log({"note": None})

    monkeypatch.setenv("TRACKHUB_STRICT", "yes")
    with pytest.raises(ConfigError, match=r"TRACKHUB_STRICT is 'yes'; expected 1 or 0"):
        Writer(tmp_path / "spool")


ANYTHING = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(),
        st.binary(),
        st.builds(Evil),
        st.builds(object),
        st.sampled_from([np.zeros(2), np.ma.masked, Colour.RED, Optim(), decimal.Decimal("nan"), int, 1j]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(), st.integers(), st.none()), inner, max_size=4)
    ),
    max_leaves=8,
)


@settings(
    max_examples=int(os.environ.get("TRACKHUB_TEST_EXAMPLES", "150")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(value=ANYTHING, step=ANYTHING, key=ANYTHING)
def test_nothing_is_raised_whatever_is_logged_and_all_of_it_is_counted(
    tmp_path: Path, value: Any, step: Any, key: Any
) -> None:
    writer = Writer(new_spool(tmp_path / os.urandom(6).hex()))
    good = {"good": 1.0}
    calls: list[Callable[[], None]] = [
        lambda: writer.log(value, step),
        lambda: writer.log({**good, "x": value}),
        lambda: writer.log_params(value),
        lambda: writer.log_params({**good, "x": value}),
        lambda: writer.set_tags({**good, "x": value}),
        lambda: writer.log_text(key, value, step),
        lambda: writer.log_histogram(key, value, step),
        lambda: writer.log_histogram(key, edges=value, counts=value),
        lambda: writer.log_table(key, value, value, step),
        lambda: writer.log_image(key, value, step, caption=value),
        lambda: writer.log_artifact(value, key),
        lambda: writer.summarize(value),
        lambda: writer.log_table(key, value, step=step),
        lambda: writer.log_figure(key, value, step, caption=value),
        lambda: writer.log_images(key, value, step, captions=value, columns=step),
        lambda: writer.log_model_histograms(value, step, prefix=key, gradients=True, bins=value),
    ]
    for call in calls:
        call()
    writer.close()
    writer.log(value, step)

    found = payloads(writer)
    assert sum(isinstance(p, Metrics) and p.values.get("good") == 1.0 for p in found) == 1
    assert sum(isinstance(p, Params) and p.values.get("good") == 1.0 for p in found) == 1
    assert sum(isinstance(p, Tags) and p.values.get("good") == "1.0" for p in found) == 1
    reader = SpoolReader(spool_of(writer).folder, "server")
    acked = settle_all(reader, final=True)
    counts = reader.counts().values()
    assert sum(count.logged - sum(count.dropped.values()) for count in counts) == acked


def test_an_image_file_above_the_limit_is_counted_with_one_warning(
    writer: Writer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from PIL import Image as pil

    buffer = io.BytesIO()
    pil.new("L", (64, 48)).save(buffer, "PNG")
    monkeypatch.setattr("trackhub.writer.images.MAX_IMAGE_BYTES", len(buffer.getvalue()) - 1)
    for _ in range(3):
        writer.log_image("i", buffer.getvalue())
    (warning,) = [message for message in caplog.messages if "log_artifact" in message]
    assert "expected at most" in warning
    assert count_of(writer).dropped == {"invalid_value": 3}


def test_a_caption_above_the_limit_costs_its_image(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    writer.log_image("i", [[0.0, 1.0]], caption="c" * 20_001)
    writer.log_images("grid", [[[0.0, 1.0]]] * 3, captions=["c" * 10_000] * 3, columns=2)

    found = [payload for payload in payloads(writer) if isinstance(payload, Image)]
    assert [(image.key, len(image.caption)) for image in found] == [("grid", 20_000)]
    assert "caption has 20,001 characters; expected at most 20,000" in caplog.text


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (
            lambda w: w.log({"loss": 1.0, "acc": 2.0}, step=-1),
            "log('loss', 'acc'): step -1 is out of range; expected 0 to",
        ),
        (
            lambda w: w.log(dict.fromkeys("abcd", 1.0), step="x"),
            "log('a', 'b', 'c', ...): step 'x' is a str; expected a",
        ),
        (lambda w: w.log("loss"), "log: expected a mapping of key to value, got str: 'loss'"),
        (lambda w: w.log({"loss": None}), "log: metric 'loss': None is a NoneType; expected a number"),
        (lambda w: w.log_text("note", "x", step=1.5), "log_text('note'): step 1.5 is a float; expected a whole number"),
        (lambda w: w.log_params({"": 1}), "log_params: key '' is empty; expected a name such as"),
        (lambda w: w.log_table("t", 3), "log_table: table 't': "),
    ],
)
def test_a_warning_names_the_method_and_the_key_and_what_was_expected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, call: Callable[[Writer], None], expected: str
) -> None:
    with Writer(new_spool(tmp_path / "spool")) as writer:
        call(writer)

    (message,) = caplog.messages
    assert expected in message


def test_a_bad_value_is_named_by_its_kind_and_its_key(writer: Writer, caplog: pytest.LogCaptureFixture) -> None:
    deep: list[Any] = []
    for _ in range(30):
        deep = [deep]
    writer.summarize({"best": "\ud800", "deep": deep})
    writer.set_tags({"owner": "\ud800"})
    writer.log_table("scores", ["c"], [["\ud800"]])

    assert "final value 'best': the text cannot be encoded" in caplog.text
    assert "final value 'deep[0][0]" in caplog.text
    assert "tag 'owner': the text cannot be encoded" in caplog.text
    assert "row 0 of table 'scores': the text cannot be encoded" in caplog.text
    assert "param" not in caplog.text


def test_a_warning_comes_once_for_a_method_and_reason_however_many_writers_there_are(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for turn in range(3):
        with Writer(new_spool(tmp_path / str(turn))) as writer:
            writer.log({"loss": 1.0}, step=-1)
            writer.log({"acc": 1.0}, step=-2)
            writer.log({"loss": None})
            writer.log_text("note", "x", step=-1)
        writer.log({"loss": 1.0})

    assert [message.partition("): ")[2].partition("(")[0].partition(":")[0] for message in caplog.messages] == [
        "log",
        "log",
        "log_text",
        "log",
    ]
    assert len(set(caplog.messages)) == 4
