# SPDX-License-Identifier: Apache-2.0
"""Adapters: writers with the method names of W&B, MLflow and TensorBoard, so that a script changes one import.

They have the methods and signatures of the writers in ``nvflare.client.tracking``::

    from trackhub.writer import WandBWriter     # was: from nvflare.client.tracking import WandBWriter

    WandBWriter().log({"train_loss": loss}, step)

Each calls a `trackhub.Writer`, so its records go to every backend of the job, and a bad argument raises `RecordError`.
New code should use `trackhub.Writer`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from trackhub.writer.read_artifact import read_artifact
from trackhub.writer.writer import Writer

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class _Adapter:
    """What all adapters have in common: the writer that they call.

    Attributes:
        writer: the writer.
    """

    def __init__(self, ctx: Any = None, *, writer: Writer | None = None, strict: bool = False) -> None:
        """Use a writer, by default a new one.

        Args:
            ctx: not used; it is here since FLARE's writers take it.
            writer: the writer to use, such as that of ``trackhub.local``. None makes a new ``Writer``, which records
                nothing where there is no tracking.
            strict: make a new writer strict: it raises for what it cannot store, and where it would record nothing.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking, or ``TRACKHUB_MODE`` has an unknown value.
        """
        self.writer = Writer(strict=strict) if writer is None else writer

    def flush(self) -> None:
        """Do nothing: what was logged is safe already. Call ``writer.flush`` to wait for the receiver."""

    def close(self) -> None:
        """Close the writer. What was logged is delivered all the same. May be called more than once."""
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SummaryWriter(_Adapter):
    """Has the methods of TensorBoard's ``SummaryWriter``.

    A call without ``global_step`` gets 0, 1, 2, ... for the values of its tag where a backend needs a step. No method
    raises, unless strict.
    """

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a scalar.

        Args:
            tag: its key.
            scalar: its value, as for ``Writer.log``.
            global_step: the step.
            kwargs: TensorBoard's further arguments (``new_style``, ``walltime``, ...). They have no effect: the time is
                that of the call.
        """
        self.writer.log({tag: scalar}, global_step)

    def add_scalars(
        self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **kwargs: Any
    ) -> None:
        """Log scalars as one record, each under ``tag/name``.

        Args:
            tag: what all their keys begin with.
            scalars: name to value. An empty mapping logs nothing.
            global_step: the step.
            kwargs: as for ``add_scalar``.
        """
        self.writer.log({tag: scalars}, global_step)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a text, shown as Markdown by backends that can.

        Args:
            tag: its key.
            text_string: the text.
            global_step: the step.
            kwargs: as for ``add_scalar``.
        """
        self.writer.log_text(tag, text_string, global_step)

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, **kwargs: Any) -> None:
        """Log an image.

        Args:
            tag: its key.
            img_tensor: as for ``Writer.log_image``: channels first, last or none.
            global_step: the step.
            kwargs: as for ``add_scalar``. ``dataformats`` is not needed: the shape says it.
        """
        self.writer.log_image(tag, img_tensor, global_step)

    def add_histogram(
        self, tag: str, values: Any, global_step: int | None = None, bins: Any = None, **kwargs: Any
    ) -> None:
        """Log a distribution.

        Args:
            tag: its key.
            values: an array or tensor of numbers.
            global_step: the step.
            bins: how many bins. A name of one of TensorBoard's or numpy's schemes means the default of 30.
            kwargs: as for ``add_scalar``.
        """
        self.writer.log_histogram(tag, values, global_step, bins=bins if isinstance(bins, int) else 30)


class WandBWriter(_Adapter):
    """Has the methods of a W&B run. No method raises, unless strict."""

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars as one record. An empty mapping logs nothing."""
        self.writer.log(metrics, step)

    def finish(self) -> None:
        """Close the writer, as ``close`` does."""
        self.close()


class MLflowWriter(_Adapter):
    """Has the methods of MLflow's fluent API. No method raises, unless strict.

    A call without ``step`` gets 0, 1, 2, ... for the values of its key where a backend needs a step.
    """

    def log_param(self, key: str, value: Any) -> None:
        """Log one hyperparameter. A value that a param cannot hold is logged as its text."""
        self.writer.log_params({key: value})

    def log_params(self, values: dict[str, Any]) -> None:
        """Log hyperparameters, as ``log_param`` does. An empty mapping logs nothing."""
        self.writer.log_params(values)

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Log one scalar."""
        self.writer.log({key: value}, step)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars as one record. An empty mapping logs nothing."""
        self.writer.log(metrics, step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Log a text. The path is its key."""
        self.writer.log_text(artifact_file_path, text)

    def log_artifact(self, local_path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Log a file. It goes into the artifact folder ``artifact_path`` if one is given."""
        self.writer._append_blob("log_artifact", None, read_artifact, local_path, None, "file", artifact_path)

    def set_tag(self, key: str, tag: Any) -> None:
        """Label the run. The value becomes text."""
        self.writer.set_tags({key: tag})

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Label the run, as ``set_tag`` does. An empty mapping logs nothing."""
        self.writer.set_tags(tags)
