# SPDX-License-Identifier: Apache-2.0
"""What training code calls: the writer, and adapters with the method names of W&B, MLflow and TensorBoard.

Everything here appends to the site's spool, and imports neither delivery nor backends nor FLARE.
"""

from trackhub.writer.adapters import MLflowWriter, SummaryWriter, WandBWriter
from trackhub.writer.writer import Writer

__all__ = ["MLflowWriter", "SummaryWriter", "WandBWriter", "Writer"]
