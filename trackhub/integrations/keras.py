# SPDX-License-Identifier: Apache-2.0
"""The callback for Keras 3, with any backend of Keras. It needs ``keras``.

Keras calls it, and it calls `trackhub.Writer`::

    model.fit(x, y, callbacks=[TrackhubCallback()])
"""

from __future__ import annotations

from typing import Any

from keras.callbacks import Callback

from trackhub.writer.count_wrong_calls import counts_wrong_calls
from trackhub.writer.writer import Writer

__all__ = ["TrackhubCallback"]


class TrackhubCallback(Callback):
    """Logs the metrics of each epoch, and of batches if asked to. It logs the optimizer's configuration as params.

    Attributes:
        writer: the writer that it calls.
    """

    def __init__(
        self,
        writer: Writer | None = None,
        *,
        batches: int | None = None,
        histograms: bool = False,
        first_step: int = 0,
        strict: bool = False,
    ) -> None:
        """Use a writer, by default a new one.

        Args:
            writer: the writer to use. None makes a new ``Writer``, which records nothing where there is no tracking.
            batches: also log the metrics once every so many batches, under keys such as ``batch/loss``; None logs none.
            histograms: log a histogram of each weight after each epoch.
            first_step: the step of the first epoch. Give it where training continues an earlier one.
            strict: make a new writer strict, as for ``Writer``.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking.
        """
        super().__init__()
        self.writer = Writer(strict=strict) if writer is None else writer
        self._batches = batches
        self._histograms = histograms
        self._first_step = first_step
        self._batch = 0

    @counts_wrong_calls
    def on_train_begin(self, logs: Any = None) -> None:
        """Log how the training is set up. Keras calls it."""
        optimizer = getattr(self.model, "optimizer", None)
        # Keras calls the second optimizer of a process "sgd_1", and so on: the param would change in each round.
        name = None if optimizer is None else {"name": type(optimizer).__name__}
        self.writer.log_params({**(self.params or {}), "optimizer": name})
        if optimizer is not None:
            config = optimizer.get_config()  # raises for an own optimizer without this method
            self.writer.log_params({"optimizer": {key: config[key] for key in config if key != "name"}})

    @counts_wrong_calls
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Log a batch if ``batches`` says so. Keras calls it after each batch."""
        if self._batches and self._batch % self._batches == 0:
            self.writer.log({"batch": dict(logs or {})}, self._batch)
        self._batch += 1

    @counts_wrong_calls
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Log an epoch. Keras calls it."""
        step = self._first_step + epoch
        self.writer.log(dict(logs or {}), step)
        if self._histograms:
            self.writer.log_model_histograms(self.model, step)
