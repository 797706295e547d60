# SPDX-License-Identifier: Apache-2.0
"""The ways of tracking that are compared: without, with FLARE's own writer and receiver, with trackhub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.harness import JobResult, Point, read_tensorboard

__all__ = ["ARMS", "Arm"]

_TRAINER = """
    import array

    RECORDS = {records}
    PAUSE_S = {pause_s}
    {prepare}


    def train(current_round):
        calls = array.array("d")
        base = current_round * RECORDS
        clock, idle = time.perf_counter, threading.Event()
        begin = time.time()
        for step in range(base, base + RECORDS):
            before = clock()
            {log}
            calls.append(clock() - before)
            if PAUSE_S:
                idle.wait(PAUSE_S)
        with open(os.path.join(OUT, f"{{SITE}}-{{current_round}}.calls"), "wb") as file:
            array.array("d", [begin, time.time()]).tofile(file)
            calls.tofile(file)


    import threading
    rounds(train)
"""


@dataclass(frozen=True)
class Arm:
    """One way of tracking.

    Attributes:
        name: as it stands in the table.
        tracking: arguments of ``add_tracking``, None to leave it out.
        more: source that changes the job otherwise.
        read: returns what the job stored for a site, None if the arm stores nothing.
        files: returns the folder in which it stored.
    """

    name: str
    prepare: str
    log: str
    tracking: dict[str, Any] | None = None
    more: str = ""
    read: Callable[[JobResult, str], list[Point]] | None = None
    files: Callable[[JobResult, str], Path] | None = None

    def trainer(self, records: int, pause_s: float) -> str:
        """Return the training script's source: so many records a round, each a call of its own."""
        return _TRAINER.format(records=records, pause_s=pause_s, prepare=self.prepare, log=self.log)


def _stock_folder(result: JobResult, site: str) -> Path:
    return result.run_dir("server") / "tb_events" / site


def _trackhub_folder(result: JobResult, site: str) -> Path:
    return result.run_dir("server") / "tensorboard" / result.job / site


ARMS = [
    Arm("none", "", "pass"),
    Arm(
        "stock",
        "from nvflare.client.tracking import SummaryWriter\n    writer = SummaryWriter()",
        'writer.add_scalar("loss", float(step), global_step=step)',
        more='from nvflare.recipe.utils import add_experiment_tracking\nadd_experiment_tracking(recipe, "tensorboard")',
        read=lambda result, site: read_tensorboard(_stock_folder(result, site)),
        files=_stock_folder,
    ),
    Arm(
        "trackhub",
        "import trackhub\n    writer = trackhub.Writer()",
        'writer.log({"loss": float(step)}, step)',
        tracking={"server": {"tensorboard": {}}},
        read=lambda result, site: read_tensorboard(_trackhub_folder(result, site)),
        files=_trackhub_folder,
    ),
]
"""TensorBoard on both sides of the comparison, since its files show every point and the time that it was written."""
