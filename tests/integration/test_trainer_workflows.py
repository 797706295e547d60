# SPDX-License-Identifier: Apache-2.0
"""XGBoost and Lightning in FLARE: each point is stored once, and the status is the same and true at all sites.

They need libraries that would change what the backends are tested with, so they run in ``.venv-trainers``, which
``make trainers`` creates.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.integration.harness import JobResult, read_jsonl, read_tensorboard, run_script

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
SITES = ["site-1", "site-2"]


def xgboost(kind):
    from parts import Numbers

    if kind == "XGBoost histogram":
        from nvflare.app_opt.xgboost.recipes import XGBHorizontalRecipe

        params = {"max_depth": 2, "eta": 0.1, "objective": "binary:logistic", "eval_metric": "auc", "nthread": 1}
        recipe = XGBHorizontalRecipe(name="job", min_clients=2, num_rounds=3, xgb_params=params)
    else:
        from nvflare.app_opt.xgboost.recipes import XGBBaggingRecipe

        recipe = XGBBaggingRecipe(name="job", min_clients=2, num_rounds=3, training_mode="bagging", nthread=1)
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
        add_tracking(recipe, server=["jsonl"], clients=["jsonl"])
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
        generator = np.random.default_rng(int(self.client_id[-1]))
        x = generator.normal(size=(200, 4))
        y = (x.sum(axis=1) > 0).astype(int)
        return xgb.DMatrix(x[:150], label=y[:150]), xgb.DMatrix(x[150:], label=y[150:])
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
trainer = Trainer(max_epochs=1, log_every_n_steps=1, accelerator="cpu", default_root_dir=folder,
                  enable_progress_bar=False, enable_checkpointing=False)
flare.patch(trainer)
model = Net()
while flare.is_running():
    flare.receive()
    trainer.fit(model, data)
"""


def _run(folder: Path, kind: str, trainer: str = "") -> JobResult:
    folder.mkdir(exist_ok=True)
    files = {"job.py": _JOB, "parts.py": _PARTS, "net.py": _NET, "client.py": _LIGHTNING_CLIENT}
    for name, text in files.items():
        (folder / name).write_text(textwrap.dedent(text))
    env = {"PYTHONPATH": str(folder), "TRACKHUB_TEST_TRAINER": trainer}
    rc, log = run_script(["job.py", kind], folder, folder / "out", env, 280, python=str(PYTHON))
    assert trainer or rc == 0, log[-6000:]
    return JobResult(rc, log, folder / "workspace" / "job", folder / "out")


def _status(job: JobResult) -> dict[str, str]:
    """Return the status that each receiver reports, and in which each run ended."""
    found: dict[str, str] = {name: job.report(name)["status"] for name in ("server", "site-1", "site-2")}
    for receiver, site in (("server", "site-1"), ("server", "site-2"), ("site-1", "site-1"), ("site-2", "site-2")):
        found[f"run of {site} at {receiver}"] = read_jsonl(job.jsonl_file(receiver, site))[-1]["status"]
    return found


def _assert_drawn_as_stored(job: JobResult) -> None:
    for site in ("site-1", "site-2"):
        stored = sorted((p.key, p.step, round(p.value, 5)) for p in job.jsonl_points("server", site))
        assert sorted((p.key, p.step, round(p.value, 5)) for p in job.tensorboard_points("server", site)) == stored
        assert sorted((p.key, p.step, round(p.value, 5)) for p in job.jsonl_points(site, site)) == stored


def test_xgboost_by_histograms_is_tracked_and_finished(tmp_path: Path) -> None:
    """FLARE's callback logs two metrics in each boosting round. That is a step: FLARE itself has no round here.

    FLARE's controller triggers the abort signal when it is done.
    """
    job = _run(tmp_path, "XGBoost histogram")

    assert set(_status(job).values()) == {"finished"}
    for receiver, site in (("server", "site-1"), ("server", "site-2"), ("site-1", "site-1")):
        points = [(point.step, point.round) for point in job.jsonl_points(receiver, site) if point.key != "loads"]
        assert sorted(points) == [(step, None) for step in range(3) for _ in range(2)]


def test_xgboost_by_trees_is_tracked_and_finished(tmp_path: Path) -> None:
    job = _run(tmp_path, "XGBoost trees")

    assert set(_status(job).values()) == {"finished"}
    assert {point.key for point in job.jsonl_points("server", "site-1")} == {"loads"}


def test_xgboost_that_fails_at_one_site_failed_at_all(tmp_path: Path) -> None:
    job = _run(tmp_path, "XGBoost histogram", "site-2 fails")

    assert set(_status(job).values()) == {"failed"}


def test_a_lightning_job_stores_what_its_own_logger_writes(tmp_path: Path) -> None:
    """Its script stays as it is: it logs with Lightning's default logger, which is captured."""
    before, after = _run(tmp_path / "before", "Lightning untracked"), _run(tmp_path / "after", "Lightning")

    def own(job: JobResult) -> list[tuple[str, int | None, float]]:
        """Return what the logger of one site wrote; both sites have the same data."""
        folders = sorted({path.parent for path in job.out.rglob("events.out.tfevents.*")})
        found = [sorted((p.key, p.step, round(p.value, 5)) for p in read_tensorboard(folder)) for folder in folders]
        longest: list[tuple[str, int | None, float]] = max(found, key=len)
        return longest

    assert (before.rc, after.rc) == (0, 0), before.log[-3000:] + after.log[-3000:]
    assert own(before) == own(after)
    assert [step for key, step, _ in own(after) if key == "train_loss"] == list(range(8))
    for site in ("site-1", "site-2"):
        points = after.jsonl_points("server", site)
        stored = sorted((p.key, p.step, round(p.value, 5)) for p in points)
        assert [point for point in stored if point[0] == "train_loss"] == [
            point for point in own(after) if point[0] == "train_loss"
        ]
        assert [(p.step, p.round) for p in points if p.key == "train_loss"] == [(step, step // 4) for step in range(8)]
    assert set(_status(after).values()) == {"finished"}
    _assert_drawn_as_stored(after)
