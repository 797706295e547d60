# SPDX-License-Identifier: Apache-2.0
"""One FLARE job in the simulator, tracked in one way: what it stored, and how much time, CPU and memory it took.

`job_costs` and `backend_rates` make their arms of it. It runs jobs with ``tests.integration.harness``, and measures
them from outside.
"""

from __future__ import annotations

import array
import functools
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.bench.measured_figures import Arm, Run
from tests.bench.store_counts import count_event_points, count_mlflow, count_wandb
from tests.bench.subprocesses import children_cpu_s, kept_folder
from tests.integration.harness import Job, JobResult, processes_with, simulate

__all__ = ["NONE", "STOCK_TENSORBOARD", "STOCK_WANDB", "UNEDITED", "Way", "flare_arm", "trackhub_into"]

_TRAINER = """
    import array, time
    {prepare}

    TEN = {{f"metric_{{i}}": 0.5 for i in range(10)}}


    def peak_mb():
        # Not ru_maxrss: it begins with the memory that the parent process had before exec.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


    def train(current_round):
        calls = array.array("d")
        clock = time.perf_counter
        key = "paced"
        for step in range({paced}):
            before = clock()
            {log}
            calls.append(clock() - before)
            time.sleep({pause_s})
        time.sleep({settle_s})
        key = "loss"
        memory, begin, cpu = peak_mb(), time.time(), time.thread_time()
        for step in range({paced}, {paced} + {records}):
            before = clock()
            {log}
            calls.append(clock() - before)
        cpu, end = time.thread_time() - cpu, time.time()
        for step in range({paced} + {records}, {paced} + {records} + {tens}):
            before = clock()
            {log_ten}
            calls.append(clock() - before)
        head = [begin, end, time.time(), cpu, peak_mb() - memory]
        with open(os.path.join(OUT, f"{{SITE}}.calls"), "wb") as file:
            array.array("d", head).tofile(file)
            calls.tofile(file)


    rounds(train)
"""
_HEAD = 5
_PAUSE_S = 0.01
_SETTLE_S = 1.0
_IMPORT_TORCH = """
import torch
from nvflare.apis.fl_component import FLComponent


class ImportTorch(FLComponent):
    pass
"""
_TORCH = "from import_torch import ImportTorch\njob.to_server(ImportTorch(), id='import_torch')\n"
_FLARE_PROCESSES = 3  # the simulator and its two helpers; each client adds one


@dataclass(frozen=True)
class Way:
    """One way to track a job.

    Attributes:
        prepare: source that makes a writer in the training script.
        log, log_ten: source that logs one metric with the name ``key``, or ten metrics.
        tracking: arguments of ``add_tracking``; None leaves the call out.
        more: further source that changes the job.
        read: takes a job's result, a site and a text. Returns how many metric values of the site are in the store,
            each counted once, with the text in their key.
        files: pattern of the files that the store writes, below the server's run folder.
    """

    name: str
    prepare: str = ""
    log: str = "pass"
    log_ten: str = "pass"
    tracking: dict[str, Any] | None = None
    more: str = ""
    read: Callable[[JobResult, str, str], int] | None = None
    files: str = ""


def _stock(tracking: str, config: str, writer: str, log: str, log_ten: str, **more: Any) -> Way:
    return Way(
        f"stock {tracking}",
        f"from nvflare.client.tracking import {writer}\n    writer = {writer}()",
        log,
        log_ten,
        more="from nvflare.recipe.utils import add_experiment_tracking\n"
        f'add_experiment_tracking(recipe, "{tracking}", {config})',
        **more,
    )


NONE = Way("none")

STOCK_TENSORBOARD = _stock(
    "tensorboard", "{}", "SummaryWriter",
    "writer.add_scalar(key, float(step), global_step=step)",
    "[writer.add_scalar(key, value, global_step=step) for key, value in TEN.items()]",
    read=lambda result, site, key: count_event_points(result.run_dir("server") / "tb_events" / site, key),
    files="tb_events/**/events*",
)  # fmt: skip

STOCK_WANDB = _stock(
    "wandb",
    '{"mode": "offline", "wandb_args": {"name": "run", "project": "bench", "group": "bench", "job_type": "bench"}}',
    "WandBWriter",
    "writer.log({key: float(step)}, step)",
    "writer.log(TEN, step)",
    # FLARE writes all sites into one folder of the server. The rows are counted once for all sites.
    read=lambda result, site, key: count_wandb(result.workspace.parent, key) if site == "site-1" else 0,
)


def trackhub_into(backend: str) -> Way:
    """Return the way with ``trackhub.Writer`` and this backend on the server."""
    folders = {"tensorboard": "tensorboard/**/events*", "mlflow": "mlflow/mlflow.db", "wandb": "wandb/**/*.wandb"}

    def read(result: JobResult, site: str, key: str) -> int:
        run_dir = result.run_dir("server")
        if backend == "tensorboard":
            return count_event_points(run_dir / "tensorboard" / result.job.unique_name / site, key)
        if backend == "mlflow":
            return count_mlflow(run_dir / "mlflow" / "mlflow.db", key) if site == "site-1" else 0
        return count_wandb(run_dir / "wandb", key) if site == "site-1" else 0

    options = {"wandb": {"mode": "offline"}}.get(backend, {})
    return Way(
        f"trackhub {backend}", "import trackhub\n    writer = trackhub.Writer()",
        "writer.log({key: float(step)}, step)", "writer.log(TEN, step)",
        tracking={"server": {backend: options}}, read=read, files=folders[backend],
    )  # fmt: skip


UNEDITED = replace(
    STOCK_TENSORBOARD, name="unedited", more="", tracking={"server": {"tensorboard": {}}},
    read=trackhub_into("tensorboard").read, files=trackhub_into("tensorboard").files,
)  # fmt: skip
"""The script of ``STOCK_TENSORBOARD``, unedited, in a job with trackhub."""


def flare_arm(
    way: Way, *, records: int, tens: int = 0, paced: int = 0, sites: int = 2, external: bool = False,
    count_processes: bool = False, timeout_s: float = 900,
) -> Arm:  # fmt: skip
    """Return an arm that runs the job.

    The server imports torch at its start, as the server of a PyTorch job does. FLARE would import it otherwise when
    the job ends, and all lanes would stand still for a second and a half.

    Args:
        way: how the job is tracked.
        records: calls with one metric from each site, as fast as possible.
        tens: calls with ten metrics from each site, after these.
        paced: calls before all others, at most a hundred a second. A pause follows them.
        sites: how many sites.
        external: whether trainers are processes of their own.
        count_processes: also count the job's processes.
        timeout_s: the longest time that the job may take.

    Returns:
        An arm with these values: ``median_us``, ``p99_us`` and ``thread_cpu_us`` of a call with one metric.
        ``ten_median_us`` and ``ten_p99_us`` of a call with ten. ``paced_median_us`` and ``paced_p99_us`` of a paced
        call, and ``paced_lost``, how many of these are not stored; nothing else counts them. ``job_cpu_s`` of all
        processes of the job. ``rate``: stored calls per second, from the first call until the store has 99.5 % of its
        bytes. ``lag_s``: from the last call until then. ``trainer_mb``: how much the training process grew.
        ``extra_processes``: those beside FLARE's own.
    """

    source = _TRAINER.format(
        prepare=way.prepare, paced=paced, records=records, tens=tens, log=way.log, log_ten=way.log_ten,
        pause_s=_PAUSE_S, settle_s=_SETTLE_S if paced else 0,
    )  # fmt: skip

    @functools.cache
    def exported() -> Path:
        """Write the job once for all rounds. It is kept until this process ends."""
        job = Job(
            kept_folder("job"), source, tracking=way.tracking, external=external, n_clients=sites, rounds=1,
            more=_TORCH + way.more, modules={"import_torch": _IMPORT_TORCH},
        )  # fmt: skip
        return job.export()

    def run(folder: Path) -> Run:
        job, before = exported(), children_cpu_s()
        run_dir = folder / "workspace" / "server" / "simulate_job"
        with _ProcessCounter(folder if count_processes else None) as counter, _Growth(run_dir, way.files) as growth:
            result = simulate(job, folder, n_clients=sites, timeout_s=timeout_s)
        cpu_s = children_cpu_s() - before
        if result.rc != 0:
            raise RuntimeError(f"the job failed; its log ends: {result.log[-500:]}")
        values = {"job_cpu_s": cpu_s}
        if count_processes:
            values["extra_processes"] = counter.most - _FLARE_PROCESSES - sites
        names = [f"site-{i + 1}" for i in range(sites)]
        return _with_stored(way, result, values, names, paced, records, tens, growth.end())

    return run


def _with_stored(
    way: Way, result: JobResult, values: dict[str, float], sites: list[str], paced: int, records: int, tens: int,
    written: float,
) -> Run:  # fmt: skip
    slow, ones, ten, first, last = list[float](), list[float](), list[float](), float("inf"), 0.0
    memory, cpu = 0.0, 0.0
    for site in sites:
        numbers = array.array("d")
        numbers.frombytes((result.out / f"{site}.calls").read_bytes())
        begin, _, end, thread_cpu, grown = numbers[:_HEAD]
        first, last, memory, cpu = min(first, begin), max(last, end), max(memory, grown), cpu + thread_cpu
        slow += numbers[_HEAD : _HEAD + paced]
        ones += numbers[_HEAD + paced : _HEAD + paced + records]
        ten += numbers[_HEAD + paced + records :]
    values |= {"trainer_mb": memory, "thread_cpu_us": cpu / len(ones) * 1e6}
    for name, calls in (("", sorted(ones)), ("ten_", sorted(ten)), ("paced_", sorted(slow))):
        if calls:
            values[f"{name}median_us"] = calls[len(calls) // 2] * 1e6
            values[f"{name}p99_us"] = calls[min(len(calls) - 1, int(len(calls) * 0.99))] * 1e6
    if way.read is None:
        return Run(values)
    at_pace = 0
    if paced:  # otherwise a second reading of the store would cost seconds for nothing
        at_pace = sum(way.read(result, site, "paced") for site in sites)
        values["paced_lost"] = len(sites) * paced - at_pace
    stored = sum(way.read(result, site, "") for site in sites) - at_pace
    if not stored:
        raise RuntimeError(f"{way.name} stored nothing, so there is nothing to compare with")
    logged = len(sites) * (records + (tens if "wandb" in way.name else 10 * tens))
    if way.files:
        made = len(sites) * (records + tens)
        values["rate"] = made * stored / logged / max(written - first, 1e-9)
        values["lag_s"] = written - last
    return Run(values, logged, stored)


class _Growth:
    """Watches how the files of a store grow.

    So it can tell when the last records came; the end of a run writes to the files as well, later.
    """

    def __init__(self, run_dir: Path, pattern: str) -> None:
        self._run_dir = run_dir
        self._pattern = pattern
        self._seen: list[tuple[float, int]] = [(0.0, 0)]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Growth:
        if self._pattern:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._pattern:
            self._thread.join()

    def end(self) -> float:
        """Return when the files had 99.5 % of their final size, in unix seconds."""
        enough = max(size for _, size in self._seen) * 0.995
        return next(at for at, size in self._seen if size >= enough)

    def _watch(self) -> None:
        while not self._end.wait(0.1):
            paths = self._run_dir.glob(self._pattern) if self._run_dir.is_dir() else ()
            size = sum(_size(path) for path in paths)
            if size > self._seen[-1][1]:
                self._seen.append((time.time(), size))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


class _ProcessCounter:
    """Samples how many processes a job has: those with its folder in their environment."""

    def __init__(self, folder: Path | None) -> None:
        self.most = 0
        self._mark = str(folder).encode() if folder else b""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _ProcessCounter:
        if self._mark:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._mark:
            self._thread.join()

    def _watch(self) -> None:
        for _ in itertools.takewhile(lambda _: not self._end.wait(0.5), itertools.count()):
            self.most = max(self.most, sum(1 for _ in processes_with(self._mark)))
