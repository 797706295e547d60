# SPDX-License-Identifier: Apache-2.0
"""XGBoost and Lightning in FLARE: each point is stored once, and the status is the same and true at all sites.

They need libraries that would change what the backends are tested with, so they run in ``.venv-trainers``, which
``make trainers`` creates.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.integration.harness import JobResult, Point, read_jsonl, read_tensorboard, run_script

PYTHON = Path(__file__).parents[2] / ".venv-trainers" / "bin" / "python"

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="there is no .venv-trainers; `make trainers` creates it"),
]

_JOB = """
import sys
from pathlib import Path

from nvflare.recipe import SimEnv, set_per_site_config
from trackhub.flare.recipe import add_tracking

HERE = Path(__file__).parent
SITES = [f"site-{i + 1}" for i in range(int(sys.argv[2]))]


def xgboost(kind):
    from parts import Columns, Numbers

    if kind == "XGBoost vertical":
        from nvflare.app_opt.xgboost.recipes import XGBVerticalRecipe

        params = {"max_depth": 2, "eta": 0.1, "objective": "binary:logistic", "eval_metric": "auc", "nthread": 1,
                  "tree_method": "hist"}
        recipe = XGBVerticalRecipe(name="job", min_clients=len(SITES), num_rounds=3, label_owner="site-1",
                                   xgb_params=params)
        set_per_site_config(recipe, {site: {"data_loader": Columns()} for site in SITES})
        return recipe
    if kind == "XGBoost histogram":
        from nvflare.app_opt.xgboost.recipes import XGBHorizontalRecipe

        params = {"max_depth": 2, "eta": 0.1, "objective": "binary:logistic", "eval_metric": "auc", "nthread": 1}
        recipe = XGBHorizontalRecipe(name="job", min_clients=len(SITES), num_rounds=3, xgb_params=params)
    else:
        from nvflare.app_opt.xgboost.recipes import XGBBaggingRecipe

        mode = kind.removeprefix("XGBoost ")
        recipe = XGBBaggingRecipe(name="job", min_clients=len(SITES), num_rounds=3, training_mode=mode, nthread=1)
        if mode == "cyclic":
            # FLARE passes over a site that is not there within 10 s of its turn. With 0, each site has its turn.
            (workflow,) = recipe._job._deploy_map["server"].app_config.workflows
            workflow.controller.task_assignment_timeout = 0
    set_per_site_config(recipe, {site: {"data_loader": Numbers()} for site in SITES})
    return recipe


def lightning():
    from net import Net
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

    return FedAvgRecipe(name="job", model=Net(), min_clients=2, num_rounds=2, train_script=str(HERE / "client.py"))


if __name__ == "__main__":
    kind = sys.argv[1]
    recipe = {"Lightning": lightning, "Lightning untracked": lightning}.get(kind, xgboost)
    recipe = recipe(kind) if recipe is xgboost else recipe()
    if kind == "Lightning":
        add_tracking(recipe, server=["jsonl", "tensorboard"], clients=["jsonl"], capture=["tensorboard"])
    elif kind != "Lightning untracked":
        add_tracking(recipe, server=["jsonl", "tensorboard"], clients=["jsonl"], capture=["tensorboard"])
    sites = {"clients": SITES} if kind.startswith("XGBoost") else {"num_clients": 2}
    recipe.execute(SimEnv(**sites, workspace_root=str(HERE / "workspace")))
"""

_PARTS = """
import os

import numpy as np
import xgboost as xgb
from nvflare.app_opt.xgboost.data_loader import XGBDataLoader


class Numbers(XGBDataLoader):
    def load_data(self):
        from trackhub import Writer

        Writer().log({"loads": 1}, 0)
        if os.environ.get("TRACKHUB_TEST_TRAINER") == f"{self.client_id} fails":
            raise RuntimeError("this data loader fails")
        number = int(self.client_id[-1])  # sites of different size
        x = np.random.default_rng(number).normal(size=(100 + 100 * number, 4))
        y = (x.sum(axis=1) > 0).astype(int)
        return xgb.DMatrix(x[50:], label=y[50:]), xgb.DMatrix(x[:50], label=y[:50])

class Columns(XGBDataLoader):
    '''The same rows at all sites, and other columns at each. The first site has the labels.'''

    def load_data(self):
        from trackhub import Writer

        Writer().log({"loads": 1}, 0)
        if os.environ.get("TRACKHUB_TEST_TRAINER") == f"{self.client_id} fails":
            raise RuntimeError("this data loader fails")
        x = np.random.default_rng(0).normal(size=(300, 6))
        y = (x.sum(axis=1) > 0).astype(int) if self.client_id == "site-1" else None
        mine = x[:, int(self.client_id[-1]) - 1 :: 3]

        def part(rows):
            labels = {} if y is None else {"label": y[rows]}
            return xgb.DMatrix(mine[rows], data_split_mode=self.data_split_mode, **labels)

        return part(slice(50, None)), part(slice(50))
"""

_NET = """
import torch
from pytorch_lightning import LightningModule


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch, number):
        loss = self.layer(batch[0]).square().mean()
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""

_LIGHTNING_CLIENT = """
import os

import nvflare.client.lightning as flare
import torch
from net import Net
from pytorch_lightning import Trainer
from torch.utils.data import DataLoader, TensorDataset

data = DataLoader(TensorDataset(torch.ones(8, 3)), batch_size=2)
folder = os.path.join(os.environ["TRACKHUB_TEST_OUT"], str(os.getpid()))  # a process for each site
logger = True  # Lightning's own
if os.environ["TRACKHUB_TEST_TRAINER"] == "ClientLogger":
    from nvflare.app_opt.lightning.loggers.client_logger import ClientLogger

    flare.init()
    logger = ClientLogger()
trainer = Trainer(max_epochs=1, log_every_n_steps=1, accelerator="cpu", default_root_dir=folder, logger=logger,
                  enable_progress_bar=False, enable_checkpointing=False)
flare.patch(trainer)
model = Net()
while flare.is_running():
    flare.receive()
    trainer.fit(model, data)
"""


def _run(folder: Path, kind: str, trainer: str = "", *, n_clients: int = 2) -> JobResult:
    folder.mkdir(exist_ok=True)
    files = {"job.py": _JOB, "parts.py": _PARTS, "net.py": _NET, "client.py": _LIGHTNING_CLIENT}
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    env = {"PYTHONPATH": str(folder), "TRACKHUB_TEST_TRAINER": trainer}
    rc, log = run_script(["job.py", kind, str(n_clients)], folder, folder / "out", env, 280, python=str(PYTHON))
    assert trainer.endswith("fails") or rc == 0, log[-6000:]
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _sites(n_clients: int = 2) -> list[str]:
    return [f"site-{i + 1}" for i in range(n_clients)]


def _status(job: JobResult, n_clients: int = 2) -> dict[str, str]:
    """Return the status that each receiver reports, and in which each run ended."""
    sites = _sites(n_clients)
    found: dict[str, str] = {name: job.report(name)["status"] for name in ("server", *sites)}
    for receiver, site in (*(("server", site) for site in sites), *((site, site) for site in sites)):
        found[f"run of {site} at {receiver}"] = read_jsonl(job.jsonl_file(receiver, site))[-1]["status"]
    return found


def _rounded(points: list[Point]) -> list[tuple[str, int | None, float]]:
    return sorted((p.key, p.step, round(p.value, 5)) for p in points)


def _assert_drawn_as_stored(job: JobResult, n_clients: int = 2) -> None:
    for site in _sites(n_clients):
        stored = _rounded(job.jsonl_points("server", site))
        assert _rounded(job.tensorboard_points("server", site)) == stored
        assert _rounded(job.jsonl_points(site, site)) == stored


@pytest.mark.parametrize(("kind", "n_clients"), [("histogram", 2), ("histogram", 3), ("vertical", 2), ("vertical", 3)])
def test_xgboost_by_histograms_is_tracked_and_finished(tmp_path: Path, kind: str, n_clients: int) -> None:
    """FLARE's callback logs two metrics in each boosting round. That is a step: FLARE itself has no round here.

    FLARE's controller triggers the abort signal when it is done.
    """
    job = _run(tmp_path, f"XGBoost {kind}", n_clients=n_clients)

    assert set(_status(job, n_clients).values()) == {"finished"}
    _assert_drawn_as_stored(job, n_clients)
    for site in _sites(n_clients):
        points = [(point.step, point.round) for point in job.jsonl_points("server", site) if point.key != "loads"]
        assert sorted(points) == [(step, None) for step in range(3) for _ in range(2)]


@pytest.mark.parametrize(("mode", "n_clients"), [("bagging", 3), ("cyclic", 2)])
def test_xgboost_by_trees_is_tracked_and_finished(tmp_path: Path, mode: str, n_clients: int) -> None:
    """FLARE's executor logs with a ``SummaryWriter`` of torch, which is captured, from a site's second task on."""
    job = _run(tmp_path, f"XGBoost {mode}", n_clients=n_clients)

    assert set(_status(job, n_clients).values()) == {"finished"}
    _assert_drawn_as_stored(job, n_clients)
    for site in _sites(n_clients):
        points = job.jsonl_points("server", site)
        assert [point.round for point in points if point.key == "train_metrics"] == [1, 2]
        (folder,) = {path.parent for path in job.run_dir(site).rglob("events.out.tfevents.*")}
        assert _rounded([point for point in points if point.key != "loads"]) == _rounded(read_tensorboard(folder))


@pytest.mark.parametrize("kind", ["histogram", "vertical"])
def test_xgboost_that_fails_at_one_site_failed_at_all(tmp_path: Path, kind: str) -> None:
    job = _run(tmp_path, f"XGBoost {kind}", "site-2 fails")

    assert set(_status(job).values()) == {"failed"}


def test_a_lightning_job_stores_what_its_own_logger_writes(tmp_path: Path) -> None:
    """Its script stays as it is: it logs with Lightning's default logger, which is captured."""
    before, after = _run(tmp_path / "before", "Lightning untracked"), _run(tmp_path / "after", "Lightning")

    def own(job: JobResult) -> list[tuple[str, int | None, float]]:
        """Return what the logger of one site wrote; both sites have the same data."""
        folders = sorted({path.parent for path in job.out.rglob("events.out.tfevents.*")})
        found = [_rounded(read_tensorboard(folder)) for folder in folders]
        longest: list[tuple[str, int | None, float]] = max(found, key=len)
        return longest

    assert (before.rc, after.rc) == (0, 0), before.log[-3000:] + after.log[-3000:]
    assert own(before) == own(after)
    assert [step for key, step, _ in own(after) if key == "train_loss"] == list(range(8))
    for site in ("site-1", "site-2"):
        points = after.jsonl_points("server", site)
        assert [point for point in _rounded(points) if point[0] == "train_loss"] == [
            point for point in own(after) if point[0] == "train_loss"
        ]
        assert [(p.step, p.round) for p in points if p.key == "train_loss"] == [(step, step // 4) for step in range(8)]
    assert set(_status(after).values()) == {"finished"}
    _assert_drawn_as_stored(after)


def test_a_lightning_job_with_flares_own_logger_stores_each_point_once(tmp_path: Path) -> None:
    job = _run(tmp_path, "Lightning", "ClientLogger")

    assert set(_status(job).values()) == {"finished"}
    for site in ("site-1", "site-2"):
        points = [(p.step, p.round) for p in job.jsonl_points("server", site) if p.key == "train_loss"]
        assert points == [(step, step // 4) for step in range(8)]
    _assert_drawn_as_stored(job)
