# SPDX-License-Identifier: Apache-2.0
"""Prints the last screen: each site's last metrics, what was delivered, and how to look at it."""

import json
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import msgspec

from trackhub.delivery import format_results, read_report

REPORT = Path("trackhub", "delivery.json")  # in a receiver's run folder


def forget(run_folders: Mapping[str, Path], summaries: Path) -> None:
    """Delete what an earlier job in the same workspace left, so that it is never taken for this one's."""
    for path in [*(folder / REPORT for folder in run_folders.values()), *summaries.glob("*.json")]:
        path.unlink(missing_ok=True)


def print_metrics(summaries: Path) -> None:
    """Print the last metrics, which each site left in ``<site>.json``."""
    sites = {path.stem: json.loads(path.read_text()) for path in sorted(summaries.glob("*.json"))}
    if keys := sorted({key for metrics in sites.values() for key in metrics}):
        rows = [["site", *keys], ["-" * 6, *("-" * len(key) for key in keys)]]
        for site, metrics in sites.items():
            rows.append([site, *(f"{metrics[key]:.4f}" if key in metrics else "-" for key in keys)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        print("\nLast metrics")
        for row in rows:
            print(("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip())


def print_delivery(run_folders: Mapping[str, Path]) -> bool:
    """Print what was delivered, and return whether all of it was. The keys are sites, or ``server``."""
    reports, problems = {}, []
    for receiver, folder in run_folders.items():
        try:
            reports[receiver] = read_report(folder / REPORT)
        except (OSError, msgspec.DecodeError) as error:
            problems.append(f"no delivery report of {receiver}: {error}")
    if reports:
        print(f"\n{format_results(reports)}")
    for problem in problems:
        print(f"\nDelivery unknown: {problem}")
    return not problems and all(report.is_complete() for report in reports.values())


def print_fetching(job_id: str, startup_kit: Path, *, server: bool, clients: bool, is_poc: bool) -> None:
    """Print how to fetch and open what a job left in a federation.

    Args:
        job_id: FLARE's id of the job.
        startup_kit: the folder of the startup kit that submitted the job.
        server: the server has stored something.
        clients: the clients have stored something.
        is_poc: the federation is a POC that this job started, so the clients' workspaces lie beside the startup kit.
    """
    nvflare, trackhub = _program("nvflare"), _program("trackhub")
    kit, workspaces = shlex.quote(str(startup_kit)), shlex.quote(str(startup_kit.parent))
    if server:
        print("\nFetch what the server stored, and look at it")
        print(f"  {nvflare} job download {job_id} --startup-kit {kit}")
        print(f"  {trackhub} status {job_id}")
        print(f"  {trackhub} report {job_id}")
    if clients and is_poc:
        print("\nWhat the clients stored is in their own workspaces. Look at all sites together")
        print(f"  {trackhub} status {workspaces}")
        print(f"  {trackhub} report {workspaces}")
    elif clients:
        print("\nWhat a client stored is in its own workspace. Look at it there; its path is the WORKSPACE")
        print(f"  trackhub status WORKSPACE/{job_id}")
        print("Or copy these folders of all clients into one, and look at all sites together")
        print("  trackhub report FOLDER")


def _program(name: str) -> str:
    """Return how to call a program of this environment in a shell in which nobody has activated the environment."""
    return shlex.quote(shutil.which(name, path=str(Path(sys.executable).parent)) or name)
