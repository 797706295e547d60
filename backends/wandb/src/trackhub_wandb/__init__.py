# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases as a trackhub backend: one W&B run per site, all sites of a job in one group."""

from __future__ import annotations

from trackhub_wandb.backend import WandBBackend
from trackhub_wandb.options import WandBOptions

__all__ = ["WandBBackend", "WandBOptions"]
