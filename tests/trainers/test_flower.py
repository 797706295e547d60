# SPDX-License-Identifier: Apache-2.0
"""Flower apps that FLARE runs: each log call of a client is stored once, without a round, and the status is true.

FLARE starts Flower's processes, and Flower starts those of its client apps. FLARE knows nothing of Flower's rounds.
`make flower` installs Flower into ``.venv-flower``, and `make test-all` runs these tests there.
"""

from __future__ import annotations

import importlib.util
import json
import textwrap
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.harness import JobResult, Point, read_jsonl, run_script

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("flwr") is None, reason="flwr is not installed here: make flower"),
]

_JOB = """
import sys
from pathlib import Path

from nvflare.app_opt.flower.recipe import FlowerRecipe
from nvflare.recipe import SimEnv

from trackhub.flare.recipe import add_tracking

HERE = Path(__file__).parent

if __name__ == "__main__":
    n_clients = int(sys.argv[1])
    recipe = FlowerRecipe(
        name="job", flower_content=str(HERE / "flower"), min_clients=n_clients, superlink_ready_timeout=60.0,
        configure_task_timeout=60, start_task_timeout=60, run_config={"num-sites": n_clients},
    )
    add_tracking(recipe, server=["jsonl", "tensorboard"], clients=["jsonl"])
    recipe.execute(SimEnv(num_clients=n_clients, workspace_root=str(HERE / "workspace")))
"""

_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "flapp"
version = "1.0.0"
dependencies = []
license = "Apache-2.0"

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "tests"

[tool.flwr.app.components]
serverapp = "flapp.server:app"
clientapp = "flapp.client:app"

[tool.flwr.app.config]
num-sites = 2
"""

_CLIENT = """
import json
import os
import time
from pathlib import Path

import numpy as np
from flwr.client import ClientApp, NumPyClient

from nvflare.client import tracking
from nvflare.client.tracking import SummaryWriter
from trackhub import Writer


class Client(NumPyClient):
    def __init__(self, site):
        self.site = site
        self.flares, self.ours = SummaryWriter(), Writer()

    def log(self, stage, number):
        with open(Path(os.environ["TRACKHUB_TEST_OUT"], f"{self.site}.facts"), "a") as facts:
            for i in range(5):
                step, value = number * 5 + i, number + i / 10
                self.flares.add_scalar(f"{stage}/flare", value, step)
                self.ours.log({f"{stage}/ours": value}, step)
                for writer in ("flare", "ours"):
                    facts.write(json.dumps([f"{stage}/{writer}", value, step, 0, 0]) + "\\n")
                time.sleep(0.01 * int(self.site[-1]))  # sites of different speed

    def fit(self, parameters, config):
        self.log("fit", config["number"])
        case = os.environ.get("TRACKHUB_TEST_TRAINER")
        if case == f"{self.site} fails" or case == f"{self.site} fails once" and config["number"] == 1:
            raise RuntimeError("this client app fails")
        if case == f"{self.site} is killed" and config["number"] == 2:  # Flower takes a while to notice
            os.kill(os.getpid(), 9)
        return [p + 1 for p in parameters], 10, {}

    def evaluate(self, parameters, config):
        self.log("evaluate", config["number"])
        return 0.5, 10, {"accuracy": 0.5}


def client_fn(context):
    return Client(context.node_config["client-name"]).to_client()


app = ClientApp(client_fn=client_fn)


@app.lifespan()
def lifespan(context):
    tracking.init()
    try:
        yield
    finally:
        tracking.shutdown()
"""

_SERVER = """
import os

import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg


def number(server_round):
    if os.environ.get("TRACKHUB_TEST_TRAINER") == "server fails" and server_round == 2:
        raise RuntimeError("this server app fails")
    return {"number": server_round - 1}


def server_fn(context):
    n = context.run_config["num-sites"]
    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters([np.zeros(2)]), min_available_clients=n, min_fit_clients=n,
        min_evaluate_clients=n, on_fit_config_fn=number, on_evaluate_config_fn=number,
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds=3))


app = ServerApp(server_fn=server_fn)
"""


def _run(folder: Path, *, n_clients: int = 2, trainer: str = "") -> JobResult:
    (folder / "flower" / "flapp").mkdir(parents=True)
    files = {"job.py": _JOB, "flower/pyproject.toml": _PROJECT, "flower/flapp/__init__.py": ""}
    files |= {"flower/flapp/client.py": _CLIENT, "flower/flapp/server.py": _SERVER}
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    env = {"FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "TRACKHUB_TEST_TRAINER": trainer}
    rc, log = run_script(["job.py", str(n_clients)], folder, folder / "out", env, 280)
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _status(job: JobResult, sites: list[str]) -> dict[str, str]:
    """Return the status that each receiver reports, and in which each run ended."""
    found: dict[str, str] = {name: job.report(name)["status"] for name in ("server", *sites)}
    for receiver, site in (*(("server", site) for site in sites), *((site, site) for site in sites)):
        found[f"run of {site} at {receiver}"] = read_jsonl(job.jsonl_file(receiver, site))[-1]["status"]
    return found


def _counted(points: list[Point]) -> Counter[tuple[str, float, int | None]]:
    return Counter((p.key, round(p.value, 5), p.step) for p in points)


@pytest.mark.parametrize("n_clients", [2, 3])
def test_calls_of_a_flower_client_are_stored_once_and_have_no_round(tmp_path: Path, n_clients: int) -> None:
    """It logs with FLARE's writer, as FLARE's own example does, and with ours."""
    job = _run(tmp_path, n_clients=n_clients)

    assert job.rc == 0, job.log[-6000:]
    sites = [f"site-{i + 1}" for i in range(n_clients)]
    assert set(_status(job, sites).values()) == {"finished"}, job.log[-6000:]
    for site in sites:
        facts = Counter((fact.key, fact.value, fact.step) for fact in job.facts(site))
        assert len(facts) == facts.total() == 60
        for receiver in ("server", site):
            points = job.jsonl_points(receiver, site)
            assert _counted(points) == facts
            assert {point.round for point in points} == {None}
        assert _counted(job.tensorboard_points("server", site)) == facts
        counts = job.report("server")["sites"][site]["at_site"]
        assert (counts["at_source"], counts["by_message"]) == (True, 0)
    assert job.report("server")["balanced"], json.dumps(job.report("server"))


@pytest.mark.parametrize("trainer", ["site-2 fails", "site-2 is killed", "site-2 fails once"])
def test_a_site_whose_client_app_raises_has_failed_unless_a_later_round_goes_well(tmp_path: Path, trainer: str) -> None:
    """Flower's strategy goes on with the other sites, evaluates at all of them, and FLARE's job is finished."""
    job = _run(tmp_path, trainer=trainer)

    status = _status(job, ["site-1", "site-2"])
    ends = [status[f"run of {site} at {at}"] for site in ("site-1", "site-2") for at in ("server", site)]
    bad = "finished" if trainer.endswith("once") else "failed"
    assert ends == ["finished", "finished", bad, bad], job.log[-6000:]
    assert (status["server"], status["site-1"], status["site-2"]) == ("finished", "finished", bad)


def test_a_flower_app_whose_server_fails_is_failed_at_all_sites(tmp_path: Path) -> None:
    job = _run(tmp_path, trainer="server fails")

    assert set(_status(job, ["site-1", "site-2"]).values()) == {"failed"}, job.log[-6000:]
