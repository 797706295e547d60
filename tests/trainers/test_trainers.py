# SPDX-License-Identifier: Apache-2.0
"""Each trainer's own library logs through its logger: alone in ``trackhub.local``, and all of them in one FLARE job.

In the job, each also logs every other kind of record into every backend: a gallery of what can be logged, which
``TRACKHUB_GALLERY=FOLDER`` keeps for whoever wants to look at it.

`make trainers` installs the libraries into ``.venv-trainers``, and `make test-all` runs these tests there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.stores import BACKENDS, canonical, own_home, read_run, same_points
from tests.integration.harness import Job, JobResult, read_jsonl
from trackhub.job_and_run_info import Side

pytestmark = pytest.mark.long

SCRIPTS = {
    "lightning": """
        import lightning as L, torch
        from trackhub.integrations.lightning import TrackhubLogger

        class Model(L.LightningModule):
            def __init__(self, width=3, lr=0.1):
                super().__init__()
                self.save_hyperparameters()
                self.layer = torch.nn.Linear(width, 1)
            def training_step(self, batch, i):
                loss = self.layer(batch[0]).square().mean()
                self.log("train/loss", loss)
                return loss
            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=self.hparams.lr)

        def train(number):
            logger = TrackhubLogger(log_model=True)
            data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(8, 3)), batch_size=2)
            trainer = L.Trainer(logger=logger, max_epochs=2, log_every_n_steps=1, accelerator="cpu",
                                default_root_dir=f"checkpoints-{number}", enable_progress_bar=False)
            trainer.fit(Model(), data)
    """,
    "transformers": """
        import torch
        from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
        import trackhub.integrations.transformers

        def train(number):
            config = BertConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                                intermediate_size=8, max_position_embeddings=8)
            rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor(i % 2)} for i in range(8)]
            args = TrainingArguments(f"out-{number}", max_steps=4, logging_steps=1, eval_strategy="steps",
                                     eval_steps=2, report_to="trackhub", use_cpu=True, save_strategy="no",
                                     disable_tqdm=True, per_device_train_batch_size=2)
            Trainer(BertForSequenceClassification(config), args, train_dataset=rows, eval_dataset=rows[:2]).train()
    """,
    "accelerate": """
        import numpy as np
        from accelerate import Accelerator
        from trackhub.integrations.accelerate import TrackhubTracker

        def train(number):
            accelerator = Accelerator(log_with=TrackhubTracker(), cpu=True)
            accelerator.init_trackers("any", config={"lr": 0.1, "optim": {"name": "sgd"}})
            for step in range(3):
                accelerator.log({"train/loss": 1.0 / (step + 1), "note": "text"}, step=step)
            accelerator.get_tracker("trackhub").log_images({"samples": [np.zeros((4, 4))]}, step=2)
            accelerator.end_training()
    """,
    "xgboost": """
        import numpy as np, xgboost
        from trackhub.integrations.xgboost import TrackhubCallback

        def train(number):
            rng = np.random.default_rng(0)
            x = rng.random((60, 3))
            data = xgboost.DMatrix(x, label=(x[:, 0] > 0.5).astype(int))
            xgboost.train({"objective": "binary:logistic", "max_depth": 2, "nthread": 1}, data, 4,
                          evals=[(data, "train")], callbacks=[TrackhubCallback()], verbose_eval=False,
                          early_stopping_rounds=3)
            xgboost.cv({"objective": "binary:logistic", "nthread": 1}, data, 2, nfold=2, as_pandas=False,
                       callbacks=[TrackhubCallback(first_step=100)])
    """,
    "lightgbm": """
        import numpy as np, lightgbm
        from trackhub.integrations.lightgbm import TrackhubCallback

        def train(number):
            x = np.random.default_rng(0).random((100, 3))
            data = lightgbm.Dataset(x, label=x[:, 0])
            lightgbm.train({"objective": "regression", "num_leaves": 4, "verbose": -1, "num_threads": 1}, data, 4,
                           valid_sets=[data], callbacks=[TrackhubCallback()])
    """,
    "keras": """
        import os
        os.environ["KERAS_BACKEND"] = "torch"
        import keras, numpy as np
        from trackhub.integrations.keras import TrackhubCallback

        def train(number):
            model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
            model.compile(optimizer=keras.optimizers.SGD(0.1), loss="mse")
            model.fit(np.ones((8, 3)), np.zeros(8), epochs=3, batch_size=4, verbose=0,
                      callbacks=[TrackhubCallback(batches=2, histograms=True)])
    """,
}
ALONE = """
import trackhub
with trackhub.local(["jsonl"], folder="runs", job="j", strict=True) as writer:
    train(0)
print(writer.report.balanced)
"""
POINTS = {
    "lightning": {"train/loss": 8, "epoch": 8},
    "transformers": {"train/loss": 4, "eval/loss": 2},
    "accelerate": {"train/loss": 3},
    "xgboost": {"train/logloss": 6, "test/logloss/std": 2},
    "lightgbm": {"training/l2": 4},
    "keras": {"loss": 3, "batch/loss": 3},
}
"""How many points of a key a training makes."""

PARAMS: dict[str, dict[str, Any]] = {
    "lightning": {"width": 3, "lr": 0.1},
    "transformers": {"args/max_steps": 4, "model/hidden_size": 8},
    "accelerate": {"lr": 0.1, "optim/name": "sgd"},
    "xgboost": {"objective": "binary:logistic", "max_depth": "2"},
    "lightgbm": {"num_leaves": 4, "objective": "regression"},
    "keras": {"epochs": 3, "optimizer/name": "SGD"},
}
KINDS = {
    "lightning": {"artifact"},
    "accelerate": {"text", "image"},
    "xgboost": {"summary"},
    "keras": {"histogram"},
}


def source(trainer: str) -> str:
    return textwrap.dedent(SCRIPTS[trainer])


def check(trainer: str, lines: list[dict[str, Any]], *, trainings: int) -> None:
    """Check what a trainer logged in so many trainings."""
    points = [(key, line["step"]) for line in lines if line["kind"] == "metrics" for key in line["values"]]
    for key, count in POINTS[trainer].items():
        assert len([point for point in points if point[0] == key]) == count * trainings, (key, points)
    assert all(step is not None for _, step in points)
    params: dict[str, Any] = {}
    for line in lines:
        if line["kind"] == "params":
            params |= line["values"]
    assert params.items() >= PARAMS[trainer].items()
    assert {line["kind"] for line in lines} >= KINDS.get(trainer, set())
    if trainer == "keras":
        keys = {line["key"] for line in lines if line["kind"] == "histogram"}
        assert keys >= {"parameters/sequential/dense/kernel", "parameters/sequential/dense/bias"}


def skip_without(trainer: str) -> None:
    if importlib.util.find_spec(trainer) is None:
        pytest.skip(f"{trainer} is not installed here: make trainers")


@pytest.mark.parametrize("trainer", SCRIPTS)
def test_a_trainers_own_logger_delivers_what_it_logs(trainer: str, tmp_path: Path) -> None:
    skip_without(trainer)
    (tmp_path / "script.py").write_text(source(trainer) + ALONE)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("True\n")
    check(trainer, read_jsonl(tmp_path / "runs/j/jsonl/j/local.jsonl"), trainings=1)


GALLERY = Path(__file__).parents[2] / "jobs" / "gallery" / "gallery.py"
OTHER_KINDS = ("params", "tags", "summary", "texts", "images", "histograms", "tables", "artifacts")


def check_stored(result: JobResult, site: str) -> None:
    """Each backend has the points of the lines of JSON, and as many records of each other kind, by its own reader."""
    run_dir = result.run_dir("server")
    lines = read_run("jsonl", run_dir, result.job, site, Side.SERVER)
    for backend in BACKENDS:
        found = read_run(backend, run_dir, result.job, site, Side.SERVER)
        same_points(found.points, canonical(backend, lines.points))
        for kind in OTHER_KINDS:
            stored, logged = getattr(found, kind), getattr(lines, kind)
            assert logged, (site, kind)
            assert stored is None or len(stored) == len(logged), (backend, site, kind)  # None: this store cannot tell


def test_every_trainer_logs_every_kind_of_record_in_a_federated_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each site has another trainer."""
    own_home(tmp_path / "home", monkeypatch)
    for trainer in SCRIPTS:
        skip_without(trainer)
    trainers = list(SCRIPTS)
    script = f"""
        import importlib
        import gallery, trackhub
        own = importlib.import_module("train_" + {trainers}[int(SITE.removeprefix("site-")) - 1]).train

        def train(number):
            if number == 0:
                gallery.everything(trackhub.Writer(), "gallery")
            own(number)

        rounds(train)
    """
    modules = {f"train_{trainer}": source(trainer) for trainer in trainers} | {"gallery": GALLERY.read_text()}
    env = {"PYTHONPATH": str(tmp_path / "job"), "HF_HUB_OFFLINE": "1"}
    # Six libraries that load for long share two cores, so the last trainer may end long after the first.
    tracking = {"server": BACKENDS, "limits": {"sites_s": 120.0, "deadline_s": 120.0}, "name": "gallery"}
    job = Job(tmp_path / "job", script, tracking, n_clients=len(trainers), modules=modules, env=env, external=True)

    result = job.run(timeout_s=280)

    assert result.rc == 0, result.log[-4000:]
    if kept := os.environ.get("TRACKHUB_GALLERY"):
        shutil.copytree(result.workspace, kept)
    report = result.report("server")
    assert report["balanced"], {name: site["counted"] for name, site in report["sites"].items()}
    for number, trainer in enumerate(trainers):
        check(trainer, result.jsonl("server", f"site-{number + 1}"), trainings=2)
        check_stored(result, f"site-{number + 1}")
