# SPDX-License-Identifier: Apache-2.0
"""The network of the CIFAR-10 job: small enough for a CPU."""

import torch
from torch import nn


class SmallCNN(nn.Sequential):
    """Three convolutions and a linear layer, 68,000 weights: float32 images [N, 3, 32, 32] to scores of ten classes.

    It has group normalisation, since batch normalisation keeps running statistics. Averaged over sites with different
    images, these are of no use.

    Args:
        seed: the seed of the initial weights. With it, a job starts from the same model every time.
    """

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.seed = seed  # FLARE writes constructor arguments into the job from attributes of the same name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for n_in, n_out in ((3, 24), (24, 48), (48, 96)):
                convolution = nn.Conv2d(n_in, n_out, kernel_size=3, padding=1, bias=False)
                # Pool first, so that normalisation works on a quarter of the pixels.
                self.extend([convolution, nn.MaxPool2d(2), nn.GroupNorm(8, n_out), nn.ReLU(inplace=True)])
            self.extend([nn.Flatten(), nn.Linear(96 * 4 * 4, 10)])
