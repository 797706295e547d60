# SPDX-License-Identifier: Apache-2.0
"""MLflow as a trackhub backend: one MLflow run per site, and all sites of a job below one parent run."""

from __future__ import annotations

from trackhub_mlflow.backend import MLflowBackend
from trackhub_mlflow.options import MLflowOptions

__all__ = ["MLflowBackend", "MLflowOptions"]
