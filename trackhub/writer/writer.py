# SPDX-License-Identifier: Apache-2.0
"""The writer: what training code calls to log metrics, params, images and more.

Each method makes one record of its arguments and appends it to the site's spool (`trackhub.spool.writing`). No method
but ``flush`` waits for a network or a backend. `trackhub.writer.values` says which arguments are accepted.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, ParamSpec, Self

from trackhub.errors import RecordError
from trackhub.records import MAX_STEP, Metrics, Params, Payload, Tags
from trackhub.spool.writing import NewBlob, SpoolWriter
from trackhub.writer.artifacts import read_artifact
from trackhub.writer.images import read_image
from trackhub.writer.spool_choice import open_spool
from trackhub.writer.values import (
    read_histogram,
    read_metrics,
    read_params,
    read_step,
    read_table,
    read_tags,
    read_text,
)

__all__ = ["Writer", "plain_writer"]

_POLL_S = 0.01
_Arguments = ParamSpec("_Arguments")


class Writer:
    """Logs metrics, params, images and more from a training script, whatever the backend.

    Use it as a context manager, or call ``close``::

        with trackhub.Writer() as writer:
            writer.log_params({"lr": 0.1})
            for step, batch in enumerate(batches):
                writer.log({"train/loss": train(batch)}, step)

    In a FLARE job with tracking, ``Writer()`` finds the spool of its site by itself. While a ``trackhub.local`` is open
    in the same process, it records into that run. Everywhere else it records nothing, so that the same script also runs
    without tracking. Then every call returns at once and does not look at its arguments, and ``flush`` returns True.

    A writer that records nothing says so in one warning per process, which names the ways to turn tracking on. Pass
    ``strict=True`` to get an error instead. Set the environment variable ``TRACKHUB_MODE=disabled`` to record nothing
    without a warning, also where there is tracking.

    When a log call returns, its record survives the death of this process. No log call waits for a network or a
    backend. A bad argument raises `RecordError`, and nothing is recorded. A full disk or a full spool raises nothing:
    the record is dropped and counted, and training goes on.

    All methods may be called from any thread and from signal handlers. A forked child may go on with the writer of its
    parent. A writer may be copied, and pickled into another process on the same machine: the copy logs into the same
    run. A writer that is never closed loses nothing.
    """

    def __init__(self, spool_dir: str | os.PathLike[str] | None = None, *, strict: bool = False) -> None:
        """Open the spool for this process's records.

        Args:
            spool_dir: the spool's folder. None takes the spool that was announced to this process, as described
                above. ``TRACKHUB_MODE`` has no effect on a writer with a ``spool_dir``.
            strict: raise where there is no spool, instead of recording nothing with a warning. It has no effect under
                ``TRACKHUB_MODE=disabled``: whoever runs the script has decided.

        Raises:
            ConfigError: ``strict`` is set and there is no usable spool, or ``TRACKHUB_MODE`` is neither ``enabled``
                nor ``disabled``.
            SpoolError: ``spool_dir`` was given and is not a spool.
        """
        self._spool = open_spool(spool_dir, strict=strict)
        self._known_keys: set[str] = set()

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars as one record: they belong together and are delivered together.

        Args:
            metrics: key to number: bool, int, float, or a numpy or torch value with one element. Stored as float64;
                NaN and infinities are kept. A key has 1 to 1,000 characters and no control characters.
            step: >= 0. Without one, a backend that needs a step gets 0, 1, 2, ... for the values of each key.

        Raises:
            RecordError: a key, a value or the step is not as described; the message names it.
            SpoolError: the writer is closed.
        """
        spool = self._spool
        if spool is None:
            return
        now = time.time()
        values = metrics if type(metrics) is dict and metrics else read_metrics(metrics, self._known_keys)
        known_keys = self._known_keys
        for key, value in values.items():
            if type(value) is not float or type(key) is not str or key not in known_keys:
                values = read_metrics(metrics, known_keys)
                break
        if step is not None and not (type(step) is int and 0 <= step <= MAX_STEP):
            step = read_step(step)
        # The spool encodes at once, so a dict of known keys and floats needs no copy (docs/adr/0004).
        payload = Metrics(values)
        try:
            spool.append(payload, step, now)
        except (ValueError, OverflowError) as e:
            raise _too_large(payload, e) from e

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters.

        Args:
            params: key to None, bool, int, float, str, path, or lists and dicts of these. numpy and torch values with
                one element are accepted, too.

        Raises:
            RecordError: a key or value is not as described; the message names it.
            SpoolError: the writer is closed.
        """
        self._append(None, read_params, params)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Label the run. The last value of a key holds.

        Args:
            tags: key to str, bool, int, float or None; each value becomes a string.

        Raises:
            RecordError: a key or value is not as described; the message names it.
            SpoolError: the writer is closed.
        """
        self._append(None, read_tags, tags)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a piece of text. Backends that can render Markdown do so.

        Args:
            key: the text's key.
            text: up to 1 MiB as UTF-8.
            step: as for ``log``.

        Raises:
            RecordError: the key or step is not accepted, or ``text`` is not a str or too long.
            SpoolError: the writer is closed.
        """
        self._append(step, read_text, key, text)

    def log_image(self, key: str, image: Any, step: int | None = None, caption: str = "") -> None:
        """Log one image. Encodes it as a PNG before returning; needs Pillow.

        Args:
            key: the image's key.
            image: an array, a PIL image, or the bytes or path of an image file. An array is numpy's or torch's, with
                the shape ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` and 1, 3 or 4 channels. Its values are uint8 in
                0..255 or float in 0..1. PNG and JPEG files are stored as they are.
            step: as for ``log``.
            caption: a line of text below the image.

        Raises:
            RecordError: an argument is not as described, or Pillow is not installed.
            SpoolError: the writer is closed.
        """
        self._append_blob(step, read_image, key, image, caption)

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
            values: an array or tensor of any shape, of finite numbers. They are counted into equal bins; needs NumPy.
            step: as for ``log``.
            bins: how many bins to count ``values`` into.
            edges: n + 1 finite, rising bin limits.
            counts: n counts >= 0.

        Raises:
            RecordError: an argument is not as described, or neither or both were given.
            SpoolError: the writer is closed.
        """
        self._append(step, read_histogram, key, values, bins, edges, counts)

    def log_table(
        self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int | None = None
    ) -> None:
        """Log a table of up to 1 MiB. Log a larger one as an artifact.

        Args:
            key: the table's key.
            columns: the names of the columns.
            rows: each a sequence of cells, one per column. A cell is None, bool, int, float or str.
            step: as for ``log``.

        Raises:
            RecordError: an argument is not as described, or the table is too large.
            SpoolError: the writer is closed.
        """
        self._append(step, read_table, key, columns, rows)

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None, type: str = "file") -> None:
        """Log a file. Copies it before returning, so it may change or vanish afterwards.

        Args:
            path: the file. A symbolic link is followed within its own folder, and refused if it leads out of that.
            name: what to call it in the run; by default its file name. May contain ``/``.
            type: what it is, such as ``model`` or ``dataset``.

        Raises:
            RecordError: the file does not exist, is a folder or cannot be read, or the name or type is not a str.
            SpoolError: the writer is closed.
        """
        self._append_blob(None, read_artifact, path, name, type)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until every receiver has accepted or refused the records that this writer logged before the call.

        Records are safe without it: call it only where something else waits for their arrival. It does not wait for
        dropped records. If the disk is still full, it waits only up to the first gap.

        Args:
            timeout_s: the longest wait, in seconds.

        Returns:
            True if the receiver has them; False if ``timeout_s`` passed first.
        """
        if self._spool is None:
            return True
        target = self._spool.last_written
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while self._spool.acked() < target:
            if time.monotonic() >= deadline:
                return False
            pause.wait(_POLL_S)
        return True

    def close(self) -> None:
        """Close the writer. What was logged is delivered all the same. May be called more than once."""
        if self._spool is not None:
            self._spool.close()

    def count_unconvertible(self, detail: str) -> None:
        """Count a record as dropped, since nothing that trackhub stores can hold it.

        For integrations that turn another library's log calls into records. Never raises.

        Args:
            detail: what could not be converted and why, for the log.
        """
        if self._spool is not None:
            self._spool.drop("unconvertible", detail)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(
        self, step: int | None, read: Callable[_Arguments, Payload], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> None:
        """Append the record that ``read`` makes of the arguments. Without a spool, the arguments are not even read."""
        if self._spool is None:
            return
        now = time.time()
        step = read_step(step)
        payload = read(*args, **kwargs)
        try:
            self._spool.append(payload, step, now)
        except (ValueError, OverflowError) as e:
            raise _too_large(payload, e) from e

    def _append_blob(
        self, step: int | None, read: Callable[_Arguments, NewBlob], *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> None:
        """As ``_append``, for a record whose bytes go to a file of their own."""
        if self._spool is None:
            return
        now = time.time()
        step = read_step(step)
        blob = read(*args, **kwargs)
        try:
            self._spool.append_blob(blob, step, now)
        except (ValueError, OverflowError) as e:
            raise RecordError(f"{blob.key!r}: {e}") from e


def plain_writer(spool: SpoolWriter | None) -> Writer:
    """Return a writer on this spool, for the copy of a writer that can do more. Without one, it records nothing."""
    writer = Writer.__new__(Writer)
    writer._spool = spool
    writer._known_keys = set()
    return writer


def _too_large(payload: Payload, error: Exception) -> RecordError:
    name = type(payload).__name__
    keys = list(payload.values)[:3] if isinstance(payload, Metrics | Params | Tags) else getattr(payload, "key", "")
    # Which of the two it was; each has its own way out.
    way_out = (
        "expected integers that fit into 64 bits; convert a larger one with str() or float()"
        if isinstance(error, OverflowError)
        else "log a larger value with log_artifact"
    )
    return RecordError(f"{name} {keys!r:.200}: {error}; {way_out}")
