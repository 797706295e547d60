# SPDX-License-Identifier: Apache-2.0
"""XGBoost in FLARE: each point is stored once, and the status is the same and true at all sites.

It needs a library that is not installed where the backends are tested, so its jobs run in ``.venv-trainers``, which
``make trainers`` creates.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.integration.harness import JobResult, read_jsonl, run_script

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


if __name__ == "__main__":
    recipe = xgboost(sys.argv[1])
    add_tracking(recipe, server={"jsonl": {}}, clients={"jsonl": {}})
    recipe.execute(SimEnv(clients=SITES, workspace_root=str(HERE / "workspace")))
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


def _run(folder: Path, kind: str, trainer: str = "") -> JobResult:
    for name, text in {"job.py": _JOB, "parts.py": _PARTS}.items():
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
