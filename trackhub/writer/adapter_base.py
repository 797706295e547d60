# SPDX-License-Identifier: Apache-2.0
"""What all adapters have in common: the writer that they call, and the SDK methods for which there is no record.

`trackhub.writer.adapters` and `trackhub.writer.summary_writer` build on it. It calls `trackhub.Writer`.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

from trackhub.errors import RecordError
from trackhub.writer.plain_values import key_text
from trackhub.writer.writer import Writer

__all__ = ["AdapterBase", "first_given"]

_Value = TypeVar("_Value")
_log = logging.getLogger(__name__)


class AdapterBase:
    """Calls a writer. If trackhub has no record for a method of the imitated SDK, its calls are counted as dropped.

    Attributes:
        writer: the writer.
    """

    COUNTED: ClassVar[tuple[str, ...]] = ()
    """Names of the SDK's methods that log what no record can hold. A name that ends in ``_`` is a prefix. It stands for
    all methods that begin with it, also for methods of later SDK releases."""

    IGNORED: ClassVar[tuple[str, ...]] = ()
    """Names of the SDK's methods that log nothing. They do nothing here. A name that ends in ``_`` is a prefix, for the
    methods that are not counted."""

    def __init__(
        self, ctx: Any = None, *args: Any, writer: Writer | None = None, strict: bool = False, **kwargs: Any
    ) -> None:
        """Use a writer, by default a new one.

        Args:
            ctx: not used. FLARE's writers have this argument.
            args, kwargs: not used; the SDK's own arguments, which say where it stores.
            writer: the writer to use, such as that of ``trackhub.local``. None makes a new ``Writer``, which records
                nothing where there is no tracking.
            strict: make a new writer strict: it raises for what it cannot store, and if there is no tracking.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking, or ``TRACKHUB_MODE`` has an unknown value.
        """
        self.writer = Writer(strict=strict) if writer is None else writer
        self._counted: set[str] = set()

    def __copy__(self) -> Self:
        other = type(self).__new__(type(self))
        other.__dict__.update(self.__dict__)
        other.writer, other._counted = copy.copy(self.writer), set(self._counted)
        return other

    def flush(self) -> None:
        """Do nothing: what was logged is safe already. Call ``writer.flush`` to wait for the receiver."""

    def close(self) -> None:
        """Close the writer. What was logged is still delivered. May be called more than once."""
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __getattr__(self, name: str) -> Any:
        """Return a method of the imitated SDK for which there is no record. Python calls this for undefined names.

        Raises:
            AttributeError: the SDK has no such method, or the method is not a log call.
        """
        if not name.startswith("_"):
            if _is_one_of(name, self.COUNTED):
                return functools.partial(self._count, name)
            if _is_one_of(name, self.IGNORED):
                return _do_nothing
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _count(self, method: str, /, *args: Any, **kwargs: Any) -> None:
        """Count a call as dropped, whatever its arguments are, and warn once about this method.

        Raises:
            RecordError: only if strict.
        """
        if self.writer._spool is None:
            return
        error = f"{type(self).__name__}.{method}: trackhub has no kind of record for it"
        if self.writer._strict:
            raise RecordError(f"{error}. Log it as a metric, a text, an image, a table or an artifact")
        self.writer._spool.drop("unconvertible", "")
        if method not in self._counted:
            self._counted.add(method)
            _log.warning("%s. Its calls are counted as dropped in the delivery report, and training goes on", error)

    def _log_converted(
        self, method: str, key: Any, convert: Callable[[], _Value], log: Callable[[_Value], None]
    ) -> None:
        """Convert the arguments of a call, and log the result. A call that cannot be converted is counted.

        Args:
            method: the method that was called.
            key: the key that it was called with.
            convert: converts the arguments; may raise anything. It is not called if the writer records nothing.
            log: logs what ``convert`` returned.

        Raises:
            RecordError: only if strict.
        """
        if self.writer._spool is None:
            return
        try:
            value = convert()
        except Exception as e:  # noqa: BLE001  # no log call raises, whatever it was given
            self.writer._drop_call(method, e, key)
        else:
            log(value)

    def _log_pair(self, method: str, key: Any, value: Any, log: Callable[[dict[str, Any]], None]) -> None:
        """Log a mapping with one key. If no mapping can have this key, such as a list, count the call as dropped.

        Args:
            method: the method that was called.
            key: the key.
            value: its value.
            log: the writer's method that takes the mapping.

        Raises:
            RecordError: only if strict.
        """
        if type(key) is str:  # saves a fifth of the time of a call
            log({key: value})
        else:
            self._log_converted(method, key, lambda: {key_text(key): value}, log)


def first_given(value: Any, other_names: dict[str, Any], *names: str) -> Any:
    """Return a value. If it is None, return the argument that was given under one of the other names.

    FLARE's writers and the SDKs call the same argument by different names.

    Args:
        value: what was given under our name.
        other_names: the further keyword arguments of the call.
        names: the other names.
    """
    return value if value is not None else next((other_names[name] for name in names if name in other_names), None)


def _is_one_of(name: str, names: tuple[str, ...]) -> bool:
    return name in names or name.startswith(tuple(n for n in names if n.endswith("_")))


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing: the call configures the imitated SDK, and logs nothing."""
