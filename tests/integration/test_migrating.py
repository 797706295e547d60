# SPDX-License-Identifier: Apache-2.0
"""Jobs of the shape of FLARE's tracking examples, before and after their one line is changed as docs/migrating.md says.

The training scripts are the same in both. What FLARE's own receiver stored must be in the backend's store afterwards.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from trackhub_wandb.offline_readback import read_log

from tests.integration.harness import Job, JobResult, Point, read_tensorboard

pytestmark = pytest.mark.long

TENSORBOARD = """
    from nvflare.client.tracking import SummaryWriter

    writer = SummaryWriter()
    def train(number):
        for step in range(5):
            fact(lambda: writer.add_scalar("train_loss", 1.0 / (step + 1), number * 5 + step),
                 {"train_loss": 1.0 / (step + 1)}, number * 5 + step)
            time.sleep(0.05)
    rounds(train)
"""
MLFLOW = """
    from nvflare.client.tracking import MLflowWriter

    writer = MLflowWriter()
    writer.log_params({"lr": 0.1, "batch_size": 4})
    def train(number):
        for step in range(5):
            fact(lambda: writer.log_metric("train_loss", 1.0 / (step + 1), number * 5 + step),
                 {"train_loss": 1.0 / (step + 1)}, number * 5 + step)
            time.sleep(0.05)
    rounds(train)
"""
WANDB = """
    from nvflare.client.tracking import WandBWriter

    writer = WandBWriter()
    def train(number):
        for step in range(5):
            values = {"train_loss": 1.0 / (step + 1), "lr": 0.1}
            fact(lambda: writer.log(values, number * 5 + step), values, number * 5 + step)
            time.sleep(0.05)
    rounds(train)
"""
PYTORCH = """
    import torch
    from nvflare.client.tracking import SummaryWriter

    from net import Net

    net, writer = Net(), SummaryWriter()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        net.load_state_dict({name: torch.as_tensor(value) for name, value in model.params.items()})
        for step in range(5):
            optimizer.zero_grad()
            loss = net(torch.ones(4, 2)).square().mean()
            loss.backward()
            optimizer.step()
            at = model.current_round * 5 + step
            fact(lambda: writer.add_scalar("train_loss", loss.item(), at), {"train_loss": loss.item()}, at)
            time.sleep(0.05)
        flare.send(flare.FLModel(params=net.state_dict(), metrics={"accuracy": 0.5}))
"""
_NET = """
    import torch

    class Net(torch.nn.Linear):
        def __init__(self):
            torch.manual_seed(0)  # both jobs begin with the same model
            super().__init__(2, 1)
"""
_PYTORCH_RECIPE = """
from net import Net
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe

recipe = FedAvgRecipe(name="job", model=Net(), min_clients=2, num_rounds=2, train_script=str(here / "client.py"))
"""
_WANDB_CONFIG = {
    "mode": "offline", "wandb_args": {"project": "example", "group": "example", "job_type": "train", "name": "example"},
}  # fmt: skip
SHAPES = {
    "tensorboard": (TENSORBOARD, "", 'add_experiment_tracking(recipe, "tensorboard")'),
    "mlflow": (MLFLOW, "", 'add_experiment_tracking(recipe, "mlflow")'),
    "wandb": (WANDB, "", f'add_experiment_tracking(recipe, "wandb", tracking_config={_WANDB_CONFIG})'),
    "hello-pt": (PYTORCH, _PYTORCH_RECIPE, 'add_experiment_tracking(recipe, "tensorboard")'),
}
"""For each shape: the training script, the recipe if it is another one than the harness's, and FLARE's own line."""


def stored_before(shape: str, result: JobResult) -> set[tuple[str, str, int | None, float]]:
    """Return what FLARE's own receiver stored, as site, key, step and value. MLflow's runs are taken together."""
    found: set[tuple[str, str, int | None, float]] = set()
    if shape == "wandb":
        # FLARE's receiver may call two runs alike that begin in one second; so all are taken together.
        for path in result.workspace.parents[1].rglob("offline-run-*/run-*.wandb"):
            for row in read_log(path).rows:
                step = int(row["_step"])
                found |= {("", key, step, round(float(row[key]), 6)) for key in row if not key.startswith("_")}
        return found
    if shape != "mlflow":
        for site in ("site-1", "site-2"):
            (folder,) = [path for path in result.workspace.rglob(f"tb_events/{site}") if path.is_dir()]
            found |= {(site, *rest) for rest in spelled(read_tensorboard(folder))}
    else:
        (file,) = result.workspace.rglob("*.db")
        with contextlib.closing(sqlite3.connect(file)) as database:
            rows = database.execute("SELECT key, step, value FROM metrics").fetchall()
        found |= {("", key, step, value) for key, step, value in rows}
    return found


def spelled(points: list[Point]) -> set[tuple[str, int | None, float]]:
    return {(point.key, point.step, round(point.value, 6)) for point in points}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_job_stores_the_same_and_more_after_one_line_is_changed(shape: str, tmp_path: Path) -> None:
    script, recipe, stock = SHAPES[shape]
    backend = "tensorboard" if shape == "hello-pt" else shape
    more = f"from nvflare.recipe.utils import add_experiment_tracking\n{recipe}\n{stock}\n"
    tracking = f"{recipe}\nadd_tracking(recipe, server=[{backend!r}, 'jsonl'])\n"
    modules = {"net": _NET}
    env = {"PYTHONPATH": str(tmp_path / "before"), "WANDB_MODE": "offline"}

    before = Job(tmp_path / "before", script, None, more=more, modules=modules, env=env).run()
    env = {"PYTHONPATH": str(tmp_path / "after"), "WANDB_MODE": "offline"}
    after = Job(tmp_path / "after", script, None, more=tracking, modules=modules, env=env).run()

    assert (before.rc, after.rc) == (0, 0), before.log[-2000:] + after.log[-2000:]
    assert (tmp_path / "before" / "client.py").read_text() == (tmp_path / "after" / "client.py").read_text()
    old = stored_before(shape, before)
    assert old
    for site in ("site-1", "site-2"):
        facts = {(fact.key, fact.step, round(fact.value, 6)) for fact in after.facts(site)}
        assert spelled(after.jsonl_points("server", site)) == facts
        assert {(key, step, round(value, 6)) for of, key, step, value in old if of in ("", site)} <= facts
