# SPDX-License-Identifier: Apache-2.0
"""Runs the CIFAR-10 job against wandb.ai, reads every point back through W&B's public API, and prints what to report.

``make check-wandb`` runs it, for whoever has a key. It needs a login: ``wandb login``, or WANDB_API_KEY. WANDB_BASE_URL
names another server. The job writes to W&B and to files of the backend ``jsonl``; the two must hold the same points.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Held", "Point", "compare", "main", "read_by_public_api"]

_JOB = Path(__file__).parents[2] / "jobs" / "cifar10_fedavg" / "job.py"
_SMALL = ("--dataset", "synthetic", "--samples_per_site", "320", "--num_rounds", "2")
_SITES = ("site-1", "site-2")
_INDEX_S = 60.0  # W&B may show the last rows of a run a little later than it acknowledged them
_SHOWN = 5

Point = tuple[str, int, float]
"""Key, step of the log call, value."""


@dataclass
class Held:
    """What W&B has of one run.

    Attributes:
        state: such as ``finished``.
        points: what its rows hold.
        rows: how many rows it says that it has; None if it does not say.
        url: its page.
    """

    state: str
    points: list[Point] = field(default_factory=list)
    rows: int | None = None
    url: str = ""


Reader = Callable[[str, str], Mapping[str, Held]]
"""Returns what W&B has of a group, by site, given the names of the project and the group."""


def read_by_public_api(project: str, group: str) -> Mapping[str, Held]:
    """Read the runs of a group through ``wandb.Api``, which shares no code with the backend."""
    import wandb

    api = wandb.Api(timeout=30)
    found = {}
    for run in api.runs(f"{api.default_entity}/{project}", filters={"group": group}):
        points = [point for row in run.scan_history() for point in points_of(row)]
        site = str(run.config["trackhub"]["site"])
        found[site] = Held(run.state, points, getattr(run, "lastHistoryStep", None), run.url)
    return found


def points_of(row: Mapping[str, Any]) -> list[Point]:
    """Return the numbers of a row with the step of its log call."""
    step = row.get("step")
    return [
        (key, int(step), float(value))
        for key, value in row.items()
        if step is not None and not key.startswith("_") and key not in ("step", "round") and _is_number(value)
    ]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) or value in ("NaN", "Infinity", "-Infinity")


def compare(wanted: Sequence[Point], found: Sequence[Point]) -> list[str]:
    """Return what is wrong with the points that W&B has, one line for each sort of fault."""
    want, have = Counter(map(_comparable, wanted)), Counter(map(_comparable, found))
    faults = {
        "missing": list((want - have).elements()),
        "there twice": [point for point in have - want if point in want],
        "not logged": [point for point in have - want if point not in want],
    }
    return [f"{len(points)} points {what}, such as {points[:_SHOWN]}" for what, points in faults.items() if points]


def _comparable(point: Point) -> tuple[str, int, str]:
    key, step, value = point
    return key, step, "NaN" if math.isnan(value) else repr(value + 0.0)


def main(argv: Sequence[str] | None = None, *, read: Reader = read_by_public_api, index_s: float = _INDEX_S) -> int:
    """Run the job, compare, print the report. Return 0 if W&B has exactly what was logged.

    Args:
        argv: the command line.
        read: reads back what W&B has.
        index_s: how long to wait until W&B shows all, in seconds.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--project", default="trackhub-check", help="the W&B project to write to")
    parser.add_argument("--job", nargs=argparse.REMAINDER, default=[], help="further flags of the job, at the end")
    given = parser.parse_args(argv)
    group = f"check-{uuid.uuid4().hex[:12]}"
    with tempfile.TemporaryDirectory(prefix="trackhub-check-wandb-") as folder:
        workspace = Path(folder, "workspace")
        started = time.monotonic()
        status, output = _run_job(workspace, given.project, group, given.job)
        took_s = time.monotonic() - started
        wanted = {site: _logged(workspace, site) for site in _SITES}
        report = _delivery_report(workspace)
    found, faults = _read_until_equal(read, given.project, group, wanted, index_s)
    if status != 0:
        faults.insert(0, f"the job ended with status {status}; the end of its output:\n{output[-3000:]}")
    _print_report(group, took_s, report, wanted, found)
    for fault in faults:
        print(f"FAULT: {fault}")
    print("Everything that was logged is in W&B, once." if not faults else "Please report all of the lines above.")
    return int(bool(faults))


def _run_job(workspace: Path, project: str, group: str, more: Sequence[str]) -> tuple[int, str]:
    flags = ["--workspace", str(workspace), *_SMALL, "--backend", "wandb", "--backend", "jsonl", "--strict"]
    options = ["wandb.mode=online", f"wandb.project={project}", f"wandb.group={group}"]
    flags += [word for option in options for word in ("--option", option)]
    command = [sys.executable, str(_JOB), *flags, *more]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    return done.returncode, done.stdout + done.stderr


def _logged(workspace: Path, site: str) -> list[Point]:
    """Return the points of a site, as the backend ``jsonl`` keeps them."""
    points = []
    for path in workspace.rglob(f"{site}.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            if line["kind"] == "metrics":
                points += [(key, int(line["step"]), float(value)) for key, value in line["values"].items()]
    return points


def _delivery_report(workspace: Path) -> dict[str, Any]:
    for path in workspace.rglob("delivery.json"):
        report: dict[str, Any] = json.loads(path.read_text())
        if "wandb" in report.get("lanes", {}):
            return report
    return {}


def _read_until_equal(
    read: Reader, project: str, group: str, wanted: Mapping[str, Sequence[Point]], index_s: float
) -> tuple[Mapping[str, Held], list[str]]:
    give_up = time.monotonic() + index_s
    while True:
        try:
            found, faults = read(project, group), list[str]()
        except Exception as error:  # noqa: BLE001 - whatever it is, it belongs into the report
            found, faults = {}, [f"W&B's public API cannot be read: {type(error).__name__}: {error}"]
        for site, points in wanted.items():
            held = found.get(site, Held("not there"))
            faults += [f"{site}: {fault}" for fault in compare(points, held.points)]
            if held.state != "finished":
                faults.append(f"{site}: its run is {held.state}; expected finished")
            if not points:
                faults.append(f"{site}: the job logged nothing")
        if not faults or time.monotonic() >= give_up:
            return found, faults
        time.sleep(min(5.0, index_s))


def _print_report(
    group: str,
    took_s: float,
    report: Mapping[str, Any],
    wanted: Mapping[str, Sequence[Point]],
    found: Mapping[str, Held],
) -> None:
    packages = ("flare-trackhub", "flare-trackhub-wandb", "wandb", "nvflare")
    print("trackhub and W&B:", ", ".join(f"{name} {version(name)}" for name in packages))
    print(f"Python {platform.python_version()} on {platform.system()}; group {group}; the job took {took_s:.0f} s")
    for site, points in wanted.items():
        held = found.get(site, Held("not there"))
        run = report.get("lanes", {}).get("wandb", {}).get(site, {})
        numbers = {name: run.get(name) for name in ("confirmed", "client_confirmed", "pending", "rejected", "state")}
        print(f"{site}: {len(points)} points logged, {len(held.points)} in W&B, run {held.state} {held.url}")
        print(f"  last step by W&B {held.rows}; delivery report {numbers}")
        if run.get("last_error"):
            print(f"  last error: {run['last_error']}")


if __name__ == "__main__":
    sys.exit(main())
