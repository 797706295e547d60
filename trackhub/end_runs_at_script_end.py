# SPDX-License-Identifier: Apache-2.0
"""Ends open runs when the script ends: when the interpreter exits, and on SIGTERM and SIGHUP.

`trackhub.local_tracking` registers each run that it opens. This module handles a signal only while a run is open, and
only if the script does not handle the signal itself.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn, Protocol

__all__ = ["EndsWithScript", "is_failure", "register", "unregister"]

_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# SIGINT is not among them: Python makes a KeyboardInterrupt of it, which ends the script like any other exception.


class EndsWithScript(Protocol):
    """Something open that must end before the interpreter does."""

    def end_with_script(self, *, failed: bool) -> None:
        """End it. Blocks for a limited time, in the main thread.

        Args:
            failed: an exception or a signal ends the script.
        """


class _State:
    """What this process has open, and what to put back later.

    Attributes:
        open: what to end, in the order in which it was opened.
        handled: the signals that this module handles.
        error_before: the last uncaught exception that Python had shown when the first run was opened.
        exit_failed: True if the script called ``sys.exit`` with another status than 0. ``raise SystemExit(1)`` and the
            built-in ``exit(1)`` are not seen (ADR 0012).
        python_exit: ``sys.exit`` as it was; None while it is unchanged.
        is_registered: True if the interpreter will call ``_at_exit``.
    """

    def __init__(self) -> None:
        self.open: list[EndsWithScript] = []
        self.handled: set[signal.Signals] = set()
        self.error_before: BaseException | None = None
        self.exit_failed = False
        self.python_exit: Callable[..., NoReturn] | None = None
        self.is_registered = False


_state = _State()


def register(item: EndsWithScript) -> None:
    """End this item when the script ends, unless `unregister` is called before. Any thread may call it.

    Signals are handled only if the first call comes from the main thread: Python allows it nowhere else.
    """
    if not _state.open:
        _state.error_before, _state.exit_failed = _last_error(), False
        _watch_exit()
        _handle_signals()
    _state.open.append(item)


def unregister(item: EndsWithScript) -> None:
    """Forget this item, since it has ended. Any thread may call it.

    With the last item, ``sys.exit`` is put back. The signals are put back, too, if the main thread calls this.
    """
    with contextlib.suppress(ValueError):
        _state.open.remove(item)
    if not _state.open:
        _give_back()


def is_failure(error: BaseException | None) -> bool:
    """Return whether this exception means that the script failed. ``sys.exit()`` and ``sys.exit(0)`` do not."""
    return error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0))


def _watch_exit() -> None:
    if not _state.is_registered:
        _state.is_registered = True
        # ``atexit`` runs its functions in reverse order, and SDKs register later than this. So ``atexit`` would end an
        # SDK before its backend has delivered. Functions of `threading._register_atexit` run before ``atexit``, also in
        # reverse order. This import registers the function of the executors first, so executors still work when our
        # function runs.
        import concurrent.futures.thread  # noqa: F401

        getattr(threading, "_register_atexit", atexit.register)(_at_exit)
    if _state.python_exit is None:
        _state.python_exit = sys.exit
        sys.exit = _exit


def _exit(status: Any = None, /) -> NoReturn:
    # Python does not say to `atexit` functions with which status it exits, so note it here.
    if threading.current_thread() is threading.main_thread():
        _state.exit_failed = status not in (None, 0)
    raise SystemExit(status)


def _handle_signals() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in _SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:  # leave other handlers alone, and signals that nohup ignores
            signal.signal(number, _on_signal)
            _state.handled.add(number)


def _give_back() -> None:
    if sys.exit is _exit and _state.python_exit is not None:
        sys.exit, _state.python_exit = _state.python_exit, None
    if threading.current_thread() is threading.main_thread():
        _give_back_signals()


def _give_back_signals() -> None:
    for number in _state.handled:
        if signal.getsignal(number) is _on_signal:
            signal.signal(number, signal.SIG_DFL)
    _state.handled.clear()


def _on_signal(number: int, frame: FrameType | None) -> None:
    """End the open runs, then let the signal have its usual effect. A second signal ends the process at once."""
    _give_back_signals()  # first: otherwise a second signal would skip one run, and then wait for the next
    _end_all(failed=True)
    signal.signal(number, signal.SIG_DFL)  # again, since the script's own handler may have called this one
    os.kill(os.getpid(), number)


def _at_exit() -> None:
    # In an interactive session an exception ends a cell, not the session.
    error = None if hasattr(sys, "ps1") else _last_error()
    _end_all(failed=_state.exit_failed or (error is not None and error is not _state.error_before))


def _last_error() -> BaseException | None:
    """Return the uncaught exception that Python showed last. Python stores it before it calls ``sys.excepthook``."""
    found = getattr(sys, "last_exc", None) or getattr(sys, "last_value", None)  # `last_exc` exists since Python 3.12
    return found if isinstance(found, BaseException) else None


def _end_all(*, failed: bool) -> None:
    for item in reversed(list(_state.open)):
        item.end_with_script(failed=failed)
