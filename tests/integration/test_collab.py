# SPDX-License-Identifier: Apache-2.0
"""Jobs of FLARE's Collab API: each call is stored once, without a round, and the status is true at all sites.

Such a job's server calls functions of its clients. FLARE knows of no rounds there, so a record has none.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.harness import JobResult, read_jsonl, run_script

pytestmark = pytest.mark.long

_JOB = """
from pathlib import Path

import fed
from nvflare.collab import CollabRecipe
from nvflare.recipe import SimEnv

from trackhub.flare.recipe import add_tracking

if __name__ == "__main__":
    recipe = CollabRecipe("job", server=fed, client=fed, min_clients=2)
    add_tracking(recipe, server=["jsonl", "tensorboard"], clients=["jsonl"])
    recipe.execute(SimEnv(num_clients=2, workspace_root=str(Path(__file__).parent / "workspace")))
"""

_FED = """
import json
import os
from pathlib import Path

from nvflare.collab import collab

from trackhub import Writer


@collab.publish
def train(number):
    writer, site = Writer(), collab.site_name
    # Calls of the server run in several threads of the client's process.
    with open(Path(os.environ["TRACKHUB_TEST_OUT"], f"{site}.facts"), "a") as facts:
        for step in range(5):
            value = number + step / 10
            writer.log({"loss": value}, number * 5 + step)
            facts.write(json.dumps(["loss", value, number * 5 + step, 0, 0]) + "\\n")
    return value


@collab.main
def main():
    writer = Writer()
    for number in range(3):
        values = [value for _, value in collab.clients.train(number)]
        writer.log({"mean": sum(values) / len(values)}, number)
        if os.environ.get("TRACKHUB_TEST_TRAINER") == "fails":
            raise RuntimeError("the server's main function fails")
"""

_SITES = ("site-1", "site-2")


def _run(folder: Path, trainer: str = "") -> JobResult:
    (folder / "fed.py").write_text(_FED)
    (folder / "job.py").write_text(_JOB)
    env = {"PYTHONPATH": str(folder), "TRACKHUB_TEST_TRAINER": trainer}
    rc, log = run_script(["job.py"], folder, folder / "out", env, 240)
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _ends(job: JobResult) -> set[str]:
    places = [("server", "server"), *(("server", site) for site in _SITES), *((site, site) for site in _SITES)]
    ends = {read_jsonl(job.jsonl_file(*place))[-1]["status"] for place in places}
    return ends | {job.report(receiver)["status"] for receiver in ("server", *_SITES)}


def test_calls_of_a_collab_job_are_stored_once_and_have_no_round(tmp_path: Path) -> None:
    job = _run(tmp_path)

    assert job.rc == 0, job.log[-6000:]
    for site in _SITES:
        facts = [(fact.key, fact.value, fact.step) for fact in job.facts(site)]
        assert len(facts) == 15
        for receiver in ("server", site):
            points = job.jsonl_points(receiver, site)
            assert sorted((point.key, point.value, point.step) for point in points) == facts  # a stream for each call
            assert {point.round for point in points} == {None}
        drawn = [(p.key, round(p.value, 5), p.step) for p in job.tensorboard_points("server", site)]
        assert sorted(drawn) == [(key, round(value, 5), step) for key, value, step in facts]
    means = [(round(p.value, 5), p.step, p.round) for p in job.jsonl_points("server", "server")]
    assert means == [(number + 0.4, number, None) for number in range(3)]
    assert _ends(job) == {"finished"}
    assert job.report("server")["balanced"]


def test_a_main_function_that_raises_fails_a_collab_job_at_all_sites(tmp_path: Path) -> None:
    """FLARE leaves a call that raised at a client to the main function, and only this one's error ends the job."""
    job = _run(tmp_path, "fails")

    assert _ends(job) == {"failed"}
