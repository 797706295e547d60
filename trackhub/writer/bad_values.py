# SPDX-License-Identifier: Apache-2.0
"""Collects the values of a log call that cannot be stored, so that each costs only itself.

The modules that read the arguments of log calls put them in. `Writer` then counts them and warns of them.
"""

from __future__ import annotations

from typing import Any

from trackhub.errors import RecordError
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer.plain_values import shown, shown_error

__all__ = ["BadValues", "WrongCallError"]


class WrongCallError(RecordError):
    """The whole call is wrong, for example because its step is not a number.

    If the call is right but a value in it is bad, that value gets a plain `RecordError`.
    """


class BadValues:
    """The values of a log call that cannot be stored, each with its error.

    Attributes:
        found: the key, as text, and the error of each value.
    """

    def __init__(self, *, strict: bool) -> None:
        """Begin with no bad value.

        Args:
            strict: raise the first error, and collect none.
        """
        self.found: list[tuple[str, RecordError]] = []
        self._strict = strict

    def add(self, what: str, key: Any, error: Exception) -> None:
        """Note that the value under this key cannot be stored.

        Args:
            what: what the value is, for the message.
            key: its key.
            error: why. It may be anything that the value's own methods raise.

        Raises:
            RecordError: only if ``strict``.
            Exception: a signal handler of the script raised it.
        """
        raise_if_from_signal_handler(error)
        if not isinstance(error, RecordError):
            cause = error
            error = RecordError(f"{what} {shown(key)} cannot be read: {type(cause).__name__}: {shown_error(cause)}")
            error.__cause__ = cause
        if self._strict:
            raise error
        self.found.append((shown(key), error))
