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
import sys
from pathlib import Path

import fed
from nvflare.collab import CollabRecipe
from nvflare.recipe import SimEnv

from trackhub.flare.recipe import add_tracking

if __name__ == "__main__":
    n_clients = int(sys.argv[1])
    recipe = CollabRecipe("job", server=fed, client=fed, min_clients=n_clients)
    add_tracking(recipe, server=["jsonl", "tensorboard"], clients=["jsonl"])
    recipe.execute(SimEnv(num_clients=n_clients, workspace_root=str(Path(__file__).parent / "workspace")))
"""

_FED = """
import json
import os
import time
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
            time.sleep(0.01 * int(site[-1]))  # sites of different speed
    fails = os.environ.get("TRACKHUB_TEST_TRAINER") == "site-2 fails" and site == "site-2"
    if fails and number == int(os.environ["TRACKHUB_TEST_CALL"]):
        raise RuntimeError("this call fails")
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


def _run(folder: Path, trainer: str = "", call: int = 0, *, n_clients: int = 2) -> JobResult:
    (folder / "fed.py").write_text(_FED)
    (folder / "job.py").write_text(_JOB)
    env = {"PYTHONPATH": str(folder), "TRACKHUB_TEST_TRAINER": trainer, "TRACKHUB_TEST_CALL": str(call)}
    rc, log = run_script(["job.py", str(n_clients)], folder, folder / "out", env, 240)
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _ends(job: JobResult, site: str) -> set[str]:
    """Return how a site's run ended: at the server, at the site itself, and in the report of the site's receiver."""
    runs = {read_jsonl(job.jsonl_file(receiver, site))[-1]["status"] for receiver in {"server", site}}
    return {*runs, job.report(site)["status"]}


def _all_ends(job: JobResult) -> dict[str, set[str]]:
    return {site: _ends(job, site) for site in ("server", *_SITES)}


@pytest.mark.parametrize("n_clients", [2, 3])
def test_calls_of_a_collab_job_are_stored_once_and_have_no_round(tmp_path: Path, n_clients: int) -> None:
    job = _run(tmp_path, n_clients=n_clients)

    assert job.rc == 0, job.log[-6000:]
    for site in [f"site-{i + 1}" for i in range(n_clients)]:
        facts = [(fact.key, fact.value, fact.step) for fact in job.facts(site)]
        assert len(facts) == 15
        for receiver in ("server", site):
            points = job.jsonl_points(receiver, site)
            assert sorted((point.key, point.value, point.step) for point in points) == facts  # a stream for each call
            assert {point.round for point in points} == {None}
        drawn = [(p.key, round(p.value, 5), p.step) for p in job.tensorboard_points("server", site)]
        assert sorted(drawn) == [(key, round(value, 5), step) for key, value, step in facts]
        assert _ends(job, site) == {"finished"}
    means = [(round(p.value, 5), p.step, p.round) for p in job.jsonl_points("server", "server")]
    assert means == [(number + 0.4, number, None) for number in range(3)]
    assert _ends(job, "server") == {"finished"}
    assert job.report("server")["balanced"]


def test_a_main_function_that_raises_fails_a_collab_job_at_all_sites(tmp_path: Path) -> None:
    job = _run(tmp_path, "fails")

    assert _all_ends(job) == {site: {"failed"} for site in ("server", *_SITES)}


def test_a_client_whose_last_call_raised_has_failed_and_the_job_has_not(tmp_path: Path) -> None:
    """FLARE leaves such a call to the main function. This one goes on without the site, and FLARE's job is finished."""
    job = _run(tmp_path, "site-2 fails", call=2)

    assert job.rc == 0, job.log[-6000:]
    assert _all_ends(job) == {"server": {"finished"}, "site-1": {"finished"}, "site-2": {"failed"}}


def test_a_client_whose_later_call_succeeded_is_finished(tmp_path: Path) -> None:
    job = _run(tmp_path, "site-2 fails", call=0)

    assert _all_ends(job) == {site: {"finished"} for site in ("server", *_SITES)}
