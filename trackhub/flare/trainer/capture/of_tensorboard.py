# SPDX-License-Identifier: Apache-2.0
"""Captures the ``SummaryWriter`` of torch and tensorboardX. `Capture` calls it with the modules that define one.

The loggers of Lightning and Hugging Face use a ``SummaryWriter``, too.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

from trackhub.errors import RecordError
from trackhub.flare.trainer.capture.wrap_sdk_functions import CapturedCalls, Replacements
from trackhub.mark_own_threads import is_own_thread
from trackhub.writer.adapters import SummaryWriter

__all__ = ["MODULES", "capture", "watch"]

MODULES = ("torch.utils.tensorboard.writer", "tensorboardX.writer")
"""The modules that define a ``SummaryWriter``."""


def capture(module: ModuleType, calls: CapturedCalls, replaced: Replacements) -> None:
    """Record the calls of a module's ``SummaryWriter``: of all its objects, and of its subclasses.

    Args:
        module: one of `MODULES`.
        calls: makes the wrappers.
        replaced: puts them into the module.
    """
    writer_class, adapter = module.SummaryWriter, SummaryWriter(writer=calls.writer)
    own: weakref.WeakSet[Any] = weakref.WeakSet()

    def is_own(writer: Any, *args: Any, **kwargs: Any) -> bool:
        return writer in own

    for name, method in list(vars(writer_class).items()):
        if name.startswith("add_") and isinstance(method, FunctionType):
            record = functools.partial(_record, getattr(adapter, name, None), name)
            replaced.replace(writer_class, name, calls.wrap(method, record, is_own=is_own))

    make, get_file = writer_class.__init__, writer_class._get_file_writer

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if is_own_thread():
            own.add(self)
        make(self, *args, **kwargs)

    @functools.wraps(get_file)
    def _get_file_writer(self: Any) -> Any:
        return get_file(self) if is_own_thread() or self in own else _NoFile()

    replaced.replace(writer_class, "__init__", __init__)
    if calls.only:
        replaced.replace(writer_class, "_get_file_writer", _get_file_writer)


def _record(log: Callable[..., Any] | None, name: str, _: Any, *args: Any, **kwargs: Any) -> None:
    if log is None:
        raise RecordError("trackhub has no kind of record for it")
    log(*args, **kwargs)


def watch(module: ModuleType, note: Callable[[], None], replaced: Replacements) -> None:
    """Call ``note`` when the script makes a ``SummaryWriter``.

    Args:
        module: one of `MODULES`.
        note: called in each such call.
        replaced: puts the wrapper into the module.
    """
    make = module.SummaryWriter.__init__

    @functools.wraps(make)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        if not is_own_thread():
            note()
        make(self, *args, **kwargs)

    replaced.replace(module.SummaryWriter, "__init__", __init__)


class _NoFile:
    """Takes the place of the object that writes event files. It writes nothing."""

    def __getattr__(self, name: str) -> Callable[..., str]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: ""
