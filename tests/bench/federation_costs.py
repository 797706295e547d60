# SPDX-License-Identifier: Apache-2.0
"""What the federation run costs a receiver: CPU time a record, with and without statistics on a key of every step.

The command calls `aggregates`. Each arm runs in a process of its own, and delivers to the backend ``jsonl``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.bench.load import feed, requests
from tests.bench.measured_figures import Experiment, Figure, Run
from tests.bench.subprocesses import in_child, own_cpu_s
from trackhub.delivery import FederationOptions, Receiver
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.limits import Limits

__all__ = ["aggregates"]

_SITES = 2
_ARMS: dict[str, FederationOptions | None] = {
    "no federation run": None,
    "keys of a round": FederationOptions(),
    "a key of every step": FederationOptions(("train/loss",)),
}


def aggregates(quick: bool) -> list[Experiment]:
    """Return the experiment that compares a receiver with one that writes no federation run."""
    records = 40_000 if quick else 400_000
    figures = [
        Figure(f"CPU of the receiver, {arm}", "no federation run", "us", arm, "no federation run", "us/record",
               "times less", 1 / 1.05)
        for arm in list(_ARMS)[1:]
    ]  # fmt: skip
    return [Experiment("aggregates", {arm: _arm(arm, records) for arm in _ARMS}, figures, 2 if quick else 5)]


def _arm(arm: str, records: int) -> Callable[[Path], Run]:
    def run(folder: Path) -> Run:
        result = in_child("federation_costs:receive", folder=str(folder), arm=arm, records=records)
        return Run({"us": result["cpu_s"] / records * 1e6}, records, result["stored"])

    return run


def receive(folder: str, arm: str, records: int) -> dict[str, Any]:
    """Have a receiver take and deliver the records of all sites."""
    load = {f"site-{i + 1}": list(requests(records // _SITES)) for i in range(_SITES)}
    receiver = Receiver(
        Path(folder), job="job", side=Side.SERVER, backends={"jsonl": {}}, limits=Limits(deadline_s=1800),
        federation=_ARMS[arm],
    )  # fmt: skip
    receiver.start()
    begin = own_cpu_s()
    feed(receiver, load)
    report = receiver.finish(RunStatus.FINISHED)
    cpu_s = own_cpu_s() - begin
    return {"cpu_s": cpu_s, "stored": sum(site.journaled for name, site in report.sites.items() if name in load)}
