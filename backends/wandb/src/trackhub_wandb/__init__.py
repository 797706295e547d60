# SPDX-License-Identifier: Apache-2.0
"""The backend ``wandb``: it writes one Weights & Biases run per site, and groups the sites of a job."""

from __future__ import annotations

from trackhub_wandb.backend import WandBBackend
from trackhub_wandb.options import WandBOptions

__all__ = ["WandBBackend", "WandBOptions"]
