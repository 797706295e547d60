# SPDX-License-Identifier: Apache-2.0
"""Captures W&B: ``wandb.init(config=...)``, ``run.config``, ``run.summary``, ``run.log`` and further methods that log.

`Capture` calls it with W&B's modules. A call of ``log`` without a step gets the step that W&B gives it. What a script
puts into the summary gets keys such as ``summary/best``, so that it does not become a point of the curve ``best``.
"""

from __future__ import annotations

import functools
import inspect
import io
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

from trackhub.flare.trainer.capture.wrap_sdk_functions import CapturedCalls, Replacements
from trackhub.mark_own_threads import is_own_thread
from trackhub.writer.adapters import WandBWriter
from trackhub.writer.writer import Writer

__all__ = ["MODULES", "capture", "watch"]

_INIT, _RUN, _NOOP = "wandb.sdk.wandb_init", "wandb.sdk.wandb_run", "wandb.sdk.lib.noop_run"
_CONFIG, _SUMMARY, _NO_SUMMARY = "wandb.sdk.wandb_config", "wandb.sdk.wandb_summary", "wandb.sdk.lib.disabled"
MODULES = (_INIT, _RUN, _NOOP, _CONFIG, _SUMMARY, _NO_SUMMARY)
"""The modules that define what a script calls. ``_NOOP`` and ``_NO_SUMMARY`` are for runs with ``mode="disabled"``."""

_FILES = ("log_artifact", "log_model")
_WITHOUT_RECORD = ("alert", "log_code", "save", "watch")
"""Further methods of a run that log. `WandBWriter` has the same methods. It counts a call that no record can hold."""

_own_runs: weakref.WeakSet[Any] = weakref.WeakSet()
_steps: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()


def capture(module: ModuleType, calls: CapturedCalls, replaced: Replacements) -> None:
    """Record the calls of a module's functions.

    Args:
        module: one of `MODULES`.
        calls: makes the wrappers.
        replaced: puts them into the module.
    """
    writer = calls.writer
    match module.__name__:
        case name if name == _INIT:
            _replace_init(module, functools.partial(_init, calls), replaced)
        case name if name in (_RUN, _NOOP):
            run = module.Run if name == _RUN else module.NoopRun
            _replace_method(run, "log", functools.partial(_log, writer), calls, replaced)
            adapter = WandBWriter(writer=writer)
            for name in (*_FILES, *_WITHOUT_RECORD):
                # With ``capture_only`` the run is disabled, but these methods must still return an object.
                _replace_method(
                    run, name, functools.partial(_call, getattr(adapter, name)), calls, replaced, goes_on=True
                )
        case name if name == _CONFIG:
            _wrap(module.Config, calls, replaced, functools.partial(_log_config, writer))
        case name if name == _SUMMARY:
            _wrap(module.SummaryDict, calls, replaced, functools.partial(_log_summary, writer), "update")
        case _:
            _wrap(module.SummaryDisabled, calls, replaced, functools.partial(_log_summary, writer))


def _replace_method(
    run: Any,
    name: str,
    record: Callable[..., Any],
    calls: CapturedCalls,
    replaced: Replacements,
    *,
    goes_on: bool = False,
) -> None:
    if (original := vars(run).get(name)) is not None:
        instead = original if goes_on else None
        wrapped = calls.wrap(original, record, instead=instead, is_own=lambda run, *a, **k: run in _own_runs)
        replaced.replace(run, name, wrapped)


def _call(log: Callable[..., Any], _: Any, *args: Any, **kwargs: Any) -> None:
    log(*args, **kwargs)


def watch(module: ModuleType, note: Callable[[], None], replaced: Replacements) -> None:
    """Call ``note`` when the script begins a W&B run.

    Args:
        module: one of `MODULES`.
        note: called in each call of ``wandb.init``, before W&B's own function.
        replaced: puts the wrapper into the module.
    """

    def init(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not is_own_thread():
            note()
        return original(*args, **kwargs)

    if module.__name__ == _INIT:
        _replace_init(module, init, replaced)


def _replace_init(module: ModuleType, call: Callable[..., Any], replaced: Replacements) -> None:
    """Replace ``wandb.init`` in its module, and also in the packages that have imported it already."""
    original = module.init
    init = functools.wraps(original)(functools.partial(call, original))
    for owner in (module, sys.modules.get("wandb.sdk"), sys.modules.get("wandb")):
        if owner is not None and vars(owner).get("init") is original:
            replaced.replace(owner, "init", init)


def _init(calls: CapturedCalls, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if calls.is_left_alone():
        run = original(*args, **kwargs)
        if is_own_thread() and run is not None:
            _own_runs.add(run)
        return run
    if calls.only:
        try:
            bound = inspect.signature(original).bind(*args, **kwargs)
        except TypeError:
            return original(*args, **kwargs)  # it raises the same error as without tracking
        bound.arguments["mode"] = "disabled"
        args, kwargs = bound.args, bound.kwargs
    # `init` itself sets entries of the config, some of them several times. So the config is read once, after `init` has
    # returned.
    run = calls.quietly(original, *args, **kwargs)
    calls.attempt(original, lambda: _log_config(calls.writer, None, dict(run.config.items())))
    return run


def _wrap(of: Any, calls: CapturedCalls, replaced: Replacements, record: Callable[..., Any], *names: str) -> None:
    """Wrap the methods by which a script sets entries of a config or summary."""
    for name in names or ("update", "setdefaults", "__setitem__", "__setattr__"):
        if (original := getattr(of, name, None)) is not None:
            replaced.replace(of, name, calls.wrap(original, record, instead=original))


def _log_config(writer: Writer, _: Any, key: Any, *value: Any, **more: Any) -> None:
    """Record entries of a config. They become params. Most backends keep only the first value of a param."""
    entries = _entries(key, value)
    writer.log_params({k: v for k, v in entries.items() if not str(k).startswith("_")})


def _log_summary(writer: Writer, _: Any, key: Any, *value: Any, **more: Any) -> None:
    """Record entries of a summary: texts and None as tags, all others as metrics without a step.

    The writer counts what cannot be a metric.
    """
    numbers, others = dict[str, Any](), dict[str, Any]()
    for name, entry in _entries(key, value).items():
        (others if isinstance(entry, str) or entry is None else numbers)[f"summary/{name}"] = entry
    if numbers:
        writer.log(numbers)
    if others:
        writer.set_tags(others)


def _entries(key: Any, value: tuple[Any, ...]) -> Mapping[Any, Any]:
    """Return the entries that ``update(mapping)`` or ``__setitem__(key, value)`` set."""
    if value and isinstance(key, str):
        return {key: value[0]}
    return key if isinstance(key, Mapping) else vars(key)


def _log(
    writer: Writer, run: Any, data: Mapping[str, Any], step: int | None = None, commit: bool | None = None, **more: Any
) -> None:
    """Record a call of ``run.log``: its numbers as one record, and its texts and media as one record each.

    A value that no record can hold is counted.
    """
    # W&B's own counter, as it is before this call. A disabled run has no counter.
    before = getattr(run, "_local_step", None)
    before = _steps.get(run, 0) if before is None else before
    current = before if step is None else int(step)
    _steps[run] = max(before, current) + int(commit or (step is None and commit is None))
    numbers = {}
    for key, value in _flat(data):
        if isinstance(value, str):
            writer.log_text(key, value, current)
        elif _is_media(value) or (isinstance(value, list | tuple) and value and all(map(_is_media, value))):
            for name, item in _named(key, value):
                _log_media(writer, name, item, current)
        else:
            numbers[key] = value
    if numbers:
        writer.log(numbers, current)


def _flat(data: Mapping[Any, Any], prefix: str = "") -> Iterator[tuple[Any, Any]]:
    """Yield the entries of a call. The entries of a nested dict get keys such as ``eval/image``."""
    for key, value in data.items():
        name = f"{prefix}{key}" if prefix else key
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/")
        else:
            yield name, value


def _is_media(value: Any) -> bool:
    return type(value).__module__.partition(".")[0] == "wandb" or hasattr(value, "savefig")


def _named(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield (f"{key}/{i}" if len(value) > 1 else key), item
    else:
        yield key, value


def _log_media(writer: Writer, key: str, value: Any, step: int) -> None:
    """Record one of W&B's media, or a figure of matplotlib. A value that no record can hold is counted."""
    kinds = {cls.__name__ for cls in type(value).__mro__ if cls.__module__.startswith("wandb.")}
    if hasattr(value, "savefig"):
        png = io.BytesIO()
        value.savefig(png, format="png")
        writer.log_image(key, png.getvalue(), step)
    elif "Image" in kinds:
        writer.log_image(key, value.image or value._path, step, caption=str(getattr(value, "_caption", "") or ""))
    elif "Histogram" in kinds:
        writer.log_histogram(key, step=step, edges=list(value.bins), counts=list(value.histogram))
    elif "Table" in kinds:
        writer.log_table(key, [str(column) for column in value.columns], value.data, step)
    else:
        # The other values of the call are recorded, so this does not raise.
        writer.count_unconvertible(f"{key!r}: trackhub has no kind of record for a {type(value).__name__}")
