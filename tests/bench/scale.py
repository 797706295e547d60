# SPDX-License-Identifier: Apache-2.0
"""A thousand sites at one receiver core, with a real journal and real lanes, against two sites with the same load."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.bench.child import in_child, own_cpu_s, peak_mb, resident_mb
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.bench.stores import count_event_files, count_mlflow

__all__ = ["experiments"]

_SITES = 1000


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    each = 20 if quick else 1000
    total = _SITES * each
    backends = ["tensorboard", "mlflow"]
    many, few = _arm(_SITES, each, backends), _arm(2, total // 2, backends)
    tb_many, tb_few = _arm(_SITES, each, ["tensorboard"]), _arm(2, total // 2, ["tensorboard"])
    label = f"1,000 sites x {each:,} records"
    against = f"2 sites x {total // 2:,}"
    explain = "opening a thousand MLflow runs, some 10 ms each in MLflow's own code, is most of the difference"
    figures = [
        Figure(f"{label} into TensorBoard and MLflow", against, "rate", "many", "few", "records/s", "times more", 0.8,
               explain),
        Figure("open files of the sink at 1,000 sites", "", "files", "many", "", "files", "at most", 64),
    ]  # fmt: skip
    tb_figures = [
        Figure(f"{label} into TensorBoard", against, "rate", "many", "few", "records/s", "times more", 0.8,
               "a run is opened, its folder and two files made, and ended with an fsync, a thousand times"),
        Figure("memory of an idle site at the sink", "", "idle_kb", "many", "", "KB", "at most", 50),
    ]  # fmt: skip
    return [
        Experiment("1,000 sites, TensorBoard", {"many": tb_many, "few": tb_few}, tb_figures, 1 if quick else 5),
        # A million points take MLflow a minute; its ratio varies little.
        Experiment("1,000 sites, TensorBoard and MLflow", {"many": many, "few": few}, figures, 1),
    ]


def _arm(sites: int, each: int, backends: list[str]) -> Arm:
    def run(folder: Path) -> Run:
        result = in_child("scale:load", 1800.0, folder=str(folder), sites=sites, each=each, backends=backends)
        return Run(result["values"], sites * each, result["stored"])

    return run


def load(folder: str, sites: int, each: int, backends: list[str], keys: int = 1) -> dict[str, Any]:
    """Feed one receiver from eight threads, and wait until all is confirmed."""
    from tests.bench.load import feed, open_receiver, requests
    from trackhub.run import RunStatus

    root = Path(folder)
    names = [f"site-{i + 1:04d}" for i in range(sites)]
    # Every site sends the same records under a name of its own, so the requests are made once.
    prepared = list(requests(each, keys=keys))
    hello, batches, bye = prepared[:1], prepared[1:-1], prepared[-1:]
    receiver = open_receiver(root, {name: {} for name in backends})
    before_mb = resident_mb()
    begin, cpu = time.perf_counter(), own_cpu_s()
    feed(receiver, dict.fromkeys(names, hello + batches + bye))
    accepted = time.perf_counter() - begin
    files = len(list(Path("/proc/self/fd").iterdir()))
    report = receiver.finish(RunStatus.FINISHED)
    seconds = time.perf_counter() - begin
    stored = [sum(site.journaled for site in report.sites.values())]
    stored += [sum(run.confirmed for run in report.lanes[name].values()) for name in backends]
    if "tensorboard" in backends:
        stored.append(count_event_files(root / "tensorboard") // keys)
    if "mlflow" in backends:
        stored.append(count_mlflow(root / "mlflow" / "mlflow.db") // keys)
    values = {
        "rate": sites * each / seconds,
        "accepted_rate": sites * each / accepted,
        "cpu_us": (own_cpu_s() - cpu) / (sites * each) * 1e6,
        "files": files,
        "idle_kb": (peak_mb() - before_mb) / sites * 1024,
    }
    return {"values": values, "stored": min(stored)}
