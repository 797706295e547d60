# SPDX-License-Identifier: Apache-2.0
"""What a job must have left after all faults, from the trainers' notes alone.

The model is small: each writer made its calls 0, 1, 2 and so on, and noted how many of them returned. Each of these is
in every backend once, or the site counted it with a reason. A writer's files keep their order, and so do its other
records. `tests.faults.random_faults` calls `check_model` when nothing of the job runs any more.
"""

from __future__ import annotations

from itertools import pairwise

from tests.faults.independent_readers import count_receiver, count_site, read_times
from tests.faults.job_processes import JobProcesses
from tests.faults.trainer_calls import Notes, files_last

__all__ = ["check_model"]

_MAY_DROP = {"disk_full", "spool_full"}
_JUMP_S = 0.3
"""The clock moved within a call if its two readings differ by more than this."""


def check_model(job: JobProcesses, *, doubtful: set[str], may_drop: bool) -> None:
    """Check every record of every backend against the trainers' notes, and every count against the readers' counts.

    Args:
        job: has ended, and was replayed.
        doubtful: the writers that were killed.
        may_drop: whether sites may have dropped records.

    Raises:
        AssertionError: a record is lost without a count, is there twice, or is out of order; or a count is wrong.
    """
    job.check_equations()
    said = job.check_status()
    assert all(spool["receivers"]["server"]["spooled"] == 0 for spool in said["spools"]), said["spools"]
    received = count_receiver(job.journal)
    for site in job.sites():
        here = count_site(job.spool(site))
        assert here.dropped.keys() <= (_MAY_DROP if may_drop else set()), here
        assert not here.refused, here
        for lane, count in received[site].lanes.items():
            assert not count.rejected, (lane, count)
            settled = count.confirmed + sum(count.rejected.values())
            assert settled == received[site].journaled, (lane, count, received[site])
        gone: dict[str, set[str]] = {name: _missing(job, name, site, doubtful) for name in job.backends}
        everywhere = gone.pop("jsonl")
        lost = here.dropped.total()
        job.counted += lost
        mine = [name for name in doubtful if job.writers[name] == site]
        assert lost - len(mine) <= len(everywhere) <= lost, (
            f"{site}: {len(everywhere)} records are not in jsonl, {lost} were counted: {sorted(everywhere)[:9]}"
        )
        for name, missing in gone.items():
            assert missing == everywhere, f"{name} differs from jsonl at {site}"
        _check_times(job, site)


def _missing(job: JobProcesses, backend: str, site: str, doubtful: set[str]) -> set[str]:
    """Return the calls of a site that a backend does not hold. Check that it holds the others once and in order."""
    found = job.held(backend, site)
    writers = [name for name, where in job.writers.items() if where == site]
    assert {seen.key.partition("/")[0] for seen in found} <= set(writers), backend
    if backend == "at_least_once":
        counted = count_receiver(job.journal)[site].lanes[backend].possible_duplicates
        assert len(found) - len(set(found)) <= counted, f"{backend}: {len(found) - len(set(found))} twice, {counted}"
        found = list(dict.fromkeys(found))
    missing = set()
    for name in writers:
        noted = job.count(name)
        number = {seen: i for i, seen in enumerate(job.truth(name, noted + (name in doubtful), "jsonl"))}
        mine = [seen for seen in found if seen.key.startswith(f"{name}/")]
        unknown = [seen for seen in mine if seen not in number]
        assert not unknown, f"{backend} holds what {name} never logged: {unknown[:3]}; {noted} calls returned"
        if backend == "tensorboard":  # its reader gives one key after the other
            order = sorted(mine, key=lambda seen: number[seen])
            for key in {seen.key for seen in mine}:
                assert [s for s in mine if s.key == key] == [s for s in order if s.key == key], f"{backend}: {key}"
            mine = order
        kept = [(("/file-" in seen.key, number[seen]), seen) for seen in files_last(mine)]
        bad = [(a, b) for (at, a), (then, b) in pairwise(kept) if at >= then]
        assert not bad, f"{backend}: records of {name} are there twice or out of order: {bad[:3]}"
        held = {number[seen] for seen in mine}
        must = job.truth(name, noted, "jsonl")
        lost = (i for i in range(noted) if i not in held)
        missing |= {f"{name}: call {i}, {must[i].key}" for i in lost}
    return missing


def _check_times(job: JobProcesses, site: str) -> None:
    """Check that the stored times are those of the log calls, also where the clock moved."""
    times = read_times(job.folder / "server" / "jsonl" / "job-1" / f"{site}.jsonl")
    notes = {name: Notes(job.folder / name) for name in job.writers}
    for (key, step), at in times.items():
        writer = notes[key.partition("/")[0]]
        if step < writer.count():
            before, after = writer.times(step)
            jumped = not 0 <= after - before < _JUMP_S
            assert before <= at <= after or jumped, (key, step, before, at, after)
