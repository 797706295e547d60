# SPDX-License-Identifier: Apache-2.0
"""Generated images for the CIFAR-10 job, for machines without CIFAR-10 and without internet."""

import torch
from torch.nn import functional
from torch.utils.data import TensorDataset


def synthetic(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test images: patterns, moved and mixed, with noise. A small network learns them slowly."""
    random = torch.Generator().manual_seed(seed)
    patterns = functional.interpolate(torch.randn(10, 3, 6, 6, generator=random), size=(32, 32), mode="bicubic")
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)

    def draw(n: int) -> TensorDataset:
        labels = torch.randperm(n, generator=random) % 10
        others = (labels + torch.randint(1, 10, (n,), generator=random)) % 10
        contrast = 10 + 30 * torch.rand(n, 1, 1, 1, generator=random)
        mixed = contrast * (patterns[labels] + 0.7 * patterns[others])
        shifts = torch.randint(-6, 7, (n, 2), generator=random).tolist()
        moved = torch.stack([image.roll(shift, (1, 2)) for image, shift in zip(mixed, shifts, strict=True)])
        pixels = 128 + moved + 40 * torch.randn(n, 3, 32, 32, generator=random)
        return TensorDataset(pixels.clamp(0, 255).to(torch.uint8), labels)

    return draw(8000), draw(2000)
