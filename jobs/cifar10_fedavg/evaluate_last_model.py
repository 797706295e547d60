# SPDX-License-Identifier: Apache-2.0
"""Evaluates the last global model on the server, and logs it there with the same writer as the sites."""

import argparse
from typing import Any

import data
import torch
from evaluation import DEVICE, evaluate
from model import SmallCNN
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.app_constant import AppConstants
from nvflare.app_common.app_event_type import AppEventType

import trackhub


class EvaluateLastModel(FLComponent):  # type: ignore[misc]  # FLARE has no types
    """A server component that evaluates the last model. Sites evaluate only the models that they receive.

    Args:
        dataset: ``cifar10`` or ``synthetic``; the server needs the images.
        seed: the seed of the synthetic images.
    """

    def __init__(self, dataset: str, seed: int = 0) -> None:
        super().__init__()
        self.dataset, self.seed = dataset, seed
        self._last: Any = None
        self._rounds = 0

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep the model of each round, and evaluate the last one when the workflow ends."""
        if event_type == AppEventType.AFTER_AGGREGATION:
            self._last = fl_ctx.get_prop(AppConstants.AGGREGATION_RESULT).params
            self._rounds += 1
        elif event_type == EventType.END_WORKFLOW and self._last is not None:
            try:
                self._evaluate()
            except data.DataError as error:
                self.log_warning(fl_ctx, f"the last model is not evaluated: {error}", fire_event=False)

    def _evaluate(self) -> None:
        args = argparse.Namespace(dataset=self.dataset, seed=self.seed, data_root=None)
        _, _, test_images = data.load(args)
        model = SmallCNN().to(memory_format=torch.channels_last).to(DEVICE)
        model.load_state_dict({name: torch.as_tensor(array) for name, array in self._last.items()})
        loss, accuracy, _ = evaluate(model, test_images)
        with trackhub.Writer() as writer:  # on the server, it writes the run "server"
            writer.log({"val/loss": loss, "val/accuracy": accuracy}, self._rounds)
