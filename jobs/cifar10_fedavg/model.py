# SPDX-License-Identifier: Apache-2.0
"""The network of the CIFAR-10 job: small enough for a CPU, and averaged without harm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["SmallCNN"]

_GROUPS = 8


class SmallCNN(nn.Module):
    """Three convolutions and a linear layer: 68,000 weights, 4 million multiplications per image.

    Group normalisation instead of batch normalisation, because it has no running statistics: those of sites with
    different images do not average to anything useful.

    Args:
        seed: of the initial weights, so that a job starts from the same model every time. None draws them from
            torch's global generator.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed = seed  # FLARE writes constructor arguments into the job from attributes of the same name
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            self.layers = nn.Sequential(
                *self._block(3, 24),
                *self._block(24, 48),
                *self._block(48, 96),
                nn.Flatten(),
                nn.Linear(96 * 4 * 4, 10),
            )

    @staticmethod
    def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
        # Pooling before normalisation leaves it a quarter of the pixels to work on.
        return [
            nn.Conv2d(channels_in, channels_out, kernel_size=3, padding=1, bias=False),
            nn.MaxPool2d(2),
            nn.GroupNorm(_GROUPS, channels_out),
            nn.ReLU(inplace=True),
        ]

    def forward(self, images: Tensor) -> Tensor:
        """Return the scores of the ten classes, float32 [N, 10], for normalised images, float32 [N, 3, 32, 32]."""
        scores: Tensor = self.layers(images)
        return scores
