# SPDX-License-Identifier: Apache-2.0
"""The writer: what training code calls.

Every method checks its arguments, makes one record of them and appends it to the spool; none waits for a network or a
backend. All may be called from any thread.
"""

from __future__ import annotations

import itertools
import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trackhub.errors import RecordError
from trackhub.records import (
    MAX_KEY_CHARS,
    MAX_STEP,
    Artifact,
    Blob,
    Histogram,
    Image,
    Metrics,
    Params,
    Payload,
    Table,
    Tags,
    Text,
)
from trackhub.spool.writing import Spool, find_spool
from trackhub.writer.images import encode_image

__all__ = ["Writer"]

_COPY_BYTES = 1 << 20
_KNOWN_KEYS_MAX = 10_000
_MAX_DEPTH = 20
_POLL_S = 0.01


class Writer:
    """Logs metrics, params and more from a training script, once, whatever the backend.

    Use it as a context manager, or call ``close``; a writer that is never closed loses nothing. In a FLARE job it
    finds its spool by itself; outside, ``trackhub.local`` makes one.

    A call that returns has made its record safe against the death of this process. A call with a bad argument raises
    `RecordError` and records nothing. A full disk raises nothing: the record is counted as dropped, training goes on.
    """

    def __init__(self, spool_dir: str | os.PathLike[str] | None = None) -> None:
        """Open a stream in the spool.

        Args:
            spool_dir: the spool's folder; by default the one that the job's sender announced.

        Raises:
            ConfigError: there is no spool: not in a FLARE job with tracking, and not in ``trackhub.local``.
            SpoolError: ``spool_dir`` is not a spool.
        """
        self._spool = Spool(find_spool() if spool_dir is None else Path(spool_dir))
        self._known_keys: set[str] = set()

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log scalars. They belong together: one record, delivered together.

        Args:
            metrics: key to number: bool, int, float, or a numpy or torch value with one element. Stored as float64;
                NaN and infinities are kept.
            step: >= 0. Without one, backends that need a step number the values of each key 0, 1, 2, ...

        Raises:
            RecordError: a key, value or the step is not as expected; the message names it.
        """
        now = time.time()
        values = metrics if type(metrics) is dict and metrics else self._checked_metrics(metrics)
        known = self._known_keys
        for key, value in values.items():
            if type(value) is not float or type(key) is not str or key not in known:
                values = self._checked_metrics(metrics)
                break
        # The spool encodes at once, so a dict that is as it should be needs no copy (docs/adr/0004).
        self._append(Metrics(values), step, now)

    def _checked_metrics(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        items = _items("log", metrics)
        return {self._key(key): value if type(value) is float else _number(key, value) for key, value in items}

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters: None, bool, int, float, str, paths, and lists and dicts of these.

        Raises:
            RecordError: a key or value is not as expected; the message names it.
        """
        now = time.time()
        values = {self._key(key): _param(key, value) for key, value in _items("log_params", params)}
        self._append(Params(values), None, now)

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Label the run. Values become strings; the last value of a key holds.

        Raises:
            RecordError: a key is not as expected, or a value is not a str, bool, int, float or None.
        """
        now = time.time()
        values = {self._key(key): _tag(key, value) for key, value in _items("set_tags", tags)}
        self._append(Tags(values), None, now)

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a piece of text, up to 1 MiB. Backends that can, render it as Markdown.

        Raises:
            RecordError: ``text`` is not a str, or is too long.
        """
        now = time.time()
        if not isinstance(text, str):
            raise RecordError(f"log_text({key!r}): expected a str, got {type(text).__name__}; convert it with str()")
        self._append(Text(self._key(key), _encodable(key, text)), step, now)

    def log_image(self, key: str, image: Any, step: int | None = None, caption: str = "") -> None:
        """Log one image.

        Args:
            image: a numpy array or torch tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with 1, 3 or 4 channels,
                uint8 0..255 or float 0..1; a PIL image; the bytes or the path of a PNG or JPEG file.
            caption: a line of text below it.

        Raises:
            RecordError: it is none of these.
        """
        now = time.time()
        key = self._key(key)
        step = _step(step)
        if not isinstance(caption, str):
            raise RecordError(f"log_image({key!r}): caption {_shown(caption)}; expected a str")
        caption = _encodable(key, caption)
        import hashlib  # lazy, as below: with OpenSSL it is a tenth of what `import trackhub` takes

        data, media_type, width, height = encode_image(key, image)
        digest = hashlib.sha256(data).hexdigest()

        def make(name: str) -> Payload:
            return Image(key, Blob(name, len(data), digest, media_type), width, height, caption)

        def write(path: Path) -> None:
            path.write_bytes(data)

        self._append_blob(key, make, write, len(data), step, now)

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
        """Log a distribution: either ``values`` (any array, counted into ``bins`` equal bins), or edges and counts.

        Args:
            edges: n + 1 finite, rising bin limits.
            counts: n counts >= 0.

        Raises:
            RecordError: neither or both are given, values are not finite, or edges and counts do not fit together.
        """
        now = time.time()
        key = self._key(key)
        if (values is None) == (edges is None) or (edges is None) != (counts is None):
            raise RecordError(f"log_histogram({key!r}): give either values, or edges and counts")
        if values is not None:
            edges, counts = _count_values(key, values, bins)
        assert edges is not None
        assert counts is not None
        self._append(_histogram(key, edges, counts), step, now)

    def log_table(
        self, key: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], step: int | None = None
    ) -> None:
        """Log a table; a cell is None, bool, int, float or str. Up to 1 MiB: log larger ones as an artifact.

        Raises:
            RecordError: a row's length differs from the number of columns, or a cell is of another type.
        """
        now = time.time()
        key = self._key(key)
        table: list[list[Any]] = []
        try:
            names = [_encodable(key, c if isinstance(c, str) else str(c)) for c in columns]
            for i, row in enumerate(rows):
                cells = [_cell(f"log_table({key!r}), row {i}", cell) for cell in row]
                if len(cells) != len(names):
                    raise RecordError(f"log_table({key!r}): row {i} has {len(cells)} cells, expected {len(names)}")
                table.append(cells)
        except TypeError as e:
            raise RecordError(f"log_table({key!r}): {e}; expected a list of column names and a list of rows") from e
        self._append(Table(key, names, table), step, now)

    def log_artifact(self, path: str | os.PathLike[str], name: str | None = None, type: str = "file") -> None:
        """Log a file. It is copied at once, so it may change or vanish afterwards; takes as long as the copy.

        Args:
            name: what to call it in the run; by default its file name. May contain ``/``.
            type: what it is, such as ``model`` or ``dataset``.

        Raises:
            RecordError: there is no such file, it is a folder, or cannot be read.
        """
        import hashlib

        now = time.time()
        if not isinstance(type, str):
            raise RecordError(f"log_artifact: type {_shown(type)}; expected a str such as 'model'")
        try:
            source = Path(path)
            if source.is_dir():
                raise IsADirectoryError("it is a folder; pack it first, for example with shutil.make_archive")
            if not source.is_file():
                raise FileNotFoundError("it does not exist, or is no ordinary file")
            opened = source.open("rb")
        except (OSError, TypeError, ValueError) as e:
            raise RecordError(f"log_artifact: cannot read {_shown(path)}: {e}") from e
        with opened as file:
            key = self._key(source.name if name is None else name)
            filename, kind = _encodable(key, source.name), _encodable(key, type)
            size, digest = os.fstat(file.fileno()).st_size, hashlib.sha256()

            def copy(target: Path) -> None:
                # Size and digest are the copy's: the source may be changing.
                nonlocal size
                size = 0
                with target.open("wb") as out:
                    while data := file.read(_COPY_BYTES):
                        digest.update(data)
                        size += out.write(data)

            def make(blob: str) -> Payload:
                return Artifact(key, Blob(blob, size, digest.hexdigest(), "application/octet-stream"), filename, kind)

            self._append_blob(key, make, copy, size, None, now)

    def flush(self, timeout_s: float = 10.0) -> bool:
        """Wait until the receiver has everything that this process logged before the call. Never needed for safety.

        Does not wait for records that were dropped since the spool or the disk was full.

        Returns:
            True if it has; False if ``timeout_s`` passed first.
        """
        target = self._spool.last_written
        deadline = time.monotonic() + timeout_s
        pause = threading.Event()
        while self._spool.acked() < target:
            if time.monotonic() >= deadline:
                return False
            pause.wait(_POLL_S)
        return True

    def close(self) -> None:
        """Close the stream. What was logged is delivered all the same. Idempotent."""
        self._spool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, payload: Payload, step: int | None, now: float) -> None:
        try:
            quick = step is None or (type(step) is int and 0 <= step <= MAX_STEP)
            self._spool.append(payload, step if quick else _step(step), now)
        except (ValueError, OverflowError) as e:
            raise _too_large(payload, e) from e

    def _append_blob(
        self, key: str, make: Callable[[str], Payload], source: Callable[[Path], None], size: int, step: int | None,
        now: float,
    ) -> None:  # fmt: skip
        try:
            self._spool.append_blob(make, source, size, step, now)
        except (ValueError, OverflowError) as e:
            raise RecordError(f"{key!r}: {e}") from e

    def _key(self, key: Any) -> str:
        if type(key) is str and key in self._known_keys:
            return key
        checked = _checked_key(key)
        if len(self._known_keys) < _KNOWN_KEYS_MAX:
            self._known_keys.add(checked)
        return checked


def _items(method: str, values: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(values, Mapping):
        name = type(values).__name__
        raise RecordError(f"{method}: expected a mapping of key to value, got {name}: {_shown(values)}")
    if not values:
        raise RecordError(f"{method}: the mapping is empty; expected at least one key")
    return values.items()


def _checked_key(key: Any) -> str:
    if not isinstance(key, str):
        raise RecordError(f"key {_shown(key)} is a {type(key).__name__}; expected a str")
    if not key:
        raise RecordError("a key is empty; expected a name such as 'train/loss'")
    if len(key) > MAX_KEY_CHARS:
        raise RecordError(f"key {key[:40]!r}... has {len(key)} characters; expected at most {MAX_KEY_CHARS}")
    if not key.isprintable():
        raise RecordError(f"key {key!r:.200} contains control or unprintable characters; expected printable text")
    return str.__str__(key)


def _encodable(key: str, text: str) -> str:
    """Return the text as a plain str: the encoder takes no subclass, and numpy's and enums' strings are such."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RecordError(f"{key!r}: the text cannot be encoded as UTF-8: {e}") from e
    return str.__str__(text)


def _shown(value: Any) -> str:
    """Return the beginning of a value's ``repr``, for a message."""
    try:
        return repr(value)[:80]
    except Exception as e:  # noqa: BLE001  # whatever a foreign class raises; an int of 5000 digits has none, either
        return f"<{type(value).__name__} without a repr: {type(e).__name__}>"


def _step(step: Any) -> int | None:
    if step is None:
        return None
    try:
        if isinstance(step, bool):
            raise TypeError
        value = operator.index(step)
    except (TypeError, ValueError, RuntimeError) as e:
        raise RecordError(f"step {_shown(step)} is a {type(step).__name__}; expected an int >= 0, or None") from e
    if not 0 <= value <= MAX_STEP:
        raise RecordError(f"step {_shown(value)} is out of range; expected 0 to {MAX_STEP}, or None")
    return value


def _number(key: Any, value: Any) -> float:
    plain = _unwrap(key, value)
    if isinstance(plain, bool | int | float):
        try:
            return float(plain)
        except OverflowError as e:
            raise RecordError(f"metric {key!r}: {_shown(plain)}... is too large for a float64") from e
    raise RecordError(
        f"metric {key!r}: {_shown(value)} is a {type(value).__name__}; expected a number (bool, int, float, or a numpy "
        "or torch value with one element)"
    )


def _unwrap(key: Any, value: Any) -> Any:
    """Return the plain Python value of a numpy or torch value with one element; anything else as it is."""
    if isinstance(value, bool | int | float | str) or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (ValueError, RuntimeError, TypeError) as e:
        shape = list(getattr(value, "shape", []))
        raise RecordError(
            f"{key!r}: {type(value).__name__} of shape {shape} is not one element; expected one number: reduce it "
            f"first, for example with .mean() ({e})"
        ) from e


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)


def _plain(path: str, value: Any) -> Any:
    """Return a value of exactly the type None, bool, int, float or str: the encoder takes no subclasses of them."""
    if isinstance(value, str):
        return _encodable(path, value)
    if isinstance(value, float):
        return float(value)
    return value if value is None or isinstance(value, bool) else int(value)


def _param(path: str, value: Any, depth: int = 0) -> Any:
    value = _unwrap(path, value)
    if _is_plain(value):
        return _plain(path, value)
    if isinstance(value, os.PathLike):
        return _encodable(path, os.fsdecode(value))
    if depth == _MAX_DEPTH:
        raise RecordError(f"param {path[:80]!r}... is nested more than {_MAX_DEPTH} deep; convert it with str()")
    if isinstance(value, Mapping):
        return {_checked_key(key): _param(f"{path}.{key}", item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_param(f"{path}[{i}]", item, depth + 1) for i, item in enumerate(value)]
    raise RecordError(
        f"param {path!r}: {_shown(value)} is a {type(value).__name__}; expected None, bool, int, float, str, a path, "
        "or lists and dicts of these; convert it with str()"
    )


def _tag(key: str, value: Any) -> str:
    value = _unwrap(key, value)
    if _is_plain(value):
        return _encodable(key, value if isinstance(value, str) else str(value))
    raise RecordError(f"tag {key!r}: {_shown(value)} is a {type(value).__name__}; expected a str")


def _cell(where: str, value: Any) -> Any:
    value = _unwrap(where, value)
    if _is_plain(value):
        return _plain(where, value)
    raise RecordError(
        f"{where}: {_shown(value)} is a {type(value).__name__}; expected None, bool, int, float or str: use str()"
    )


def _count_values(key: str, values: Any, bins: int) -> tuple[list[float], list[float]]:
    import numpy as np  # lazy: the rest of the writer works without

    if hasattr(values, "detach"):
        values = values.detach().cpu().double()  # NumPy has no bfloat16
    try:
        counts, edges = np.histogram(np.asarray(values, dtype=np.float64).ravel(), bins=bins)
    except (ValueError, TypeError) as e:
        raise RecordError(f"log_histogram({key!r}): {e}; expected an array of finite numbers and bins >= 1") from e
    return edges.tolist(), counts.astype(np.float64).tolist()


def _histogram(key: str, edges: Sequence[float], counts: Sequence[float]) -> Histogram:
    try:
        limits = [_number(key, e) for e in edges]
        numbers = [_number(key, c) for c in counts]
    except TypeError as e:
        raise RecordError(f"log_histogram({key!r}): {e}; expected edges and counts to be lists of numbers") from e
    rising = all(a < b for a, b in itertools.pairwise(limits))
    if len(limits) != len(numbers) + 1 or not numbers or not rising or not all(map(math.isfinite, limits)):
        raise RecordError(
            f"log_histogram({key!r}): {len(limits)} edges and {len(numbers)} counts; expected n + 1 finite rising "
            "edges and n counts"
        )
    if not all(c >= 0 and math.isfinite(c) for c in numbers):
        raise RecordError(f"log_histogram({key!r}): a count is negative or not finite")
    return Histogram(key, limits, numbers)


def _too_large(payload: Payload, error: Exception) -> RecordError:
    name = type(payload).__name__
    keys = list(payload.values)[:3] if isinstance(payload, Metrics | Params | Tags) else getattr(payload, "key", "")
    return RecordError(
        f"{name} {keys!r:.200}: {error}; integers must fit into 64 bits, and large values belong into log_artifact"
    )
