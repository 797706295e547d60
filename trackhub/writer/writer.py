# SPDX-License-Identifier: Apache-2.0
"""The writer: what training code calls to log metrics, params, images and more.

Each log method makes records of its arguments, in most cases one, and appends them to the site's spool
(`trackhub.spool.writing`). No method but ``flush`` waits for a network or a backend. `trackhub.writer.values` says
which arguments are accepted.
"""

from __future__ import annotations

import copy
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, ParamSpec, Self

from trackhub.errors import RecordError, SpoolError
from trackhub.records import MAX_STEP, Metrics, Payload
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.spool.writing import NewBlob, SpoolWriter
from trackhub.writer.bad_values import BadValues, WrongCallError
from trackhub.writer.count_wrong_calls import implemented_by, with_counted_calls
from trackhub.writer.images import read_image
from trackhub.writer.log_figures_and_histograms import FigureAndModelCalls
from trackhub.writer.plain_values import shown, shown_error
from trackhub.writer.read_artifact import read_artifact
from trackhub.writer.spool_choice import is_strict, open_spool
from trackhub.writer.values import (
    known_numbers,
    read_histogram,
    read_metrics,
    read_params,
    read_step,
    read_summary,
    read_table,
    read_tags,
    read_text,
)

__all__ = ["Writer", "plain_writer"]

_POLL_S = 0.01
_INVALID_VALUE = "invalid_value"
_MAX_WARNINGS = 50  # per process; each is about another method, reason or key
_MAX_NAMED = 3
_warned: set[tuple[str, str, str]] = set()  # for all writers, since a script may make one in each turn of a loop
_Arguments = ParamSpec("_Arguments")
_log = logging.getLogger(__name__)


@with_counted_calls
class Writer(FigureAndModelCalls):
    """Logs metrics, params, images and more from a training script, whatever the backend.

    Use it as a context manager, or call ``close``::

        with trackhub.Writer() as writer:
            writer.log_params({"lr": 0.1})
            for step, batch in enumerate(batches):
                writer.log({"train/loss": train(batch)}, step)

    In a FLARE job with tracking, ``Writer()`` finds the spool of its site by itself. While a ``trackhub.local`` is open
    in the same process, ``Writer()`` records into that run. Everywhere else it records nothing, so that the same script
    also runs without tracking. Then every call returns at once and does not look at its arguments, and ``flush``
    returns True.

    A writer that records nothing says so in one warning per process, which names the ways to turn tracking on. A strict
    writer (see below) raises an error instead. With the environment variable ``TRACKHUB_MODE=disabled``, ``Writer()``
    neither records nor warns, even where there is tracking.

    When a log call returns, its record survives the death of this process. No log call waits for a network or a
    backend. None raises, unless the writer is strict (see below). A value that cannot be stored is left out and counted
    as ``invalid_value``. The other values of the call are stored. A call with a wrong argument, such as a negative
    step, is counted as ``invalid_call``. A call after ``close`` is counted as ``writer_closed``. Python's log gets one
    warning for each bad key and one for each method that is called wrongly, at most 50 in a process.

    For tests, make the writer strict, with ``strict=True`` or the environment variable ``TRACKHUB_STRICT=1``. A strict
    writer raises `RecordError`, or `SpoolError` after ``close``, instead of counting and warning.

    A record for which the disk or the spool has no room is dropped and counted, and training goes on.

    All methods may be called from any thread and from signal handlers. A forked child may go on with the writer of its
    parent. A writer may be copied, and pickled into another process on the same machine: the copy logs into the same
    run. A writer that is never closed loses nothing.
    """

    def __init__(self, spool_dir: str | os.PathLike[str] | None = None, *, strict: bool = False) -> None:
        """Open the spool for this process's records.

        Args:
            spool_dir: the spool's folder. None takes the spool of the FLARE job, or of the open ``trackhub.local``.
                ``TRACKHUB_MODE`` has no effect on a writer with a ``spool_dir``.
            strict: raise for what cannot be stored, and where there is no spool, instead of warning once. Under
                ``TRACKHUB_MODE=disabled``, even a strict ``Writer()`` records nothing, and does not raise for that.

        Raises:
            ConfigError: ``strict`` is set and there is no usable spool, or ``TRACKHUB_MODE`` or ``TRACKHUB_STRICT`` has
                an unknown value.
            SpoolError: ``spool_dir`` was given and is not a spool.
        """
        self._strict = strict or is_strict()
        self._spool = open_spool(spool_dir, strict=self._strict)
        self._known_keys: set[str] = set()

    def __copy__(self) -> Self:
        # Two writers on one stream would be closed together.
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._spool, other._known_keys = copy.copy(self._spool), set(self._known_keys)
        return other

    def _log(self, metrics: Any = None, step: Any = None, *more: Any, **unknown: Any) -> None:
        """Do the work of ``log``, with whatever arguments."""
        spool = self._spool
        if spool is None:
            return
        now = time.time()
        try:
            if more or unknown:
                raise WrongCallError(f"log: expected metrics and a step, got {shown(unknown or more)} as well")
            if step is not None and not (type(step) is int and 0 <= step <= MAX_STEP):
                step = read_step(step)
            known_keys = self._known_keys
            values: dict[str, float]
            if type(metrics) is dict:
                values = metrics
                for key, value in metrics.items():
                    if type(value) is not float or type(key) is not str or key not in known_keys:
                        values = self._read_metrics(metrics)
                        break
            else:
                values = self._read_metrics(metrics)
            if values:
                # The spool encodes at once, so a dict of known keys and floats needs no copy (docs/adr/0004).
                spool.append(Metrics(values), step, now)
        except Exception as e:  # noqa: BLE001  # no log call raises, whatever it was given
            self._drop_call("log", e, *_keys_of(metrics))

    @implemented_by(_log)
    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars as one record: they belong together and are delivered together.

        Args:
            metrics: key to number: a bool, int or float, or an object with one element that ``float()`` takes, such as
                a value of numpy or torch, or a ``decimal.Decimal``. Strings are not accepted. Numbers are stored as
                float64; NaN and infinities are kept. The values of a nested dict get keys such as ``train/loss``. A key
                has 1 to 1,000 characters and no control characters. One call has at most 10,000 metrics. An empty
                mapping logs nothing.
            step: a whole number >= 0. Without one, a backend that needs a step gets 0, 1, 2, ... for the values of each
                key.

        Raises:
            RecordError: only if strict: a key, a value or the step is not as described; the message names it.
            SpoolError: only if strict: the writer is closed.
        """

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters.

        Args:
            params: key to value, or an object with fields: a dataclass, an ``argparse.Namespace``, a pydantic model, an
                OmegaConf. The values of a nested dict or object get keys such as ``optim/lr``. None, bool, int, float,
                str and lists of these are stored as they are. An int that does not fit into 64 bits becomes text. A
                value of numpy or torch with one element becomes a plain value. An array of up to 1,000 elements becomes
                a list, and a larger one becomes text. An enum's member becomes its value, or its name if the value is
                not a bool, int, float or str. A path, a date and anything else become text. A text or list of more than
                about 1 MiB is left out.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        self._append_values("log_params", read_params, params)

    def summarize(self, values: Mapping[str, Any]) -> None:
        """Set final values of the run, such as its best accuracy. If a key gets several values, the last one counts.

        Args:
            values: key to value, as for ``log_params``.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        self._append_values("summarize", read_summary, values)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Label the run. If a key gets several values, the last one counts.

        Args:
            tags: key to value; each value becomes a string.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        self._append_values("set_tags", read_tags, tags)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a piece of text. Backends that can render Markdown do so.

        Args:
            key: the text's key.
            text: a little less than 1 MiB as UTF-8, since the record with its key must fit into 1 MiB.
            step: as for ``log``.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        self._append("log_text", step, read_text, key, text)

    def log_image(self, key: str, image: Any, step: int | None = None, caption: str = "") -> None:
        """Log one image. Needs Pillow.

        Encodes the image as a PNG before it returns. PNG and JPEG files are stored as they are, except a JPEG in CMYK.

        Args:
            key: the image's key.
            image: an array, a PIL image, or the bytes, path or open file of an image. An array of numpy or torch has
                the shape ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]``. A batch must hold exactly one such image. An image
                has 1 to 4 channels: grey, grey with alpha, RGB, RGBA. Values are floats in 0..1, or ints in 0..255 or
                0..65535. A mask of bools becomes black and white. So does a mask of ints that are 0 and 1, unless its
                type is uint8 or uint16: multiply such a mask by 255 or 65535.
            step: as for ``log``.
            caption: a line of text below the image.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        self._append_blob("log_image", step, read_image, key, image, caption)

    def log_histogram(
        self,
        key: str,
        values: Any = None,
        step: int | None = None,
        *,
        bins: int = 30,
        edges: Sequence[float] | None = None,
        counts: Sequence[float] | None = None,
    ) -> None:
        """Log a distribution: give either ``values``, or ``edges`` and ``counts``.

        Args:
            key: the histogram's key.
            values: an array or tensor of any shape. Its finite numbers are counted into equal bins; needs NumPy.
            step: as for ``log``.
            bins: how many bins to count ``values`` into, 1 to 49,999. If the values are too close to each other for so
                many, there are fewer.
            edges: n + 1 finite, rising bin limits.
            counts: n counts >= 0.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        bad = BadValues(strict=self._strict)
        self._append("log_histogram", step, read_histogram, key, values, bins, edges, counts, bad)
        self._note_left_out("log_histogram", bad, has_rest=True)

    def log_table(
        self,
        key: str,
        columns: Any,
        rows: Iterable[Sequence[Any]] | None = None,
        step: int | None = None,
    ) -> None:
        """Log a table of up to 100,000 cells. Its record must fit into 1 MiB. Log a larger one as an artifact.

        Args:
            key: the table's key.
            columns: the names of the columns, or the whole table. A whole table is a DataFrame of pandas or polars, a
                mapping of column to values, or a list of mappings. The values of a column may be a mapping of label to
                cell, or a Series of pandas. These labels, or an index of pandas, become the first columns, unless they
                are only the numbers 0, 1, 2, ... of the rows, and have no name.
            rows: each a sequence of cells, one per column, or a mapping of column to cell; or a whole table, of which
                ``columns`` are chosen. A cell is None, bool, int, float or str; other values become text, and None
                takes the place of one that cannot be stored. None if ``columns`` is the whole table.
            step: as for ``log``.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        bad = BadValues(strict=self._strict)
        self._append("log_table", step, read_table, key, columns, rows, bad)
        self._note_left_out("log_table", bad, has_rest=True)

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None, type: str = "file") -> None:
        """Log a file. Copies it before returning, so it may change or vanish afterwards.

        Args:
            path: the file. A symbolic link is followed if it leads to a file in or below its own folder. Any other link
                is refused.
            name: what to call it in the run; by default its file name. May contain ``/``.
            type: what it is, such as ``model`` or ``dataset``.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        self._append_blob("log_artifact", None, read_artifact, path, name, type)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every receiver has accepted or refused the records that this writer logged before the call.

        Records are safe without it. Call it only where something else waits for their arrival. If the last
        records were dropped, it does not wait until the receivers know that.

        Args:
            timeout_s: the longest wait, in seconds.

        Returns:
            True if the receivers have answered for all of them; False if ``timeout_s`` passed first.
        """
        if self._spool is None:
            return True
        target = self._spool.last_written()
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while any(acked < end for acked, end in zip(self._spool.acked(), target, strict=True)):
            if time.monotonic() >= deadline:
                return False
            pause.wait(_POLL_S)
        return True

    def close(self) -> None:
        """Close the writer. What was logged is still delivered. May be called more than once."""
        if self._spool is not None:
            self._spool.close()

    def count_unconvertible(self, detail: str) -> None:
        """Count a record as dropped, since trackhub has no kind of record for it.

        For integrations that turn another library's log calls into records. Never raises.

        Args:
            detail: what could not be converted and why, for the log.
        """
        if self._spool is not None:
            self._spool.drop("unconvertible", detail if isinstance(detail, str) else shown(detail))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(
        self,
        method: str,
        step: int | None,
        read: Callable[_Arguments, Payload],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> None:
        """Append the record that ``read`` makes of the arguments. Without a spool, do not call ``read``."""
        if self._spool is None:
            return
        now = time.time()
        try:
            step = read_step(step)
            self._spool.append(read(*args, **kwargs), step, now)
        except Exception as e:  # noqa: BLE001  # no log call raises, whatever it was given
            self._drop_call(method, e, *args[:1])

    def _append_values(self, method: str, read: Callable[[Any, BadValues], Sequence[Payload]], values: Any) -> None:
        """Append what ``read`` makes of a mapping, and count the values that it leaves out."""
        if self._spool is None:
            return
        now = time.time()
        try:
            bad = BadValues(strict=self._strict)
            payloads = read(values, bad)
            self._note_left_out(method, bad, has_rest=bool(payloads))
            for payload in payloads:
                self._spool.append(payload, None, now)
        except Exception as e:  # noqa: BLE001  # no log call raises, whatever it was given
            self._drop_call(method, e, *_keys_of(values))

    def _append_blob(
        self,
        method: str,
        step: int | None,
        read: Callable[_Arguments, NewBlob],
        *args: _Arguments.args,
        **kwargs: _Arguments.kwargs,
    ) -> None:
        """Append a record whose bytes go to a separate file. Apart from that, this works as ``_append``."""
        if self._spool is None:
            return
        now = time.time()
        try:
            step = read_step(step)
            self._spool.append_blob(read(*args, **kwargs), step, now)
        except Exception as e:  # noqa: BLE001  # no log call raises, whatever it was given
            self._drop_call(method, e, *args[:1])

    def _read_metrics(self, metrics: Any) -> dict[str, float]:
        if (known := known_numbers(metrics, self._known_keys)) is not None:
            return known
        bad = BadValues(strict=self._strict)
        values = read_metrics(metrics, self._known_keys, bad)
        self._note_left_out("log", bad, has_rest=bool(values))
        return values

    def _note_left_out(self, method: str, bad: BadValues, *, has_rest: bool) -> None:
        """Count the values that are left out of a call. If the call has no other values, its record is dropped."""
        if not bad.found or self._spool is None:
            return
        if has_rest:
            self._spool.count_left_out(_INVALID_VALUE, len(bad.found))
        else:
            self._spool.drop(_INVALID_VALUE, "")
        for key, error in bad.found:
            _warn(method, _INVALID_VALUE, (key,), error)

    def _drop_call(self, method: str, error: Exception, *keys: Any) -> None:
        """Count a call that cannot be recorded, and warn once. A strict writer raises.

        Args:
            method: the method that was called.
            error: why.
            keys: the keys of the call, if it has any.

        Raises:
            RecordError, SpoolError: the writer is strict.
            Exception: a signal handler of the script raised it.
        """
        raise_if_from_signal_handler(error)
        if not isinstance(error, RecordError | SpoolError):
            wrong = WrongCallError(f"{method}: {type(error).__name__}: {shown_error(error)}")
            wrong.__cause__ = error
            error = wrong
        if self._strict:
            raise error
        reason = _INVALID_VALUE
        if isinstance(error, SpoolError):
            reason = "writer_closed"
        elif isinstance(error, WrongCallError):
            reason = "invalid_call"
        if self._spool is not None:
            self._spool.drop(reason, "")
        _warn(method, reason, tuple(map(shown, keys)), error)


def _keys_of(values: Any) -> tuple[Any, ...]:
    """Return the first keys of a mapping; none of anything else."""
    try:
        return tuple(itertools.islice(values, _MAX_NAMED + 1)) if isinstance(values, Mapping) else ()
    except Exception as e:  # noqa: BLE001  # a foreign mapping may raise anything
        raise_if_from_signal_handler(e)
        return ()


def _warn(method: str, reason: str, keys: tuple[str, ...], error: RecordError | SpoolError) -> None:
    """Warn of a call or value that is left out: once per process for each method and reason, or for each bad key.

    Args:
        method: the method that was called.
        reason: the reason that it is counted with.
        keys: the keys of the call, or the key of the value, as text.
        error: what is wrong, and what was expected.
    """
    about = (method, reason, keys[0] if reason == _INVALID_VALUE and keys else "")
    if about in _warned or len(_warned) >= _MAX_WARNINGS:
        return
    _warned.add(about)
    said = shown_error(error, 500)
    if named := [key for key in keys[:_MAX_NAMED] if key not in said]:
        more = ", ..." if len(keys) > _MAX_NAMED else ""
        said = f"{method}({', '.join(named)}{more}): {said.removeprefix(f'{method}: ')}"
    elif not said.startswith(method):
        said = f"{method}: {said}"
    _log.warning(
        "tracking left something out (%s): %s. Training goes on. If it happens again, it is counted without a "
        "warning", reason, said,
    )  # fmt: skip


def plain_writer(spool: SpoolWriter | None, strict: bool) -> Writer:
    """Return a plain `Writer` on this spool. Without a spool, it records nothing.

    A copied or pickled `LocalWriter` becomes a plain writer, since the copy cannot end the run.
    """
    writer = Writer.__new__(Writer)
    writer._spool = spool
    writer._strict = strict
    writer._known_keys = set()
    return writer
