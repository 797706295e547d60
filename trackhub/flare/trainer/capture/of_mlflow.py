# SPDX-License-Identifier: Apache-2.0
"""Captures MLflow's log functions: the fluent ones (``mlflow.log_metric``), and those of ``MlflowClient``.

`Capture` calls it with each of these modules. The loggers of Lightning and Hugging Face call the functions in them, and
so does MLflow's autologging.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from trackhub.errors import RecordError
from trackhub.flare.trainer.capture.wrap_sdk_functions import CapturedCalls, Replacements
from trackhub.mark_own_threads import is_own_thread
from trackhub.writer.adapters import MLflowWriter

__all__ = ["MODULES", "capture", "watch"]

_FLUENT, _CLIENT = "mlflow.tracking.fluent", "mlflow.tracking.client"
MODULES = (_FLUENT, _CLIENT)
"""The modules that define log functions."""

_ARGUMENTS = {
    "log_metric": ("key", "value", "step"),
    "log_metrics": ("metrics", "step"),
    "log_param": ("key", "value"),
    "log_params": ("params",),
    "set_tag": ("key", "value"),
    "set_tags": ("tags",),
    "log_text": ("text", "artifact_file"),
    "log_dict": ("dictionary", "artifact_file"),
    "log_figure": ("figure", "artifact_file"),
    "log_image": ("image", "artifact_file", "key", "step"),
    "log_table": ("data", "artifact_file"),
    "log_artifact": ("local_path", "artifact_path"),
    "log_artifacts": ("local_dir", "artifact_path"),
}
"""Log function -> the arguments to pass to the adapter, in this order."""

_WITHOUT_RECORD = ("log_stream", "log_input", "log_inputs", "log_outputs")
_ASYNC = "mlflow.utils.async_logging.run_operations"  # MLflow's modules with log functions import it
_OWN_TAGS = "mlflow."  # tags that MLflow sets itself


def capture(module: ModuleType, calls: CapturedCalls, replaced: Replacements) -> None:
    """Record the calls of a module's log functions.

    Args:
        module: one of `MODULES`.
        calls: makes the wrappers.
        replaced: puts them into the module.
    """
    adapter = MLflowWriter(writer=calls.writer)
    owner: Any = module if module.__name__ == _FLUENT else module.MlflowClient
    own_runs: set[str] = set()
    for name in [*_ARGUMENTS, *_WITHOUT_RECORD, "log_batch"]:
        if (original := vars(owner).get(name)) is None:
            continue
        arguments = functools.partial(_given, inspect.signature(original))
        log = functools.partial(_record, adapter, name)
        _replace(
            replaced,
            owner,
            name,
            calls.wrap(
                original,
                lambda *args, log=log, arguments=arguments, **kwargs: log(arguments(*args, **kwargs)),
                instead=lambda *args, arguments=arguments, **kwargs: _answer(arguments(*args, **kwargs)),
                is_own=lambda *args, arguments=arguments, **kwargs: (
                    bool(own_runs) and arguments(*args, **kwargs).get("run_id") in own_runs
                ),
            ),
        )
    if owner is not module:
        _note_own_runs(owner, own_runs, replaced)


def _given(signature: inspect.Signature, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError:
        return {}  # MLflow raises the error


def _answer(given: Mapping[str, Any]) -> Any:
    """Return what MLflow would return: a param's value, or an object to wait for after an asynchronous call."""
    if given.get("synchronous") is False:
        return sys.modules[_ASYNC].RunOperations([])
    return given.get("value") if {"key", "value", "step"} & given.keys() == {"key", "value"} else None


def _record(adapter: MLflowWriter, name: str, given: Mapping[str, Any]) -> None:
    if name == "log_batch":
        _record_batch(adapter, given)
    elif (log := getattr(adapter, name, None)) is None or name in _WITHOUT_RECORD:
        raise RecordError("trackhub has no kind of record for it")
    elif given:
        log(*(given.get(argument) for argument in _ARGUMENTS[name] if argument in given or argument != "artifact_path"))


def _record_batch(adapter: MLflowWriter, given: Mapping[str, Any]) -> None:
    by_step: defaultdict[Any, dict[str, float]] = defaultdict(dict)
    for metric in given.get("metrics", ()):
        if metric.key in by_step[metric.step]:  # a metric twice in one step makes two records
            adapter.log_metrics(by_step.pop(metric.step), metric.step)
        by_step[metric.step][metric.key] = metric.value
    for step, metrics in by_step.items():
        adapter.log_metrics(metrics, step)
    if params := {param.key: param.value for param in given.get("params", ())}:
        adapter.log_params(params)
    if tags := {tag.key: tag.value for tag in given.get("tags", ()) if not tag.key.startswith(_OWN_TAGS)}:
        adapter.set_tags(tags)


def _note_own_runs(client: Any, own_runs: set[str], replaced: Replacements) -> None:
    """Remember the runs that trackhub's own threads create."""
    create = client.create_run

    @functools.wraps(create)
    def create_run(*args: Any, **kwargs: Any) -> Any:
        run = create(*args, **kwargs)
        if is_own_thread():
            own_runs.add(run.info.run_id)
        return run

    replaced.replace(client, "create_run", create_run)


def watch(module: ModuleType, note: Callable[[], None], replaced: Replacements) -> None:
    """Call ``note`` when the script logs with MLflow.

    Args:
        module: one of `MODULES`.
        note: called in each such call.
        replaced: puts the wrappers into the module.
    """
    owner: Any = module if module.__name__ == _FLUENT else module.MlflowClient
    for name in ("log_metric", "log_metrics", "log_param", "log_params", "log_batch"):
        if original := vars(owner).get(name):

            @functools.wraps(original)
            def log(*args: Any, original: Callable[..., Any] = original, **kwargs: Any) -> Any:
                if not is_own_thread():
                    note()
                return original(*args, **kwargs)

            _replace(replaced, owner, name, log)


def _replace(replaced: Replacements, owner: Any, name: str, value: Any) -> None:
    """Replace a function in its module, and also in the package ``mlflow`` if that has imported it already."""
    package = sys.modules.get("mlflow")
    if isinstance(owner, ModuleType) and package is not None and vars(package).get(name) is getattr(owner, name):
        replaced.replace(package, name, value)
    replaced.replace(owner, name, value)
