# SPDX-License-Identifier: Apache-2.0
"""The optimizer of one round, and the learning rate over all rounds of a job."""

import math

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4
WARMUP = 0.1  # the part of all steps in which the learning rate rises. Then it falls along a cosine

# Without a limit, the first steps on a few hundred images go so far wrong that five rounds cannot correct it.
MAX_GRADIENT_NORM = 2.0


def sgd_with_schedule(
    model: nn.Module, highest_rate: float, first_step: int, total_steps: int
) -> tuple[torch.optim.Optimizer, LambdaLR]:
    """Return the optimizer of a round, and what changes its learning rate after each step.

    Args:
        model: what to train.
        highest_rate: the highest learning rate of the job.
        first_step: the number of the round's first step, counted over all rounds.
        total_steps: how many steps all rounds have together.
    """
    optimizer = torch.optim.SGD(model.parameters(), highest_rate, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)
    return optimizer, LambdaLR(optimizer, lambda step: schedule(first_step + step, total_steps))


def schedule(step: int, total_steps: int) -> float:
    """Return the factor, 0 to 1, of the highest learning rate at this step, counted from 0."""
    progress = (step + 1) / total_steps
    return min(progress / WARMUP, 0.5 + 0.5 * math.cos(math.pi * (progress - WARMUP) / (1 - WARMUP)))
