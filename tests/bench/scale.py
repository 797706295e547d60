# SPDX-License-Identifier: Apache-2.0
"""A thousand sites at one receiver core, with a real journal and real lanes, against two sites with the same load."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from tests.bench.backends import bare
from tests.bench.child import in_child, own_cpu_s, peak_mb, resident_mb
from tests.bench.figures import Arm, Experiment, Figure, Run
from tests.bench.load import BATCH, feed, open_receiver, requests
from tests.bench.stores import count_mlflow
from trackhub.run import RunStatus

__all__ = ["experiments"]

_EACH = 1000
_FIRST_BATCH = (
    "MLflow's own log_batch takes half as long again for the first batch of a run as for a later one, and with 1,000 "
    "records each, every site's batch is its first: the next figure has as many runs on both sides"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    label = f"1,000 sites x {_EACH:,} records into TensorBoard"
    load = Experiment(
        "1,000 sites, TensorBoard",
        {"many": _arm(1000, ["tensorboard"]), "few": _arm(2, ["tensorboard"], 1000)},
        [
            Figure(label, "2 sites with as many", "rate", "many", "few", "records/s", "times more", 0.8,
                   "a run is opened, its folder and files made, and ended with an fsync, a thousand times"),
            Figure("memory of an idle site at the receiver", "", "idle_kb", "many", "", "KB", "at most", 50),
            Figure("open files of the receiver at 1,000 sites", "", "files", "many", "", "files", "at most", 64),
        ],
        repeat=1 if quick else 5,
    )  # fmt: skip
    if quick:
        return [load]
    # Costs are linear in the sites, and MLflow takes two minutes for a million points: 100 sites show the same ratio.
    both = ["tensorboard", "mlflow"]
    label = f"100 sites x {_EACH:,} records into TensorBoard and MLflow"
    arms = {"many": _arm(100, both), "few": _arm(2, both, 100), "bare": bare("mlflow", _EACH, 100)}
    figures = [
        Figure(label, "2 sites with as many", "rate", "many", "few", "records/s", "times more", 0.8, _FIRST_BATCH),
        Figure(label, "MLflow's log_batch, 100 runs, nothing else", "rate", "many", "bare", "records/s",
               "times more", 0.8),
    ]  # fmt: skip
    return [load, Experiment("100 sites, both", arms, figures, repeat=1)]


def _arm(sites: int, backends: list[str], as_of: int = 0) -> Arm:
    each = _EACH * as_of // sites if as_of else _EACH

    def run(folder: Path) -> Run:
        result = in_child("scale:load", 1800.0, folder=str(folder), sites=sites, each=each, backends=backends)
        return Run(result["values"], sites * each, result["stored"])

    return run


def load(
    folder: str, sites: int, each: int, backends: list[str], keys: int = 1, batch: int = BATCH
) -> dict[str, Any]:  # fmt: skip
    """Feed one receiver from eight threads, and wait until all is confirmed."""
    root = Path(folder)
    names = [f"site-{i + 1:04d}" for i in range(sites)]
    # Every site sends the same records under a name of its own, so the requests are made once.
    prepared = list(requests(each, keys=keys, batch=batch))
    hello, batches, final = prepared[:1], prepared[1:-1], prepared[-1:]
    receiver = open_receiver(root, {name: {} for name in backends})
    before_mb = resident_mb()
    begin, cpu = time.perf_counter(), own_cpu_s()
    feed(receiver, dict.fromkeys(names, hello + batches + final))
    accepted = time.perf_counter() - begin
    files = len(list(Path("/proc/self/fd").iterdir()))
    report = receiver.finish(RunStatus.FINISHED)
    seconds = time.perf_counter() - begin
    stored = [sum(site.journaled for site in report.sites.values())]
    stored += [sum(run.confirmed for run in report.lanes[name].values()) for name in backends]
    if "tensorboard" in backends:
        stored.append(_count_events(root / "tensorboard") // keys)
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


def _count_events(folder: Path) -> int:
    """Return the number of scalars by their tags, since a million protobuf messages take a minute to decode.

    Tags stand in the plugin's own marks as well, but between quotes.
    """
    contents = (path.read_bytes() for path in folder.rglob("*.trackhub"))
    return sum(content.count(b"train/") - content.count(b'"train/') for content in contents)
