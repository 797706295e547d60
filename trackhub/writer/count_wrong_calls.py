# SPDX-License-Identifier: Apache-2.0
"""Counts a log call that raises, whatever is wrong with it, so that no logging method ends a training.

The writer, the adapters and the integrations put it on their logging methods. It calls ``Writer._drop_call``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from trackhub.signal_handler_errors import raise_if_from_signal_handler

__all__ = ["counts_wrong_calls", "implemented_by", "with_counted_calls"]

_Method = TypeVar("_Method", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)
_LOG_CALLS = ("log_", "add_", "set_tag", "summarize")


def counts_wrong_calls(method: _Method) -> _Method:
    """Count the call as dropped if the method raises. The method then returns None.

    Python itself raises `TypeError` before the method begins if an argument is missing or unknown, or comes twice. So
    the method cannot catch that.

    Args:
        method: a method of a writer, or of an object with the attribute ``writer``.
    """

    @functools.wraps(method)
    def counted(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as e:  # noqa: BLE001  # a logging method never ends a training
            raise_if_from_signal_handler(e)
            writer = getattr(self, "writer", self)
            if writer._spool is not None:
                writer._drop_call(method.__name__, e)

    return counted  # type: ignore[return-value]


def with_counted_calls(cls: _Class) -> _Class:
    """Put `counts_wrong_calls` on each logging method that a class defines."""
    for name, method in list(vars(cls).items()):
        if name.startswith(_LOG_CALLS) and callable(method):
            setattr(cls, name, counts_wrong_calls(method))
    return cls


def implemented_by(function: Callable[..., Any]) -> Callable[[_Method], _Method]:
    """Return a decorator that replaces a method by a function, which keeps the method's signature and docstring.

    The function takes any arguments, and so needs no `counts_wrong_calls`, which would take 10% of the time of
    ``Writer.log``. Type checkers and ``help`` see the method.

    Args:
        function: what runs when the method is called.
    """
    return lambda method: functools.wraps(method)(function)  # type: ignore[return-value]
