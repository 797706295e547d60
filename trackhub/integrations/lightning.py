# SPDX-License-Identifier: Apache-2.0
"""The logger for Lightning's ``Trainer``. It needs ``lightning`` or ``pytorch_lightning``.

Lightning calls it in the trainer, and it calls `trackhub.Writer`::

    from trackhub.integrations.lightning import TrackhubLogger

    trainer = Trainer(logger=TrackhubLogger())
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trackhub.writer.count_wrong_calls import counts_wrong_calls
from trackhub.writer.writer import Writer

# Lightning exists as two packages, and a Trainer of one does not accept loggers of the other.
if "pytorch_lightning" in sys.modules or importlib.util.find_spec("lightning") is None:
    from pytorch_lightning.loggers import Logger
    from pytorch_lightning.utilities import rank_zero_only
else:
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.utilities import rank_zero_only

__all__ = ["TrackhubLogger"]


class TrackhubLogger(Logger):
    """Logs what ``self.log`` and ``save_hyperparameters`` of a Lightning module give. Rank 0 alone logs.

    It may serve several trainers, one after the other: no trainer closes it.

    Attributes:
        writer: the writer that it calls. Lightning calls it ``experiment``.
    """

    def __init__(
        self, writer: Writer | None = None, *, prefix: str = "", log_model: bool = False, strict: bool = False
    ) -> None:
        """Use a writer, by default a new one.

        Args:
            writer: the writer to use, such as that of ``trackhub.local``. None makes a new ``Writer``, which records
                nothing where there is no tracking.
            prefix: the keys of metrics begin with this and a slash.
            log_model: log the best checkpoint as an artifact of the type ``model`` when training ends.
            strict: make a new writer strict, as for ``Writer``.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking.
        """
        super().__init__()
        self.writer = Writer(strict=strict) if writer is None else writer
        self._prefix = prefix
        self._log_model = log_model
        self._checkpoint: Any = None

    @property
    def name(self) -> str:
        """The folder of checkpoints, below the trainer's ``default_root_dir``."""
        return "trackhub"

    @property
    def version(self) -> str:
        """Empty, since a site has only one run."""
        return ""

    @property
    def experiment(self) -> Writer:
        """The writer, for images, texts and whatever else Lightning has no method for."""
        return self.writer

    @counts_wrong_calls
    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log scalars as one record. Lightning calls it."""
        self.writer.log({self._prefix: metrics} if self._prefix else metrics, step)

    @counts_wrong_calls
    @rank_zero_only  # type: ignore[untyped-decorator]
    def log_hyperparams(self, params: Any = None, *args: Any, **kwargs: Any) -> None:
        """Log hyperparameters. Lightning calls it with those of the module and of the data module.

        Args:
            params: as for ``Writer.log_params``. None logs nothing.
            args: further arguments of other loggers, without effect.
            kwargs: further params.
        """
        if params is not None:
            self.writer.log_params(params)
        self.writer.log_params(kwargs)  # an empty mapping logs nothing

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Remember which callback saves checkpoints. Lightning calls it."""
        self._checkpoint = checkpoint_callback

    @counts_wrong_calls
    @rank_zero_only  # type: ignore[untyped-decorator]
    def finalize(self, status: str) -> None:
        """Log the best checkpoint, if that was asked for. Lightning calls it at the end of each fit."""
        path = getattr(self._checkpoint, "best_model_path", "")
        if self._log_model and path and os.path.isfile(path):
            self.writer.log_artifact(path, f"checkpoints/{Path(path).name}", "model")
            self._checkpoint = None
