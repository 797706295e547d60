# SPDX-License-Identifier: Apache-2.0
"""The tracker for Hugging Face Accelerate. It needs ``accelerate``.

``Accelerator`` calls it in the main process, and it calls `trackhub.Writer`::

    accelerator = Accelerator(log_with=TrackhubTracker())
    accelerator.init_trackers("any name", config={"lr": 0.1})
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accelerate.tracking import GeneralTracker

from trackhub.writer.count_wrong_calls import counts_wrong_calls
from trackhub.writer.wandb_values import log_values
from trackhub.writer.writer import Writer

__all__ = ["TrackhubTracker"]


class TrackhubTracker(GeneralTracker):
    """Logs what ``Accelerator.log`` gives.

    Attributes:
        writer: the writer that it calls.
    """

    name = "trackhub"
    requires_logging_directory = False

    def __init__(self, writer: Writer | None = None, *, strict: bool = False) -> None:
        """Use a writer, by default a new one.

        Args:
            writer: the writer to use. None makes a new ``Writer``, which records nothing where there is no tracking.
            strict: make a new writer strict, as for ``Writer``.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking.
        """
        super().__init__()
        self.writer = Writer(strict=strict) if writer is None else writer

    @property
    def tracker(self) -> Writer:
        """The writer, as ``Accelerator.get_tracker("trackhub", unwrap=True)`` returns it."""
        return self.writer

    @counts_wrong_calls
    def store_init_configuration(self, values: Mapping[str, Any]) -> None:
        """Log the configuration as params."""
        self.writer.log_params(values)

    @counts_wrong_calls
    def log(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log scalars as one record, and each text, figure, image and the like among them as a record of its own.

        Args:
            values: as for ``WandBWriter.log``.
            step: the step.
            kwargs: arguments of other trackers, without effect.
        """
        log_values(self.writer, values, step)

    @counts_wrong_calls
    def log_images(self, values: Mapping[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: key to a list of images.
            step: the step.
            kwargs: arguments of other trackers, without effect.
        """
        for key, images in values.items():
            self.writer.log_images(key, images, step)

    def finish(self) -> None:
        """Do nothing: the job ends the run, and may train again."""
