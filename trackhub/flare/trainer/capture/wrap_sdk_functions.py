# SPDX-License-Identifier: Apache-2.0
"""Wraps an SDK's functions, so that each call of the script writes a record.

The modules for single SDKs call it. An error in a wrapper does not reach the script: it is counted, with one warning.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

from trackhub.errors import RecordError
from trackhub.mark_own_threads import is_own_thread
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.plain_values import shown_error
from trackhub.writer.writer import Writer

__all__ = ["CapturedCalls", "Replacements"]

_MAX_WARNINGS = 20  # how many different warnings; each may name a key, and there may be many keys
_MISSING = object()


class Replacements:
    """Functions that were replaced in modules and classes. ``undo`` puts back what was there."""

    def __init__(self) -> None:
        self._done: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute of a module or class.

        Args:
            owner: the module or class.
            name: the attribute's name.
            value: its new value.
        """
        self._done.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def add(self, others: Replacements) -> None:
        """Take over what another object has replaced."""
        self._done += others._done

    def undo(self) -> None:
        """Put back what was there before."""
        while self._done:
            owner, name, old = self._done.pop()
            if old is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)


class CapturedCalls:
    """Makes the wrappers of one process. Thread-safe.

    A wrapper records the script's calls only. All other calls go to the SDK unrecorded: calls in trackhub's own
    threads, calls of objects that these threads made, and calls that the SDK makes inside a recorded call.

    Attributes:
        writer: writes the records.
        only: the calls are recorded, and the SDK does nothing.
    """

    def __init__(self, writer: Writer, warn: Callable[[str], None], *, only: bool) -> None:
        """Prepare the wrappers.

        Args:
            writer: writes the records. This object does not close it.
            warn: called with the text of each warning, once for each text.
            only: record the calls, and let the SDK do nothing.
        """
        self.writer = writer
        self.only = only
        self._warn = warn
        self._warned: set[str] = set()
        self._inside = threading.local()

    def is_left_alone(self) -> bool:
        """Return True if trackhub makes the present call, or if the SDK makes it inside another call."""
        return getattr(self._inside, "busy", False) or is_own_thread()

    def wrap(
        self,
        original: Callable[..., Any],
        record: Callable[..., Any],
        *,
        instead: Callable[..., Any] | None = None,
        is_own: Callable[..., bool] | None = None,
    ) -> Callable[..., Any]:
        """Return a replacement for a function of the SDK. It writes a record, and then calls the SDK's function.

        Args:
            original: the SDK's function.
            record: called with the same arguments. It may raise anything.
            instead: with ``only``, what to call in place of ``original``. By default a function that returns None.
            is_own: called with the same arguments; says whether the called object is trackhub's own.
        """
        inside, end = self._inside, (instead or _nothing) if self.only else original

        @functools.wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.is_left_alone() or (is_own is not None and is_own(*args, **kwargs)):
                return original(*args, **kwargs)
            inside.busy = True
            try:
                self.attempt(original, record, *args, **kwargs)
                return end(*args, **kwargs)
            finally:
                inside.busy = False

        return call

    def quietly(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a function of the SDK. What the SDK logs meanwhile is not recorded.

        Args:
            function: the function.
            args, kwargs: its arguments.
        """
        before, self._inside.busy = getattr(self._inside, "busy", False), True
        try:
            return function(*args, **kwargs)
        finally:
            self._inside.busy = before

    def attempt(self, about: Callable[..., Any], record: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Write a record, or count the call if it cannot be recorded.

        There is one warning for each function and type of error.

        Args:
            about: the SDK's function, for the message.
            record: called with the further arguments.
            args, kwargs: the arguments of the script's call.

        Raises:
            Exception: a signal handler of the script raised it.
        """
        try:
            record(*args, **kwargs)
        except Exception as e:  # the script must go on, whatever it has logged
            raise_if_from_signal_handler(e)
            name = getattr(about, "__qualname__", repr(about))
            detail = str(e) if isinstance(e, RecordError) else f"{type(e).__name__}: {shown_error(e, 200)}"
            self.writer.count_unconvertible(f"{name}: {detail}")
            if (kind := f"{name} {type(e).__name__}") not in self._warned and len(self._warned) < _MAX_WARNINGS:
                self._warned.add(kind)
                self._warn(
                    f"trackhub captured no record of a call of {name}: {detail}. It is counted as dropped, and the "
                    "script goes on. Further calls like it are counted without a warning"
                )


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing, in place of the SDK."""
