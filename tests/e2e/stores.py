# SPDX-License-Identifier: Apache-2.0
"""Reads every backend's store back by another door, and says what it must hold under its declared canonical form."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from trackhub_mlflow.contract import MLflowContract
from trackhub_tensorboard.contract import TensorBoardContract
from trackhub_wandb.contract import WandBContract, add_row
from trackhub_wandb.offline_readback import parse_integer

from tests.integration.harness import Fact
from tests.support.wandb_emulator import Emulator
from trackhub.job_and_run_info import JobInfo, RunInfo, Side
from trackhub.spi import Kind
from trackhub.testing import ContractHooks, Point, ReadBack, StoreContext
from trackhub.testing.contracts.jsonl import JsonlContract

__all__ = [
    "BACKENDS",
    "canonical",
    "own_home",
    "read_emulator",
    "read_run",
    "same_points",
    "were_logged",
]

BACKENDS: dict[str, dict[str, Any]] = {"jsonl": {}, "tensorboard": {}, "mlflow": {}, "wandb": {"mode": "offline"}}
"""Every first-party backend, with the options that keep it in the job's folder."""

# What a contract class is given by pytest is not needed for reading.
_HOOKS: dict[str, ContractHooks] = {
    "jsonl": JsonlContract(),
    "tensorboard": TensorBoardContract(),
    "mlflow": MLflowContract(),
    "wandb": WandBContract(),
}
_OPTIONAL_STEP = frozenset({"jsonl"})


def read_run(
    backend: str, run_dir: Path, job: JobInfo, site: str, side: Side, options: Mapping[str, Any] | None = None
) -> ReadBack:
    """Return what a backend that works in this run folder holds of a run."""
    context = StoreContext(
        workdir=run_dir / backend,
        job=job,
        side=side,
        options=BACKENDS[backend] if options is None else options,
    )
    return _HOOKS[backend].read_back(_info(job, site, side), context)


def read_emulator(server: Emulator, job: JobInfo, site: str, side: Side) -> ReadBack:
    """Return what the W&B emulator holds of a run."""
    with server.state.lock:
        held = server.state.runs[_info(job, site, side).run_id]
        found = ReadBack(points=[], params={}, tags={}, texts=[], images=[], histograms=[], tables=[], artifacts=[])
        found.params = held.params()
        entry = found.params.pop("trackhub")
        summary = json.loads(held.summary, parse_int=parse_integer)
        found.tags, found.summary = entry.get("tags", {}), {key: summary[key] for key in entry.get("summary", {})}
        for row in held.rows:
            add_row(found, json.loads(row, parse_int=parse_integer), held.files.__getitem__)
        found.status = None if held.state == "running" else held.state
    return found


def _info(job: JobInfo, site: str, side: Side) -> RunInfo:
    return RunInfo(job, site, side, 0.0, 0, Path())


def were_logged(facts: Iterable[Fact], points: Iterable[Point]) -> None:
    """Check that these points are what the trainer noted: in order, with times within the readings around the call."""
    noted, found = list(facts), list(points)
    assert [(p.key, p.step) for p in found] == [(f.key, f.step) for f in noted]
    for fact, point in zip(noted, found, strict=True):
        assert point.value == fact.value or (math.isnan(point.value) and math.isnan(fact.value)), (fact, point)
        assert point.time is not None
        assert fact.before <= point.time <= fact.after, (fact, point)


def canonical(backend: str, logged: Iterable[Point], *, online: bool = False) -> list[Point]:
    """Return the points of one run as this backend declares that it keeps them.

    Args:
        online: for W&B, whether a server has them; its client sends it no negative zero.
        logged: exact key, value, step and time, in the order of the calls, from one writer.
    """
    hooks = _HOOKS[backend]
    kept: list[Point] = []
    ordinals: Counter[str] = Counter()
    for point in logged:
        step = point.step
        if step is None and backend not in _OPTIONAL_STEP:
            step = ordinals[point.key]
            ordinals[point.key] += 1
        assert point.time is not None
        kept.append(
            Point(
                hooks.canonical_key(Kind.METRICS, point.key),
                step,
                hooks.canonical_value(point.value) + (0.0 if online else -0.0),
                hooks.canonical_time(point.time),
            )
        )
    return _apart(kept) if backend == "mlflow" else kept


def _apart(points: Iterable[Point]) -> list[Point]:
    """MLflow has no two equal points: one that agrees with an earlier one in all is stored a millisecond later."""
    taken: set[tuple[object, ...]] = set()
    kept = []
    for point in points:
        assert point.time is not None
        ms = round(point.time * 1000)
        while (identity := (point.key, point.step, _spelled(point.value), ms)) in taken:
            ms += 1
        taken.add(identity)
        kept.append(msgspec.structs.replace(point, time=ms / 1000))
    return kept


def same_points(found: Iterable[Point], expected: Iterable[Point]) -> None:
    """Check that two sets of points are the same, whatever their order: nothing missing, nothing twice."""
    have, want = (Counter(map(_identity, points)) for points in (found, expected))
    missing, extra = want - have, have - want
    assert (missing.total(), extra.total()) == (0, 0), (
        f"of {want.total()} points are missing: {list(missing)[:5]}; there, but must not be: {list(extra)[:5]}"
    )


def _identity(point: Point) -> tuple[object, ...]:
    return point.key, point.step, _spelled(point.value), point.time


def _spelled(value: float) -> str:
    return "nan" if math.isnan(value) else repr(float(value))


def own_home(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no job see, or leave anything in, the home folder, W&B or MLflow settings of whoever runs the tests."""
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    for name in ("HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
