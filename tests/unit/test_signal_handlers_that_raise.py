# SPDX-License-Identifier: Apache-2.0
"""What a signal handler of the script raises in the middle of a log call reaches the script, and counts no value."""

from __future__ import annotations

import functools
import io
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import new_spool, spool_of
from trackhub.errors import RecordError
from trackhub.records import Artifact, Blob
from trackhub.signal_handler_errors import find_signal_handler_error
from trackhub.spool.reading import SpoolReader
from trackhub.spool.writing import NewBlob
from trackhub.writer import MLflowWriter, SummaryWriter, WandBWriter
from trackhub.writer.plain_values import shown
from trackhub.writer.writer import Writer


class Stop(Exception):
    """What the handlers raise, unless the error is of another kind."""


class StopOSError(TimeoutError):
    """As most time limits raise it."""


class StopValueError(ValueError):
    """Of a kind that readers of values catch."""


class Handlers:
    def method(self, number: int, frame: Any) -> None:
        raise Stop

    def __call__(self, number: int, frame: Any) -> None:
        raise Stop


def plain(number: int, frame: Any) -> None:
    raise Stop


def any_arguments(*args: Any) -> None:
    raise Stop


def with_state(state: str, number: int, frame: Any) -> None:
    raise Stop


def once(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_DFL)
    raise Stop


def through_another_function(number: int, frame: Any) -> None:
    def stop() -> None:
        raise Stop

    stop()


HANDLERS = [
    plain, any_arguments, once, through_another_function, Handlers().method, Handlers(),
    functools.partial(with_state, "state"), lambda number, frame: plain(number, None),
]  # fmt: skip


class Interrupted:
    """A value, path, file, mapping and figure in whose methods the signal comes."""

    def interrupt(self, *args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)

    __float__ = __int__ = __index__ = __str__ = __repr__ = __fspath__ = __array__ = __len__ = __iter__ = interrupt
    read = item = savefig = to_image = keys = items = to_html = interrupt

    def __getitem__(self, key: Any) -> Any:
        return self.interrupt()


class InterruptedFile(io.BytesIO):
    def getvalue(self) -> bytes:
        signal.raise_signal(signal.SIGUSR1)
        return b""


@pytest.fixture(autouse=True)
def old_handler() -> Iterator[None]:
    old = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, old)


@pytest.fixture(params=[False, True], ids=["counting", "strict"])
def writer(request: pytest.FixtureRequest, tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"), strict=request.param)


def counted(writer: Writer) -> list[Any]:
    """Return what is counted as dropped or left out."""
    counts = SpoolReader(spool_of(writer).folder, "server").counts().values()
    return [count for count in counts if count.dropped or count.altered]


def raise_in_handler(error: type[Exception]) -> None:
    def handler(number: int, frame: Any) -> None:
        raise error("time limit of the script")

    signal.signal(signal.SIGUSR1, handler)


@pytest.mark.parametrize("handler", HANDLERS)
def test_every_kind_of_handler_is_recognised(writer: Writer, handler: Callable[..., Any]) -> None:
    signal.signal(signal.SIGUSR1, handler)
    with pytest.raises(Stop):
        writer.log({"a": Interrupted()})
    assert not counted(writer)


CALLS: dict[str, Callable[[Writer], object]] = {
    "log": lambda writer: writer.log({"a": Interrupted()}),
    "step": lambda writer: writer.log({"a": 1.0}, step=Interrupted()),  # type: ignore[arg-type]
    "log_params": lambda writer: writer.log_params({"a": {"b": [Interrupted()]}}),
    "set_tags": lambda writer: writer.set_tags({"a": Interrupted()}),
    "log_text": lambda writer: writer.log_text("a", Interrupted()),  # type: ignore[arg-type]
    "file of an image": lambda writer: writer.log_image("a", InterruptedFile()),
    "path of an image": lambda writer: writer.log_image("a", Interrupted()),
    "images": lambda writer: writer.log_images("a", [Interrupted()]),
    "grid": lambda writer: writer.log_images("a", [Interrupted()], columns=1),
    "histogram": lambda writer: writer.log_histogram("a", Interrupted()),
    "list of arrays": lambda writer: writer.log_histogram("a", [Interrupted()]),
    "bins": lambda writer: writer.log_histogram("a", [1.0], bins=Interrupted()),  # type: ignore[arg-type]
    "edges": lambda writer: writer.log_histogram("a", edges=Interrupted(), counts=[1]),  # type: ignore[arg-type]
    "table": lambda writer: writer.log_table("a", ["b"], [[Interrupted()]]),
    "rows": lambda writer: writer.log_table("a", ["b"], Interrupted()),
    "artifact": lambda writer: writer.log_artifact(Interrupted()),
    "figure": lambda writer: writer.log_figure("a", Interrupted()),
    "wandb": lambda writer: WandBWriter(writer=writer).log({"a": [Interrupted()], "b": "text"}),
    "config": lambda writer: WandBWriter(writer=writer).config.update({"a": Interrupted()}),
    "mlflow": lambda writer: MLflowWriter(writer=writer).log_metric(Interrupted(), 1.0),  # type: ignore[arg-type]
    "tensorboard": lambda writer: SummaryWriter(writer=writer).add_figure("a", Interrupted()),
}


@pytest.mark.parametrize("error", [Stop, StopOSError, StopValueError])
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_the_error_of_a_handler_reaches_the_script(
    writer: Writer, call: Callable[[Writer], object], error: type[Exception]
) -> None:
    raise_in_handler(error)
    with pytest.raises(error) as raised:
        call(writer)
    assert not isinstance(raised.value.__context__, RecordError)  # the traceback would begin with it
    assert not counted(writer)


def _blob(write: Callable[[Path], None]) -> NewBlob:
    return NewBlob("a", 1, write, lambda name: Artifact("a", Blob(name, 1, "0" * 64, "text/plain"), "a", "file"))


def test_an_oserror_of_a_handler_in_the_copy_of_a_file_is_no_error_of_the_disk(writer: Writer) -> None:
    raise_in_handler(StopOSError)
    spool = spool_of(writer)
    with pytest.raises(StopOSError):
        spool.append_blob(_blob(lambda path: Interrupted().interrupt()), None, 0.0)
    assert not counted(writer)
    assert not list(spool.folder.glob("*.part*"))

    spool.append_blob(_blob(Path.touch), None, 0.0)
    assert spool.next_seq == 1


def test_an_oserror_of_a_handler_in_the_write_of_a_record_is_no_error_of_the_disk(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def handler(number: int, frame: Any) -> None:
        raise StopOSError(110, "time limit of the script")

    signal.signal(signal.SIGUSR1, handler)
    writer.log({"a": 1.0})
    write = os.write

    def interrupted_write(fd: int, data: bytes) -> int:
        written = write(fd, data)
        signal.raise_signal(signal.SIGUSR1)
        return written

    monkeypatch.setattr(os, "write", interrupted_write)
    with pytest.raises(StopOSError):
        writer.log({"a": 2.0})
    monkeypatch.undo()
    writer.log({"a": 3.0})
    assert spool_of(writer).next_seq == 3
    assert not counted(writer)


def test_a_handler_error_that_the_script_has_caught_is_not_raised_again(tmp_path: Path) -> None:
    """A log call in ``except`` has that error as its context."""
    writer = Writer(new_spool(tmp_path / "spool"))
    raise_in_handler(StopOSError)
    bad: Any = {"bad": "text"}
    try:
        writer.log({"a": Interrupted()})
    except StopOSError:
        writer.log({"good": 1.0, **bad})
        WandBWriter(writer=writer).log({"bad": object()})
        writer.log_image("a", b"no image")
        writer.log_artifact(tmp_path / "missing")
    (count,) = counted(writer)
    assert count.altered == {"invalid_value": 1}
    assert count.dropped == {"invalid_value": 3}


def test_an_error_that_was_looked_at_is_freed_at_once() -> None:
    class Value:
        def __repr__(self) -> str:
            raise ValueError

    def look() -> weakref.ref[Any]:
        value = Value()
        shown(value)
        return weakref.ref(value)

    assert look()() is None


def test_an_error_that_no_handler_raised_is_not_taken_for_one() -> None:
    with pytest.raises(KeyError) as raised:
        try:
            int("x")
        except ValueError as e:
            raise KeyError from e
    assert find_signal_handler_error(raised.value) is None
