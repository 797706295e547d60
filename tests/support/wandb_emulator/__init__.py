# SPDX-License-Identifier: Apache-2.0
"""A strict emulator of the W&B server's protocol, for the unmodified client, on loopback.

In a test: ``with Emulator() as server: ...``. As a process: ``python -m tests.support.wandb_emulator``, which prints
one line of JSON with its address and key; ``GET /_emulator/state`` reads it back, ``POST /_emulator/fail`` takes the
fields of a ``Fault``.
"""

from __future__ import annotations

from tests.support.wandb_emulator.server import Emulator, Fault
from tests.support.wandb_emulator.state import ENTITY, Artifact, Run

__all__ = ["ENTITY", "Artifact", "Emulator", "Fault", "Run"]
