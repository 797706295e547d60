# SPDX-License-Identifier: Apache-2.0
"""Jobs to which ``trackhub attach`` added tracking run in FLARE's simulator, and store what their trainers log."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.integration.harness import TRAINER, Job, JobResult, run_script, simulate

pytestmark = pytest.mark.long

_TRAINER = """
from nvflare.client.tracking import SummaryWriter

from trackhub import Writer

ours, flares = Writer(), SummaryWriter()


def train(number):
    for step in range(5):
        fact(lambda: ours.log({"ours": step}, step), {"ours": step}, step)
        fact(lambda: flares.add_scalar("flares", step, step), {"flares": step}, step)


rounds(train)
"""

_SERVER = """
# A job as a person writes it.
format_version = 2
rounds = 2
workflows = [
  {
    id = "fedavg"
    path = "nvflare.app_common.workflows.fedavg.FedAvg"
    args { num_clients = 2, num_rounds = ${rounds}, persistor_id = "persistor" }
  }
]
components = [
  {
    id = "persistor"
    path = "nvflare.app_common.np.np_model_persistor.NPModelPersistor"
    args { model = [[0.0, 0.0], [0.0, 0.0]] }
  }
]
"""

_CLIENT = """
{
  format_version = 2
  app_script = "client.py"
  executors = [
    {
      tasks = ["train"]  # only this one
      executor {
        path = "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor"
        args { execution_mode = "in_process", task_script_path = ${app_script}, params_exchange_format = "numpy" }
      }
    }
  ]
}
"""


def _attach(job: Path, folder: Path) -> None:
    args = ["-m", "trackhub.cli", "attach", str(job), "--server", "jsonl", "--client", "tensorboard"]
    rc, log = run_script(args, folder, folder / "attach", {}, 60)
    assert rc == 0, log


def _assert_all_stored(job: JobResult, n_rounds: int) -> None:
    assert job.rc == 0, job.log[-6000:]
    for site in ("site-1", "site-2"):
        facts = [(fact.key, fact.value, fact.step) for fact in job.facts(site)]
        assert len(facts) == 10 * n_rounds
        points = [(p.key, p.value, p.step) for p in job.jsonl_points("server", site)]
        for key in ("ours", "flares"):  # each has a stream of its own, which keeps its order
            assert [point for point in points if point[0] == key] == [fact for fact in facts if fact[0] == key]
        assert sorted(points) == sorted(facts)
        assert sorted((p.key, p.value, p.step) for p in job.tensorboard_points(site, site)) == sorted(facts)


@pytest.mark.parametrize("own_apps", [False, True])
def test_an_exported_recipe_that_was_attached_is_tracked(tmp_path: Path, own_apps: bool) -> None:
    """With one app for all clients and external trainers, and with an app of each client's own."""
    recipe = Job(tmp_path / "recipe", _TRAINER, external=not own_apps, own_apps=own_apps)
    job = recipe.export()
    _attach(job, tmp_path / "recipe")

    _assert_all_stored(simulate(job, tmp_path / "run", n_clients=2), recipe.rounds)


def test_a_handwritten_hocon_job_that_was_attached_is_tracked(tmp_path: Path) -> None:
    job = tmp_path / "job"
    meta: dict[str, Any] = {"name": "job", "min_clients": 2, "deploy_map": {"app": ["@ALL"]}, "resource_spec": {}}
    files = {
        "meta.json": json.dumps(meta),
        "app/config/config_fed_server.conf": _SERVER,
        "app/config/config_fed_client.conf": _CLIENT,
        "app/custom/client.py": TRAINER + textwrap.dedent(_TRAINER),
    }
    for name, text in files.items():
        (job / name).parent.mkdir(parents=True, exist_ok=True)
        (job / name).write_text(text)
    _attach(job, tmp_path)

    _assert_all_stored(simulate(job, tmp_path / "run", n_clients=2), 2)
