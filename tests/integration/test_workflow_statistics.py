# SPDX-License-Identifier: Apache-2.0
"""The federation run of workflows other than one task to all sites: cyclic, two tasks in a round, a failing site."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.integration.harness import TRAINER, JobResult, Point, run_script

SITES = ("site-1", "site-2", "site-3")
ROUNDS = 2

_JOB = """
import sys
from pathlib import Path

from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.shareablegenerators.full_model_shareable_generator import FullModelShareableGenerator
from nvflare.app_common.workflows.cyclic import Cyclic
from nvflare.app_common.workflows.cyclic_ctl import CyclicController
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from parts import TwoTasks

from trackhub.flare.recipe import add_tracking

HERE, N, ROUNDS = Path(__file__).parent, 3, 2
MAKE = {
    "Cyclic": lambda: Cyclic(num_clients=N, num_rounds=ROUNDS, persistor_id="persistor"),
    "CyclicController": lambda: CyclicController(
        num_rounds=ROUNDS, task_assignment_timeout=60, persistor_id="persistor", shareable_generator_id="generator"),
    "two tasks": lambda: TwoTasks(num_rounds=ROUNDS, persistor_id="persistor"),
    "FedAvg": lambda: FedAvg(num_clients=N, num_rounds=ROUNDS, persistor_id="persistor"),
}

if __name__ == "__main__":
    job = FedJob(name="job", min_clients=1)
    job.to_server(NPModelPersistor(model=[[0.0, 0.0], [0.0, 0.0]]), id="persistor")
    job.to_server(FullModelShareableGenerator(), id="generator")
    job.to_server(MAKE[sys.argv[1]]())
    job.to_clients(ScriptRunner(str(HERE / "client.py"), framework=FrameworkType.NUMPY))
    add_tracking(job, server={"jsonl": {}}, context=False)
    job.simulator_run(str(HERE / "workspace" / "job"), n_clients=N, threads=N)
"""

_PARTS = """
from nvflare.app_common.workflows.model_controller import ModelController


class TwoTasks(ModelController):
    '''Trains, and then lets the same sites validate, in each round.'''

    def __init__(self, num_rounds, persistor_id):
        super().__init__(persistor_id=persistor_id)
        self.num_rounds = num_rounds

    def run(self):
        model = self.load_model()
        for model.current_round in range(self.num_rounds):
            sites = self.sample_clients(3)
            model.params = self.send_model_and_wait(task_name="train", targets=sites, data=model)[0].params
            self.send_model_and_wait(task_name="validate", targets=sites, data=model)
            self.save_model(model)
"""

_TRAINER = """
import numpy as np
from trackhub import Writer

number = int(SITE[-1])
with Writer() as writer:
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        now = model.current_round
        key = "val/loss" if flare.is_evaluate() else "train/loss"
        value = number + 0.25 * now
        fact(lambda: writer.log({key: value}, now), {key: value}, now)
        if os.environ.get("TRACKHUB_TEST_TRAINER") == "site-2 fails" and now == 1:
            if number == 2:
                raise RuntimeError("this training script fails in round 1")
            time.sleep(3.0 if number == 3 else 0)  # FLARE ends the job before
        time.sleep(0.2 * number)
        if flare.is_evaluate():
            flare.send(flare.FLModel(metrics={"loss": value}))
        else:
            params = {name: np.asarray(array) + 1 for name, array in model.params.items()}
            flare.send(flare.FLModel(params=params, params_type="FULL", meta={"NUM_STEPS_CURRENT_ROUND": number}))
"""


def run(folder: Path, workflow: str, env: dict[str, str] | None = None) -> JobResult:
    (folder / "client.py").write_text(TRAINER + _TRAINER)
    (folder / "parts.py").write_text(_PARTS)
    (folder / "job.py").write_text(_JOB)
    rc, log = run_script(["job.py", workflow], folder, folder / "out", {"PYTHONPATH": str(folder), **(env or {})}, 240)
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def of(points: list[Point], key: str) -> dict[int | None, float]:
    """Return a key's value by step. There is one for each step."""
    found = [(p.step, p.value) for p in points if p.key == key]
    assert len(found) == len(dict(found)), (key, found)
    return dict(found)


def assert_statistics_are_numpys(points: list[Point], key: str) -> None:
    for round_ in range(ROUNDS):
        values = np.array([1.0, 2.0, 3.0]) + 0.25 * round_
        weighted = np.average(values, weights=[1, 2, 3])
        expected = {"mean": values.mean(), "min": values.min(), "max": values.max(), "std": values.std(), "count": 3,
                    "weighted_mean": weighted}  # fmt: skip
        for name, value in expected.items():
            assert of(points, f"{key}/{name}")[round_] == pytest.approx(value, rel=1e-12), (key, name, round_)


def assert_all_took_part(points: list[Point]) -> None:
    for key, expected in {
        "fl/sites_sampled": 3,
        "fl/sites_reported": 3,
        "fl/sites_missing": 0,
        "fl/all_reported": 1,
    }.items():
        assert of(points, key) == dict.fromkeys(range(ROUNDS), expected), key
    assert not of(points, "fl/late_values")
    for site in SITES:
        assert set(of(points, f"fl/result_after_seconds/{site}")) == set(range(ROUNDS))
        assert of(points, f"fl/steps/{site}") == dict.fromkeys(range(ROUNDS), float(site[-1]))


@pytest.mark.parametrize("workflow", ["Cyclic", pytest.param("CyclicController", marks=pytest.mark.long)])
def test_statistics_of_a_cyclic_workflow_are_over_all_its_sites(tmp_path: Path, workflow: str) -> None:
    job = run(tmp_path, workflow)

    assert job.rc == 0, job.log[-6000:]
    points = job.jsonl_points("server", "federation")
    assert_statistics_are_numpys(points, "train/loss")
    assert_all_took_part(points)
    for site in SITES:  # one after another: nobody waits
        assert of(points, f"fl/wait_seconds/{site}") == dict.fromkeys(range(ROUNDS), 0.0)
    assert not [p for p in points if p.key.startswith("fl/waited_for_seconds/")]


def test_statistics_of_a_round_with_two_tasks_are_over_both(tmp_path: Path) -> None:
    job = run(tmp_path, "two tasks")

    assert job.rc == 0, job.log[-6000:]
    points = job.jsonl_points("server", "federation")
    assert_statistics_are_numpys(points, "train/loss")
    assert_statistics_are_numpys(points, "val/loss")
    assert_all_took_part(points)
    for site in SITES:
        assert set(of(points, f"fl/seconds/train/{site}")) == set(of(points, f"fl/seconds/validate/{site}")) == {0, 1}


def test_a_round_says_which_site_failed_and_which_is_missing(tmp_path: Path) -> None:
    job = run(tmp_path, "FedAvg", {"TRACKHUB_TEST_TRAINER": "site-2 fails"})

    points = job.jsonl_points("server", "federation")
    assert of(points, "fl/all_reported") == {0: 1, 1: 0}, job.log[-6000:]
    assert of(points, "fl/sites_failed") == {0: 0, 1: 1}
    assert of(points, "fl/failed/site-2") == {1: 1}
    assert of(points, "fl/missing/site-3") == {1: 1}
    assert not of(points, "fl/missing/site-2")
    sums = [sum(of(points, f"fl/sites_{what}")[1] for what in ("reported", "missing", "failed"))]
    assert sums == [of(points, "fl/sites_sampled")[1]] == [3]
    (text,) = [line["text"] for line in job.jsonl("server", "federation") if line["kind"] == "text"]
    assert [cell.strip() for cell in text.splitlines()[-1].split("|")][6] == "site-2"
