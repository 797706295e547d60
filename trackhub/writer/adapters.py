# SPDX-License-Identifier: Apache-2.0
"""Adapters: writers with the method names of W&B, MLflow and TensorBoard, so that a script changes one import.

They take the calls of the writers in ``nvflare.client.tracking``, and the calls of the SDKs themselves::

    from trackhub.writer import WandBWriter     # was: from nvflare.client.tracking import WandBWriter

    WandBWriter().log({"train_loss": loss}, step)

Each adapter calls a `trackhub.Writer`, so its records go to every backend of the job. A bad argument is counted, and
raises `RecordError` only if the writer is strict. New code should use `trackhub.Writer`.
"""

from __future__ import annotations

import json
import os
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from trackhub.errors import RecordError
from trackhub.signal_handler_errors import raise_if_from_signal_handler
from trackhub.writer import convert_figures_and_tables
from trackhub.writer.adapter_base import AdapterBase, first_given
from trackhub.writer.bounded_reading import Budget
from trackhub.writer.count_wrong_calls import counts_wrong_calls, with_counted_calls
from trackhub.writer.plain_values import as_mapping, shown
from trackhub.writer.read_artifact import read_artifact
from trackhub.writer.summary_writer import SummaryWriter
from trackhub.writer.wandb_values import log_values

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class _Values(Mapping[str, Any]):
    """Takes values as ``wandb.config`` and ``wandb.summary`` do: as items, as attributes and with ``update``."""

    def __init__(self, log: Callable[[Any], None], values: Mapping[str, Any] | None = None) -> None:
        """Log through ``log`` what is set from now on. The given values are there already."""
        self.__dict__.update(_log=log, _values=dict(values or {}))

    def __getitem__(self, key: str) -> Any:
        return self.__dict__["_values"][key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.update({key: value})

    def __iter__(self) -> Iterator[str]:
        return iter(self.__dict__["_values"])

    def __len__(self) -> int:
        return len(self.__dict__["_values"])

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["_values"][name]
        except KeyError:
            raise AttributeError(f"there is no value {name!r}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        self.update({name: value})

    def update(self, values: Any = None, /, *args: Any, **kwargs: Any) -> None:
        """Log values.

        Args:
            values: a mapping, or an object with fields, such as an ``argparse.Namespace``. W&B calls it ``d``.
            args, kwargs: W&B's further arguments, without effect.
        """
        values = first_given(values, kwargs, "values", "d")
        self.__dict__["_log"](values)
        try:
            self.__dict__["_values"].update(as_mapping(values, has_fields=True) or {})
        except Exception as e:  # noqa: BLE001  # the log call has counted what cannot be read
            raise_if_from_signal_handler(e)

    def setdefaults(self, values: Any = None, /, *args: Any, **kwargs: Any) -> None:
        """Log the values that are not there yet.

        Args:
            values: a mapping. W&B calls it ``d``.
            args, kwargs: W&B's further arguments, without effect.
        """
        values = first_given(values, kwargs, "values", "d")
        try:
            new: Any = {key: value for key, value in values.items() if key not in self}
        except Exception as e:  # noqa: BLE001  # the log call counts what cannot be read
            raise_if_from_signal_handler(e)
            new = values
        self.update(new)


@with_counted_calls
class WandBWriter(AdapterBase):
    """Has the methods of a W&B run, with the arguments of FLARE's writer and of W&B's. No method raises, unless strict.

    trackhub has no record for some methods, such as ``watch``. Their calls are counted as dropped, and each such method
    warns once.

    Attributes:
        config: takes hyperparameters, as ``wandb.config`` does.
        summary: takes final values, as ``wandb.run.summary`` does.
    """

    COUNTED = (
        "alert", "finish_artifact", "link_", "log_", "restore", "save", "upsert_artifact", "use_", "watch", "write_",
    )  # fmt: skip
    IGNORED = ("define_metric", "display", "mark_preempting", "pin_config_keys", "status", "to_html", "unwatch")

    def __init__(self, ctx: Any = None, *args: Any, **kwargs: Any) -> None:
        """Use a writer, by default a new one.

        Args:
            ctx: not used; FLARE's context, or W&B's entity.
            args: not used; what ``wandb.init`` takes.
            kwargs: ``writer`` and ``strict`` as for all adapters. Of what ``wandb.init`` takes, ``config`` is logged as
                hyperparameters and ``tags`` as tags. The config may be whatever ``Writer.log_params`` takes.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking, or ``TRACKHUB_MODE`` has an unknown value.
            RecordError: ``strict`` is set, and ``config`` or ``tags`` cannot be stored.
        """
        config, tags = kwargs.pop("config", None), kwargs.pop("tags", None)
        super().__init__(ctx, **kwargs)
        self.config = _Values(self.writer.log_params)
        self.summary = _Values(self.writer.summarize)
        if config is not None:
            self.config.update(config)
        if tags is not None:
            self._log_converted(
                "tags",
                "tags",
                lambda: dict.fromkeys([tags] if isinstance(tags, str) else Budget("tags").each(tags), "true"),
                self.writer.set_tags,
            )

    def __copy__(self) -> Self:
        other = super().__copy__()
        # Otherwise the copy's values would be logged by the first writer, and dropped once that one is closed.
        other.config = _Values(other.writer.log_params, self.config)
        other.summary = _Values(other.writer.summarize, self.summary)
        return other

    @counts_wrong_calls
    def log(
        self,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
        commit: bool | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log scalars as one record, and figures, texts, images, histograms and tables as one record each.

        Args:
            metrics: as for ``Writer.log``. W&B calls it ``data``. A value may also be a text, a figure, an image of
                Pillow, a DataFrame, or W&B's own ``Image``, ``Histogram``, ``Table``, ``Html`` or chart of
                ``wandb.plot``, which becomes its table. An array becomes a histogram. The values of a list get keys
                such as ``samples/0``, and so do the images in a table.
            step: the step.
            commit: without effect. Each call makes records of its own, even if several calls have the same step.
            args: without effect.
            kwargs: W&B's other names.
        """
        log_values(self.writer, first_given(metrics, kwargs, "data"), step)

    def log_artifact(
        self,
        artifact_or_path: Any,
        name: str | None = None,
        type: str | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log a file, each file in a folder, or the local files of a ``wandb.Artifact``.

        Args:
            artifact_or_path: the file, the folder or the artifact.
            name: its name in the run.
            type: what it is, such as ``model``.
            args, kwargs: W&B's further arguments (``aliases``, ``tags``), without effect.
        """
        self._log_converted(
            "log_artifact", name, lambda: _local_files(artifact_or_path, name, type or "file"), self._log_files
        )

    def log_model(self, path: Any, name: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Log a file, or each file in a folder, as a model.

        Args:
            path: the file or the folder.
            name: its name in the run.
            args, kwargs: W&B's further arguments, without effect.
        """
        self.log_artifact(path, name, "model")

    def finish(self, *args: Any, **kwargs: Any) -> None:
        """Close the writer, as ``close`` does."""
        self.close()

    def _log_files(self, files: list[tuple[Any, str | None, str]]) -> None:
        for path, name, kind in files:
            self.writer.log_artifact(path, name, kind)


def _local_files(artifact_or_path: Any, name: str | None, kind: str) -> list[tuple[Any, str | None, str]]:
    """Return path, name in the run and type of a file, or of each file in a folder or a ``wandb.Artifact``.

    Args:
        artifact_or_path: the file, the folder or the artifact.
        name: the name of a file or a folder.
        kind: the type of a file. An artifact has a name and a type of its own.

    Raises:
        RecordError: the artifact has no local files, or there is no file in the folder.
    """
    artifact = artifact_or_path
    if (manifest := getattr(artifact, "manifest", None)) is None:
        if not os.path.isdir(artifact_or_path):
            return [(artifact_or_path, name, kind)]
        found = _files_below(artifact_or_path, name or Path(artifact_or_path).resolve().name)
        return [(path, f"{folder}/{path.name}", kind) for path, folder in found]
    name, kind = str(artifact.name).partition(":")[0], str(artifact.type)
    entries = manifest.entries.items()
    files: list[tuple[Any, str | None, str]] = [
        (entry.local_path, f"{name}/{path}", kind) for path, entry in entries if entry.local_path
    ]
    if not files:
        raise RecordError(f"log_artifact: the artifact {name!r} has no local files; add one with add_file first")
    return files


@with_counted_calls
class MLflowWriter(AdapterBase):
    """Has the methods of MLflow's fluent API, with the arguments of FLARE's writer and of MLflow's.

    If values of a key have no ``step`` and the backend needs one, they get the steps 0, 1, 2, ... No method raises,
    unless strict. trackhub has no record for some methods, such as ``log_trace``. Their calls are counted as dropped,
    and each such method warns once. ``run_id``, ``timestamp`` and the like have no effect: a site has one run, and the
    time of a record is the time of the call.
    """

    COUNTED = (
        "delete_tag", "log_", "set_experiment_tag", "set_experiment_tags", "set_logged_model_tags",
        "set_model_version_tag", "set_trace_tag",
    )  # fmt: skip
    IGNORED = ("autolog", "disable_", "enable_", "end_run", "set_")

    def start_run(self, *args: Any, **kwargs: Any) -> _SameRun:
        """Return a context manager that does nothing: the site's run exists already, and the job ends it."""
        return _SameRun()

    def log_param(self, key: str, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Log one hyperparameter, and return it. A value that a param cannot hold is logged as its text.

        Args:
            key: its key.
            value: its value.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self._log_pair("log_param", key, value, self.writer.log_params)
        return value

    def log_params(self, values: Mapping[str, Any] | None = None, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters, as ``log_param`` does. An empty mapping logs nothing.

        Args:
            values: key to value. MLflow calls it ``params``.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self.writer.log_params(first_given(values, kwargs, "params"))

    def log_metric(
        self, key: str | None = None, value: Any = None, step: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Log one scalar.

        Args:
            key: its key.
            value: its value.
            step: the step.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self._log_pair("log_metric", key, value, lambda pair: self.writer.log(pair, step))

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Log scalars as one record. An empty mapping logs nothing.

        Args:
            metrics: key to value.
            step: the step.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self.writer.log(metrics, step)

    def log_text(self, text: str, artifact_file_path: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Log a text. The path is its key.

        Args:
            text: the text.
            artifact_file_path: the path. MLflow calls it ``artifact_file``.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self.writer.log_text(first_given(artifact_file_path, kwargs, "artifact_file"), text)

    def log_dict(self, dictionary: Any, artifact_file: str, *args: Any, **kwargs: Any) -> None:
        """Log a dictionary as the text of a JSON document. The path is its key.

        Args:
            dictionary: what to log.
            artifact_file: the path.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self._log_converted(
            "log_dict",
            artifact_file,
            lambda: json.dumps(dictionary, indent=2, default=str),
            lambda text: self.writer.log_text(artifact_file, text),
        )

    def log_figure(
        self, figure: Any, artifact_file: str, *, save_kwargs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Log a figure of matplotlib as an image, and one of plotly as ``Writer.log_figure`` does. The path is its key.

        Args:
            figure: the figure.
            artifact_file: the path.
            save_kwargs: further arguments of matplotlib's ``savefig``.
            kwargs: without effect.
        """
        if not hasattr(figure, "savefig") and hasattr(figure, "to_html"):  # plotly's
            self.writer.log_figure(str(artifact_file).removesuffix(".html"), figure)
            return
        self._log_converted(
            "log_figure",
            artifact_file,
            lambda: convert_figures_and_tables.figure_png(figure, save_kwargs),
            lambda png: self.writer.log_image(artifact_file, png),
        )

    def log_image(
        self,
        image: Any,
        artifact_file: str | None = None,
        key: str | None = None,
        step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log an image under its key, or under its path.

        Args:
            image: as for ``Writer.log_image``, or an ``mlflow.Image``.
            artifact_file: the path.
            key: the key.
            step: the step.
            args, kwargs: MLflow's further arguments, without effect.
        """
        name = artifact_file if key is None else key
        self._log_converted(
            "log_image",
            name,
            lambda: image.to_pil() if str(type(image).__module__).startswith("mlflow.") else image,
            lambda plain: self.writer.log_image(name, plain, step),  # type: ignore[arg-type]  # None is counted
        )

    def log_table(self, data: Any, artifact_file: str, *args: Any, **kwargs: Any) -> None:
        """Log a table. The path is its key.

        Args:
            data: column to values, or a DataFrame.
            artifact_file: the path.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self._log_converted(
            "log_table",
            artifact_file,
            lambda: convert_figures_and_tables.table_of(data),
            lambda found: self.writer.log_table(artifact_file, *found),
        )

    def log_artifact(
        self, local_path: str | os.PathLike[str], artifact_path: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Log a file, or each file in a folder. It goes into the artifact folder ``artifact_path`` if one is given.

        Args:
            local_path: the file or the folder. The folder keeps its name in the run.
            artifact_path: the folder in the run.
            args, kwargs: MLflow's further arguments, without effect.
        """
        if isinstance(local_path, str | os.PathLike) and os.path.isdir(local_path):
            name = Path(local_path).resolve().name
            self.log_artifacts(local_path, f"{artifact_path}/{name}" if artifact_path else name)
            return
        self.writer._append_blob("log_artifact", None, read_artifact, local_path, None, "file", artifact_path)

    def log_artifacts(
        self, local_dir: str | os.PathLike[str], artifact_path: str | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Log each file in a folder, as ``log_artifact`` does.

        Args:
            local_dir: the folder.
            artifact_path: the folder in the run.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self._log_converted("log_artifacts", local_dir, lambda: _files_below(local_dir, artifact_path), self._log_files)

    def _log_files(self, files: list[tuple[Path, str | None]]) -> None:
        for path, folder in files:
            self.log_artifact(path, folder)

    def set_tag(self, key: str, tag: Any = None, *args: Any, **kwargs: Any) -> None:
        """Label the run. The value becomes text.

        Args:
            key: the label's key.
            tag: its value. MLflow calls it ``value``.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self._log_pair("set_tag", key, first_given(tag, kwargs, "value"), self.writer.set_tags)

    def set_tags(self, tags: Mapping[str, Any], *args: Any, **kwargs: Any) -> None:
        """Label the run, as ``set_tag`` does.

        Args:
            tags: the tags. An empty mapping logs nothing.
            args, kwargs: MLflow's further arguments, without effect.
        """
        self.writer.set_tags(tags)


class _SameRun:
    """What ``start_run`` returns: a context manager that does nothing.

    Attributes:
        info: has an empty ``run_id``. The run belongs to the job, and each backend has an id of its own.
    """

    info = types.SimpleNamespace(run_id="", run_name="")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass


def _files_below(local_dir: str | os.PathLike[str], artifact_path: str | None) -> list[tuple[Path, str | None]]:
    """Return, for each file below a folder, the file and its folder in the run.

    Raises:
        RecordError: this is not a folder, or there is no file in it.
    """
    # An empty text names no folder. Made a Path, it would name the current one, which may hold anything.
    folder = Path(local_dir) if os.path.isdir(local_dir) else None
    found: list[tuple[Path, str | None]] = []
    for path in () if folder is None else sorted(folder.rglob("*")):
        if path.is_file():
            inner = path.relative_to(local_dir).parent.as_posix()
            parts = [part for part in (artifact_path, "" if inner == "." else inner) if part]
            found.append((path, "/".join(parts) or None))
    if not found:
        raise RecordError(f"log_artifacts: {shown(local_dir)} is not a folder with files")
    return found
