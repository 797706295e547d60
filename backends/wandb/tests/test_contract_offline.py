# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from trackhub_wandb.contract import WandBContract


class TestWandBOffline(WandBContract):
    pass
