# SPDX-License-Identifier: Apache-2.0
"""A strict emulator of the W&B server on loopback, for W&B's unmodified client.

A test uses it in its own process: ``with Emulator() as server: ...``. ``python -m tests.support.wandb_emulator`` runs
it as a process, which prints its address and key as one line of JSON. There ``GET /_emulator/state`` returns what it
holds, and ``POST /_emulator/fail`` takes the fields of a ``Fault``.
"""

from __future__ import annotations

from tests.support.wandb_emulator.http_server import Emulator, Fault
from tests.support.wandb_emulator.state import ENTITY, Artifact, Run

__all__ = ["ENTITY", "Artifact", "Emulator", "Fault", "Run"]
