# SPDX-License-Identifier: Apache-2.0
"""Writers that are called as W&B, MLflow and TensorBoard are, so that a script moves to trackhub by its import alone.

They have the methods and signatures of the writers in ``nvflare.client.tracking``::

    from trackhub.writer.adapters import WandBWriter       # was: from nvflare.client.tracking import WandBWriter

    WandBWriter().log({"train_loss": loss}, step)

Each is a `trackhub.Writer` in another's clothes: what it logs goes to whichever backends the job has, and a call raises
`RecordError` where the writer's would. New code should use `trackhub.Writer`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from trackhub.writer.writer import Writer

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter"]


class _Dialect:
    """What all have in common: a writer, found as ``trackhub.Writer()`` finds its spool.

    Attributes:
        writer: the writer that every call ends in.
    """

    def __init__(self, ctx: Any = None, *, writer: Writer | None = None) -> None:
        """Open a stream in the job's spool.

        Args:
            ctx: accepted since FLARE's writers have it, and not used.
            writer: log through this one, such as that of ``trackhub.local``, instead of a new one.

        Raises:
            ConfigError: there is no spool: not in a FLARE job with tracking.
        """
        self.writer = Writer() if writer is None else writer

    def flush(self) -> None:
        """Do nothing: what was logged is safe already."""

    def close(self) -> None:
        """Close the writer. What was logged is delivered all the same."""
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class SummaryWriter(_Dialect):
    """Called as TensorBoard's ``SummaryWriter``.

    Without a ``global_step``, the values of a tag are numbered 0, 1, 2, ... where a backend needs a step.
    """

    def add_scalar(self, tag: str, scalar: float, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a scalar.

        Args:
            kwargs: TensorBoard's further arguments (``new_style``, ``walltime``, ...); not used, the time is now.
        """
        self.writer.log({tag: scalar}, global_step)

    def add_scalars(
        self, tag: str, scalars: Mapping[str, float], global_step: int | None = None, **kwargs: Any
    ) -> None:
        """Log scalars below a common tag, as ``tag/name``.

        Args:
            kwargs: as for ``add_scalar``.
        """
        if scalars:
            self.writer.log({f"{tag}/{name}": value for name, value in scalars.items()}, global_step)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, **kwargs: Any) -> None:
        """Log a text, shown as Markdown.

        Args:
            kwargs: as for ``add_scalar``.
        """
        self.writer.log_text(tag, text_string, global_step)

    def add_image(self, tag: str, img_tensor: Any, global_step: int | None = None, **kwargs: Any) -> None:
        """Log an image: channels first or last, or none.

        Args:
            kwargs: as for ``add_scalar``; ``dataformats`` is seen from the shape.
        """
        self.writer.log_image(tag, img_tensor, global_step)

    def add_histogram(
        self, tag: str, values: Any, global_step: int | None = None, bins: Any = None, **kwargs: Any
    ) -> None:
        """Log a distribution.

        Args:
            bins: the number of bins; the names of TensorBoard's and numpy's schemes mean the default of 30.
            kwargs: as for ``add_scalar``.
        """
        self.writer.log_histogram(tag, values, global_step, bins=bins if isinstance(bins, int) else 30)


class WandBWriter(_Dialect):
    """Called as W&B's run."""

    def log(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars that belong together."""
        if metrics:
            self.writer.log(metrics, step)

    def finish(self) -> None:
        """Close the writer, as ``close``."""
        self.close()


class MLflowWriter(_Dialect):
    """Called as MLflow's fluent API.

    Without a ``step``, the values of a key are numbered 0, 1, 2, ... where a backend needs a step.
    """

    def log_param(self, key: str, value: Any) -> None:
        """Log one hyperparameter; a value that a param cannot hold is logged as its text."""
        self.writer.log_params({key: _param(value)})

    def log_params(self, values: dict[str, Any]) -> None:
        """Log hyperparameters, as ``log_param``."""
        if values:
            self.writer.log_params({key: _param(value) for key, value in values.items()})

    def log_metric(self, key: str, value: float, step: int | None = None) -> None:
        """Log one scalar."""
        self.writer.log({key: value}, step)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Log scalars that belong together."""
        if metrics:
            self.writer.log(metrics, step)

    def log_text(self, text: str, artifact_file_path: str) -> None:
        """Log a text; the path is its key."""
        self.writer.log_text(artifact_file_path, text)

    def log_artifact(self, local_path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Log a file, into the artifact folder ``artifact_path`` if one is given."""
        name = os.path.basename(os.fspath(local_path))
        self.writer.log_artifact(local_path, f"{artifact_path}/{name}" if artifact_path else name)

    def set_tag(self, key: str, tag: Any) -> None:
        """Label the run; the value becomes text."""
        self.writer.set_tags({key: str(tag)})

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Label the run, as ``set_tag``."""
        if tags:
            self.writer.set_tags({key: str(tag) for key, tag in tags.items()})


def _param(value: Any) -> Any:
    """Return the value if a param can hold it, else its text, which is what MLflow makes of it."""
    if value is None or isinstance(value, bool | int | float | str | list | tuple | dict) or hasattr(value, "item"):
        return value
    return str(value)
