# SPDX-License-Identifier: Apache-2.0
"""A job that an administrator aborts has ended as aborted, on the server and at the sites, whatever its workflow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration import test_workflows
from tests.integration.harness import TRAINER, read_jsonl, run_script
from tests.integration.poc import SITES, Poc, poc, wait_until, wandb
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.delivery.journal.report_builder import read_journal_report

__all__ = ["poc", "wandb"]  # the fixtures that the tests below ask for

pytestmark = pytest.mark.long

_SLOW_TRAINER = """
from trackhub import Writer

writer = Writer()
while flare.is_running():
    model = flare.receive()
    if model is None:
        break
    for i in range(3000):
        if not flare.is_running():
            break
        fact(lambda: writer.log({"seen": 1.0}, i), {"seen": 1.0}, i)
        time.sleep(0.02)
    flare.send(flare.FLModel(params=model.params, params_type="FULL"))
"""


_EXPORT = """
import runpy

from nvflare.job_config.api import FedJob

FedJob.simulator_run = lambda job, *args, **kwargs: job.export_job("export")
runpy.run_path("job.py", run_name="__main__")
"""


def _export(folder: Path, workflow: str) -> Path:
    """Write the job of this workflow, with trainers in process, for FLARE's POC."""
    (folder / "client.py").write_text(TRAINER + _SLOW_TRAINER)
    (folder / "parts.py").write_text(test_workflows._PARTS)
    (folder / "net.py").write_text(test_workflows._NET)
    (folder / "job.py").write_text(test_workflows._JOB)
    (folder / "export.py").write_text(_EXPORT)
    args = ["export.py", workflow, "in process", str(len(SITES))]
    rc, log = run_script(args, folder, folder / "out", {"PYTHONPATH": str(folder)}, 100)
    assert rc == 0, log
    return folder / "export" / "job"


def _ends(run_dir: Path) -> set[str]:
    """Return how the job and each run ended here. A run has no end where FLARE killed the process before its end."""
    (journal,) = find(run_dir).journals
    lines = [read_jsonl(path)[-1] for path in (run_dir / "jsonl").rglob("*.jsonl")]
    return {read_journal_report(journal).status, *(line["status"] for line in lines if "status" in line)}


@pytest.mark.parametrize("workflow", ["FedAvg", "cyclic by clients", "swarm"])
def test_server_and_sites_agree_that_a_job_was_aborted(poc: Poc, tmp_path: Path, workflow: str) -> None:
    job = _export(tmp_path, workflow)
    at_once = 1 if workflow == "cyclic by clients" else len(SITES)

    def abort(job_id: str) -> None:
        def busy() -> bool:
            files = [poc.out / job_id / f"{site}.facts" for site in SITES]
            return sum(f.exists() and f.read_text().count("\n") > 50 for f in files) >= at_once

        wait_until(busy, 90)
        poc.console.ask("abort", job_id)

    result = poc.run(job, meanwhile=abort)

    folders = {"server": result.server, **{site: result.client(site) for site in SITES}}
    assert result.status == "FINISHED:ABORTED"
    assert {place: _ends(folder) for place, folder in folders.items()} == {place: {"aborted"} for place in folders}
