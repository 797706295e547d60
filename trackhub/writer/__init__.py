# SPDX-License-Identifier: Apache-2.0
"""What training code calls: the writer, its adapters, and how values and images are read."""

from trackhub.writer.writer import Writer

__all__ = ["Writer"]
