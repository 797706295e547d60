# SPDX-License-Identifier: Apache-2.0
"""The callback for Hugging Face's ``Trainer``. It needs ``transformers``.

``Trainer`` calls it, and it calls `trackhub.Writer`. Either import this module and name ``trackhub`` in the arguments,
or pass the callback::

    import trackhub.integrations.transformers
    TrainingArguments(report_to="trackhub")

    Trainer(callbacks=[TrackhubCallback()])
"""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.integrations import integration_utils

from trackhub.writer.count_wrong_calls import counts_wrong_calls
from trackhub.writer.writer import Writer

__all__ = ["TrackhubCallback"]

_SPLITS = ("eval", "test")


class TrackhubCallback(TrainerCallback):
    """Logs what ``Trainer`` logs, under keys such as ``train/loss`` and ``eval/loss``. The main process alone logs.

    Attributes:
        writer: the writer that it calls.
    """

    def __init__(self, writer: Writer | None = None, *, strict: bool = False) -> None:
        """Use a writer, by default a new one.

        Args:
            writer: the writer to use. None makes a new ``Writer``, which records nothing where there is no tracking.
            strict: make a new writer strict, as for ``Writer``.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking.
        """
        self.writer = Writer(strict=strict) if writer is None else writer

    @counts_wrong_calls
    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Log the training arguments and the model's configuration as params. ``Trainer`` calls it.

        Args:
            args, state, control, kwargs: what ``Trainer`` gives to every callback.
            model: the model.
        """
        if state.is_world_process_zero:
            config: Any = getattr(model, "config", None)
            about = {"model": config.to_dict()} if hasattr(config, "to_dict") else {}
            self.writer.log_params({"args": args.to_dict(), **about})

    @counts_wrong_calls
    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Log the numbers of one call of ``Trainer.log``. ``Trainer`` calls it.

        Args:
            args, state, control, kwargs: what ``Trainer`` gives to every callback.
            logs: the numbers by name.
        """
        if state.is_world_process_zero:
            found: dict[str, dict[Any, Any]] = {}
            for name, value in (logs or {}).items():
                split, inner = _split_of(name)
                found.setdefault(split, {})[inner] = value
            self.writer.log(found, state.global_step)

    @counts_wrong_calls
    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the best metric as a final value, where the trainer knows one. ``Trainer`` calls it.

        Args:
            args, state, control, kwargs: what ``Trainer`` gives to every callback.
        """
        if state.is_world_process_zero and state.best_metric is not None:
            self.writer.summarize({"best_metric": state.best_metric, "best_step": state.best_global_step})


def _split_of(name: Any) -> tuple[str, Any]:
    """Return the split that a number is about, and its name without that."""
    for split in _SPLITS:
        if isinstance(name, str) and name.startswith(f"{split}_"):
            return split, name.removeprefix(f"{split}_")
    return "train", name


integration_utils.INTEGRATION_TO_CALLBACK["trackhub"] = TrackhubCallback  # what report_to="trackhub" looks up
