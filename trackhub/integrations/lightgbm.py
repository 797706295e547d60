# SPDX-License-Identifier: Apache-2.0
"""The callback for LightGBM. It needs ``lightgbm``.

LightGBM calls it after each round of boosting, and it calls `trackhub.Writer`::

    lightgbm.train(params, data, valid_sets=[data], callbacks=[TrackhubCallback()])
"""

from __future__ import annotations

from typing import Any

from trackhub.writer.count_wrong_calls import counts_wrong_calls
from trackhub.writer.writer import Writer

__all__ = ["TrackhubCallback"]


class TrackhubCallback:
    """Logs the params once, and the metrics of each round of boosting, under keys such as ``training/l2``.

    Attributes:
        order: its place among the callbacks: after the one that records metrics, and before the one that stops early.
        before_iteration: False: LightGBM calls it after each round.
        writer: the writer that it calls.
    """

    order = 25
    before_iteration = False

    def __init__(self, writer: Writer | None = None, *, first_step: int = 0, strict: bool = False) -> None:
        """Use a writer, by default a new one.

        Args:
            writer: the writer to use. None makes a new ``Writer``, which records nothing where there is no tracking.
            first_step: the step of the first round. Give it where training continues an earlier one.
            strict: make a new writer strict, as for ``Writer``.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking.
        """
        self.writer = Writer(strict=strict) if writer is None else writer
        self._first_step = first_step

    @counts_wrong_calls
    def __call__(self, env: Any) -> None:
        """Log one round. LightGBM calls it."""
        if env.iteration == env.begin_iteration:
            self.writer.log_params(env.params)
        found: dict[str, Any] = {}
        for data, name, value, _, *deviation in env.evaluation_result_list or ():
            found[f"{data}/{name}"] = value
            if deviation:
                found[f"{data}/{name}/std"] = deviation[0]
        self.writer.log(found, self._first_step + env.iteration)
