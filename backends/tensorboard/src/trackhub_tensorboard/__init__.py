# SPDX-License-Identifier: Apache-2.0
"""The backend ``tensorboard``: it writes one folder of event files per run, without torch or TensorFlow."""

from __future__ import annotations

from trackhub_tensorboard.backend import TensorBoardBackend, TensorBoardOptions

__all__ = ["TensorBoardBackend", "TensorBoardOptions"]
