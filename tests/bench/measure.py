# SPDX-License-Identifier: Apache-2.0
"""Run one job with one arm, and measure it from outside: what it stored, what it took, what a call cost."""

from __future__ import annotations

import array
import itertools
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from tests.bench.arms import Arm
from tests.integration.harness import Job, JobResult

__all__ = ["Measurement", "measure"]


@dataclass(frozen=True)
class Measurement:
    """One run of one arm. Times in seconds; ``call_*`` are of the training script's log calls.

    Attributes:
        stored: points found in the backend's own files.
        duplicates: of these, the ones that stand there more than once.
        reordered: neighbours of one site that are stored in the wrong order.
        cpu_s: of all processes of the job.
        rate: stored points per second, from the first log call to the last write to the files.
        lag_s: from the last log call to the last write to the files.
    """

    arm: str
    external: bool
    logged: int
    stored: int
    duplicates: int
    reordered: int
    wall_s: float
    cpu_s: float
    call_median_s: float
    call_p99_s: float
    rate: float
    lag_s: float

    @property
    def lost(self) -> int:
        """Points that were logged and are not in the backend's files."""
        return self.logged - (self.stored - self.duplicates)


def measure(
    arm: Arm, folder: Path, *, external: bool, records: int, rounds: int, sites: int, pause_s: float
) -> Measurement:
    """Run the job and read back what it left.

    Raises:
        RuntimeError: the job failed, so there is nothing to compare.
    """
    job = Job(
        folder,
        arm.trainer(records, pause_s),
        tracking=arm.tracking,
        external=external,
        n_clients=sites,
        rounds=rounds,
        more=arm.more,
    )
    before, start = _children_cpu_s(), time.perf_counter()
    result = job.run(timeout_s=1200)
    wall_s, cpu_s = time.perf_counter() - start, _children_cpu_s() - before
    if result.rc != 0:
        raise RuntimeError(f"the job with {arm.name} failed; its log ends:\n{result.log[-3000:]}")
    names = [f"site-{i + 1}" for i in range(sites)]
    calls, first, last = _calls(result, names)
    logged = 0 if arm.read is None else len(calls)
    stored, duplicates, reordered, written = _stored(arm, result, names)
    return Measurement(
        arm.name, external, logged, stored, duplicates, reordered, wall_s, cpu_s,
        statistics.median(calls), calls[min(len(calls) - 1, int(len(calls) * 0.99))],
        stored / max(written - first, 1e-9) if stored else 0.0, written - last if stored else 0.0,
    )  # fmt: skip


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _calls(result: JobResult, sites: list[str]) -> tuple[list[float], float, float]:
    """Return how long each log call took, sorted, and the times of the first and the last one."""
    calls: list[float] = []
    begins, ends = [], []
    for site in sites:
        for path in result.out.glob(f"{site}-*.calls"):
            values = array.array("d")
            values.frombytes(path.read_bytes())
            begins.append(values[0])
            ends.append(values[1])
            calls.extend(values[2:])
    return sorted(calls), min(begins), max(ends)


def _stored(arm: Arm, result: JobResult, sites: list[str]) -> tuple[int, int, int, float]:
    stored = duplicates = reordered = 0
    written = 0.0
    if arm.read is None or arm.files is None:
        return stored, duplicates, reordered, written
    for site in sites:
        steps = [point.step or 0 for point in arm.read(result, site)]
        stored += len(steps)
        duplicates += len(steps) - len(set(steps))
        reordered += sum(a > b for a, b in itertools.pairwise(steps))
        files = [path.stat().st_mtime for path in arm.files(result, site).glob("events*")]
        written = max([written, *files])
    return stored, duplicates, reordered, written
