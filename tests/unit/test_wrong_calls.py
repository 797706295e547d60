# SPDX-License-Identifier: Apache-2.0
"""A logging method that is called with wrong arguments counts the call, and does not end the training."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.readers_and_bad_backends import new_spool, spool_of
from tests.unit.test_writer_bad_values import Evil, payloads
from trackhub.errors import RecordError
from trackhub.records import Image, Metrics, Params, Summary, Text
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


def test_an_empty_text_is_not_the_current_folder(
    writer: Writer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "notes").write_text("mine")
    monkeypatch.chdir(tmp_path / "private")

    MLflowWriter(writer=writer).log_artifacts("")
    WandBWriter(writer=writer).log_artifact("")

    assert payloads(writer) == []
    assert sum(dropped(writer).values()) == 2


def test_a_method_without_a_record_takes_arguments_of_any_name(writer: Writer) -> None:
    wandb: Any = WandBWriter(writer=writer)
    wandb.watch("model", method="gradients", self=1)

    assert dropped(writer) == {"unconvertible": 1}


class NoKind:
    """Its class cannot be asked for, as that of a dead weak reference or of a proxy without an object."""

    @property
    def __class__(self) -> Any:
        raise ReferenceError("weakly-referenced object no longer exists")

    @__class__.setter
    def __class__(self, value: Any) -> None: ...


class NoFloat(float):
    def __float__(self) -> float:
        raise RuntimeError("float")


@pytest.mark.parametrize("odd", [NoKind, NoFloat])
def test_a_metric_that_raises_whatever_it_is_asked_costs_only_itself(writer: Writer, odd: Any) -> None:
    for _ in range(2):  # the second time, the keys are known
        writer.log({"loss": 1.0, "x": odd()})
        WandBWriter(writer=writer).log({"loss": 1.0, "x": odd()})
        writer.log({"loss": 1.0, "x": 2.0})

    assert payloads(writer).count(Metrics({"loss": 1.0})) == 4


def test_a_call_that_fails_before_its_value_is_known_is_warned_of_with_its_key(
    writer: Writer, caplog: pytest.LogCaptureFixture
) -> None:
    MLflowWriter(writer=writer).log_figure(5, "plots/roc.png")

    assert "log_figure('plots/roc.png'): TypeError: a int is not a figure" in caplog.text


class LateTable:
    """Looks like a DataFrame, and its rows cannot be read."""

    columns = ("a",)

    def itertuples(self, **kwargs: Any) -> Any:
        raise TypeError("rows")


BARE_KINDS = [  # W&B's types, without any of their attributes
    type(kind, (), {"__module__": "wandb.x"})() for kind in ("Image", "Histogram", "Table", "CustomChart", "Html")
]


class EvilMapping(dict[str, Any]):
    def __iter__(self) -> Iterator[str]:
        raise RuntimeError("keys")


TEXT = st.text().filter(lambda text: not os.path.isdir(text))  # "." or "/" would log all that is in that folder
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.builds(Evil), st.builds(object), st.builds(NoFloat),
    st.builds(NoKind), st.builds(LateTable), st.sampled_from(BARE_KINDS),
    st.builds(EvilMapping, st.just({"a": 1})),
    st.sampled_from([np.int64(3), np.ones(2), np.zeros((0,)), np.ma.masked, 1j, int]),
)  # fmt: skip
KEYS = st.one_of(TEXT, st.integers(), st.none(), st.sampled_from([np.int64(3), ("a", 1)]))
ANYTHING = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=3)),
    max_leaves=8,
)


@settings(
    max_examples=int(os.environ.get("TRACKHUB_TEST_EXAMPLES", "30")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(value=ANYTHING, step=LEAVES, key=KEYS)
def test_no_adapter_raises_and_good_neighbours_of_any_value_are_stored(
    tmp_path: Path, value: Any, step: Any, key: Any
) -> None:
    writer = Writer(new_spool(tmp_path / os.urandom(6).hex()))
    wandb: Any = WandBWriter(writer=writer, config={"good": 1, "x": value}, tags=value)
    mlflow: Any = MLflowWriter(writer=writer)
    summary: Any = SummaryWriter(writer=writer)
    wandb.log({"good": 1.0, "note": "text", "x": value})
    calls = [(wandb, name) for name in ("log", "log_artifact", "log_model")]
    calls += [(mlflow, name) for name in methods_of(MLflowWriter)]
    calls += [(summary, name) for name in methods_of(SummaryWriter)]
    for owner, name in calls:
        getattr(owner, name)(key, value, step)
    wandb.config.update(value)
    wandb.summary.update({"good": 2.0, "x": value})

    found = payloads(writer)
    assert any(isinstance(p, Metrics) and p.values.get("good") == 1.0 for p in found)
    assert any(isinstance(p, Text) and p == Text("note", "text") for p in found)
    assert any(isinstance(p, Params) and p.values.get("good") == 1 for p in found)
    assert any(isinstance(p, Summary) and p.values.get("good") == 2.0 for p in found)


def test_an_argument_that_comes_twice_counts_the_call(writer: Writer) -> None:
    """Python raises before the method begins."""
    untyped: Any = writer
    adapters: list[Any] = [cls(writer=writer) for cls in (WandBWriter, MLflowWriter, SummaryWriter)]
    wandb, mlflow, tensorboard = adapters
    calls: list[Any] = [
        lambda: untyped.log_text("a", "b", key="a"),
        lambda: wandb.log({"a": 1.0}, 0, step=0),
        lambda: mlflow.log_metric("a", 1.0, key="a"),
        lambda: tensorboard.add_scalar("a", 1.0, tag="a"),
        lambda: wandb.config.update(),
        lambda: wandb.config.setdefaults(),
        lambda: wandb.summary.update(),
    ]
    for call in calls:
        call()
    assert dropped(writer) == {"invalid_call": len(calls)}


def test_the_arguments_of_log_may_be_named(writer: Writer) -> None:
    writer.log(metrics={"a": 1.0}, step=3)
    writer.log({"a": 1.0}, step=3)
    WandBWriter(writer=writer).config.update(d={"lr": 0.1}, allow_val_change=True)
    assert payloads(writer) == [Metrics({"a": 1.0}), Metrics({"a": 1.0}), Params({"lr": 0.1})]
    assert not dropped(writer)


def test_tags_of_mlflow_that_are_not_those_of_the_run_are_counted(writer: Writer) -> None:
    mlflow: Any = MLflowWriter(writer=writer)
    mlflow.set_experiment("x")
    mlflow.set_tracking_uri("http://127.0.0.1")
    assert not dropped(writer)
    mlflow.set_experiment_tags({"team": "a"})
    mlflow.set_trace_tag("id", "key", "value")
    assert dropped(writer) == {"unconvertible": 2}
