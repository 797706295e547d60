# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from trackhub_tensorboard.contract import TensorBoardContract


class TestTensorBoard(TensorBoardContract):
    pass
