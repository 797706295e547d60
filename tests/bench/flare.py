# SPDX-License-Identifier: Apache-2.0
"""Real FLARE jobs in the simulator: FLARE's own writers and receivers against trackhub's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from tests.bench.arms import NONE, STOCK_TENSORBOARD, STOCK_WANDB, Way, flare_arm, trackhub_into
from tests.bench.backends import bare, end_to_end
from tests.bench.figures import Arm, Experiment, Figure, Run

__all__ = ["experiments"]

_SINK = (
    "the trainers need half a second for their calls; the rest is the receiver's work on all records, some 7 us each in "
    "one process, of which TensorBoard's protobuf is the largest part"
)


def experiments(quick: bool) -> list[Experiment]:
    """Return the group's experiments."""
    if quick:
        return [_in_process(300, 1_000, 20_000, 0, 1), _external(300, 300, 1)]
    return [_in_process(300, 1_000, 100_000, 300, 5), _external(300, 10_000, 5), _processes()]


def _calls(mode: str, reach: float, against_arm: str) -> list[Figure]:
    """What a call costs the training thread, with everything else of the job going on."""
    against = f"FLARE's WandBWriter.log, {mode}"

    def less(what: str, value: str, reach: float) -> Figure:
        return Figure(what, against, value, "trackhub", against_arm, "us", "times less", reach)

    figures = []
    for what, prefix in (("one metric", ""), ("ten metrics", "ten_")):
        figures += [
            less(f"Writer.log in a job, {mode}, {what}: median", f"{prefix}median_us", reach),
            less(f"Writer.log in a job, {mode}, {what}: p99", f"{prefix}p99_us", 100),
        ]
    return [*figures, less(f"Writer.log in a job, {mode}: CPU of the thread", "thread_cpu_us", 10)]


def _external(calls: int, records: int, repeat: int) -> Experiment:
    """Trainers in processes of their own, into W&B: what calls cost and leave in memory, and the rate of whole jobs.

    With few records the rate would be that of the start, and is left out.
    """
    arms = {
        "trackhub": flare_arm(trackhub_into("wandb"), records=records, tens=calls, external=True),
        "stock": flare_arm(STOCK_WANDB, records=calls, tens=calls // 4, external=True),
    }
    figures = [
        *_calls("external", 20, "stock"),
        Figure(f"growth of an external trainer's memory, {records + calls:,} calls",
               f"FLARE's WandBWriter.log, {calls + calls // 4:,} calls",
               "trainer_mb", "trackhub", "stock", "MB", "at most", 30),
    ]  # fmt: skip
    if records > calls:
        arms["bare"] = bare("wandb", records, 2)
        figures.append(end_to_end("wandb", records, "trackhub"))
    return Experiment("whole job, external", arms, figures, repeat)


def _in_process(calls: int, stock_records: int, records: int, paced: int, repeat: int) -> Experiment:
    """Trainers in the client's process: what calls cost, and CPU, rate and lag of whole jobs into TensorBoard.

    All log as fast as they can; where calls are compared, first ``paced`` ones at a pace as training has.
    FLARE's own rate does not rise with the records. From the CPU time is taken off what a job without tracking takes,
    measured once.
    """
    idle_s: list[float] = []
    untracked = flare_arm(NONE, records=records)

    def idle(folder: Path) -> Run:
        done = untracked(folder)
        idle_s.append(done.values["job_cpu_s"])
        return done

    def tracked(way: Way, records: int, tens: int = 0, paced: int = 0) -> Arm:
        arm = flare_arm(way, records=records, tens=tens, paced=paced)

        def run(folder: Path) -> Run:
            if not idle_s:
                raise RuntimeError("the job without tracking failed, whose CPU time is to be taken off")
            done = arm(folder)
            cpu_us = (done.values["job_cpu_s"] - idle_s[0]) / (2 * (records + tens)) * 1e6
            return replace(done, values={**done.values, "cpu_us": cpu_us})

        return run

    arms = {
        "none": idle,
        "stock": tracked(STOCK_TENSORBOARD, stock_records),
        "stock wandb": flare_arm(STOCK_WANDB, records=calls, tens=calls // 4, paced=paced),
        "trackhub": tracked(trackhub_into("tensorboard"), records, calls, paced),
    }
    against = f"FLARE's own, 2 sites x {stock_records:,}"
    what = f"2 sites x {records:,} into TensorBoard"
    figures = [
        *_calls("in process", 200, "stock wandb"),
        *(_at_pace(paced) if paced else ()),
        Figure(f"{what}: CPU of the job per record", against, "cpu_us", "trackhub", "stock", "us", "times less", 50),
        Figure(f"{what}: rate", against, "rate", "trackhub", "stock", "records/s", "times more", 60),
        Figure(f"{what}: lag, to 99.5 % of the bytes", against, "lag_s", "trackhub", "stock", "s", "at most", 2, _SINK),
    ]  # fmt: skip
    return Experiment("whole job, in process", arms, figures, repeat, once=frozenset({"none"}))


def _at_pace(calls: int) -> list[Figure]:
    """What a call costs and loses at 100 a second. Both find cold caches and a core that slept."""
    against, what = "FLARE's WandBWriter.log, in process", "Writer.log in a job, in process, 100 calls a second"
    return [
        Figure(f"{what}: median", against, "paced_median_us", "trackhub", "stock wandb", "us", "times less", 10),
        Figure(f"{what}: p99", against, "paced_p99_us", "trackhub", "stock wandb", "us", "times less", 10),
        Figure(f"lost of 2 x {calls} calls, 100 a second", against, "paced_lost", "trackhub", "stock wandb", "records",
               "at most", 0),
    ]  # fmt: skip


def _processes() -> Experiment:
    """How many processes W&B adds; a count, so once is enough."""
    arms = {
        "trackhub": flare_arm(trackhub_into("wandb"), records=50, sites=16, count_processes=True),
        "stock": flare_arm(STOCK_WANDB, records=50, sites=4, count_processes=True, timeout_s=240),
    }
    figure = Figure(
        "processes that 16 W&B sites add", "FLARE's own with 4 sites (with 16 it hangs)", "extra_processes", "trackhub",
        "stock", "processes", "at most", 2,
    )  # fmt: skip
    return Experiment("processes", arms, [figure], repeat=1)
