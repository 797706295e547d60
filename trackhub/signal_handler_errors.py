# SPDX-License-Identifier: Apache-2.0
"""Tells the errors of the script's signal handlers from all other errors that a log call meets.

For example, a script limits its time with a handler that raises ``TimeoutError``. The handler may interrupt a log call.
Its error is not about a value or a disk, and must reach the script. Code that catches errors in a log call asks here
first.
"""

from __future__ import annotations

import sys
from types import CodeType, FrameType

__all__ = ["find_signal_handler_error", "raise_if_from_signal_handler"]

_HAS_VARARGS = 0x04  # CO_VARARGS: the function has an argument such as ``*args``


def raise_if_from_signal_handler(error: BaseException) -> None:
    """Raise the error of a signal handler if this error is one, or was raised because of one. Call it in ``except``.

    Args:
        error: the error that was caught.

    Raises:
        BaseException: a signal handler of the script raised it.
    """
    found = find_signal_handler_error(error)
    if found is None:
        return
    context = found.__context__
    try:
        raise found
    finally:
        found.__context__ = context  # otherwise the script's traceback would show our error as its origin
        del found, context, error  # its traceback has this frame, and nothing in it would be freed


def find_signal_handler_error(error: BaseException) -> BaseException | None:
    """Return the error that a signal handler raised while it interrupted the code that caught ``error``.

    It is ``error`` itself, or an error because of which ``error`` was raised. None if no handler is involved. What a
    debugger raises counts as well, such as ``BdbQuit``: it also interrupts code between two steps.

    Args:
        error: the error that was caught.
    """
    callers: set[FrameType] | None = None
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        trace = one.__traceback__
        if one is not error and trace is not None:
            callers = _callers() if callers is None else callers
            if trace.tb_frame in callers:
                continue  # the script caught it before it made this call, for example after its time limit
        # The first frame is that of the ``except`` clause, and never that of the handler. It may still run. Reading its
        # locals would tie the error to itself, and nothing that the error holds would be freed.
        while trace is not None and (trace := trace.tb_next) is not None:
            if _is_handler(trace.tb_frame):
                return one
        waiting += (one.__context__, one.__cause__)
    return None


def _callers() -> set[FrameType]:
    """Return the frames of all functions outside the log call's ``except`` clause that asks."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code in _OWN:
        frame = frame.f_back
    found = set()
    while frame is not None and (frame := frame.f_back) is not None:
        found.add(frame)
    return found


def _is_handler(frame: FrameType) -> bool:
    """Return whether this frame is that of a signal handler: Python hands it the frame of what it interrupts.

    That holds for a function, a method and a ``functools.partial``, and after a handler has unregistered itself.
    """
    code, interrupted = frame.f_code, frame.f_back
    count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & _HAS_VARARGS)
    if interrupted is None or not count:
        return False
    values = frame.f_locals
    for name in code.co_varnames[:count]:
        value = values.get(name)
        if value is interrupted or (type(value) is tuple and any(one is interrupted for one in value)):
            return True
    return False


_OWN: frozenset[CodeType] = frozenset(
    function.__code__ for function in (raise_if_from_signal_handler, find_signal_handler_error, _callers)
)
