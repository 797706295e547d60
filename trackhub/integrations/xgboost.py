# SPDX-License-Identifier: Apache-2.0
"""The callback for XGBoost. It needs ``xgboost``.

XGBoost calls it after each round of boosting, and it calls `trackhub.Writer`::

    xgboost.train(params, data, evals=[(data, "train")], callbacks=[TrackhubCallback()])
"""

from __future__ import annotations

import json
from typing import Any

from xgboost.callback import TrainingCallback

from trackhub.writer.count_wrong_calls import counts_wrong_calls
from trackhub.writer.writer import Writer

__all__ = ["TrackhubCallback"]


class TrackhubCallback(TrainingCallback):
    """Logs the metrics of each round of boosting, under keys such as ``train/logloss``.

    If XGBoost stops early, the best round and score become final values. With ``xgboost.cv``, the plain key has the
    mean, and the key that ends in ``/std`` has the deviation.

    Attributes:
        writer: the writer that it calls.
    """

    def __init__(self, writer: Writer | None = None, *, first_step: int = 0, strict: bool = False) -> None:
        """Use a writer, by default a new one.

        Args:
            writer: the writer to use. None makes a new ``Writer``, which records nothing where there is no tracking.
            first_step: the step of the first round. Give it where training continues an earlier one.
            strict: make a new writer strict, as for ``Writer``.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking.
        """
        super().__init__()
        self.writer = Writer(strict=strict) if writer is None else writer
        self._first_step = first_step

    def before_training(self, model: Any) -> Any:
        """Log the model's configuration as params. XGBoost calls it."""
        self._log_config(model)
        return model

    def after_iteration(self, model: Any, epoch: int, evals_log: Any) -> bool:
        """Log the metrics of one round. XGBoost calls it, and goes on since this returns False.

        Args:
            model: the booster.
            epoch: the number of the round.
            evals_log: all scores so far, by data set and metric.
        """
        self._log_scores(epoch, evals_log)
        return False

    def after_training(self, model: Any) -> Any:
        """Set the best round and score as final values, where there are any. XGBoost calls it."""
        self._log_best(model)
        return model

    @counts_wrong_calls
    def _log_config(self, model: Any) -> None:
        if hasattr(model, "save_config"):  # the model of ``cv`` has none
            learner = json.loads(model.save_config())["learner"]
            self.writer.log_params({"booster": learner["gradient_booster"]["name"], **_leaves(learner)})

    @counts_wrong_calls
    def _log_scores(self, epoch: int, evals_log: Any) -> None:
        found: dict[str, Any] = {}
        for data, metrics in evals_log.items():
            for name, scores in metrics.items():
                score = scores[-1]
                key = f"{data}/{name}"
                if isinstance(score, tuple):
                    found[key], found[f"{key}/std"] = score
                else:
                    found[key] = score
        self.writer.log(found, self._first_step + epoch)

    @counts_wrong_calls
    def _log_best(self, model: Any) -> None:
        attributes = model.attributes() if hasattr(model, "attributes") else {}
        best = {name: float(attributes[name]) for name in ("best_iteration", "best_score") if name in attributes}
        self.writer.summarize(best)


def _leaves(learner: Any) -> dict[str, Any]:
    """Return the parameters of the objective, the booster and its trees, each by its own name."""
    found: dict[str, Any] = {"objective": learner.get("objective", {}).get("name")}
    for part in ("tree_train_param", "gbtree_train_param", "gbtree_model_param"):
        found.update(learner["gradient_booster"].get(part, {}))
    return found
