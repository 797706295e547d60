# SPDX-License-Identifier: Apache-2.0
"""A job whose backends cannot be used: the script that makes it ends with the reason, before FLARE starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv

from trackhub.errors import ConfigError
from trackhub.flare.recipe import add_tracking


@pytest.fixture
def recipe(tmp_path: Path) -> NumpyFedAvgRecipe:
    (tmp_path / "client.py").write_text("import nvflare.client as flare\n")
    script = str(tmp_path / "client.py")
    return NumpyFedAvgRecipe(name="job", model=[0.0], min_clients=2, num_rounds=1, train_script=script)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("tensorbord", "tensorboard"),
        ("wadb", "wandb"),
        ("W&B", ""),
        ("MLflow", "mlflow"),
        ("json", "jsonl"),
        ("none", ""),
    ],
)
def test_a_misspelt_backend_is_an_error_in_the_job_script(recipe: NumpyFedAvgRecipe, name: str, meant: str) -> None:
    hint = f"Did you mean {meant!r}" if meant else ""
    with pytest.raises(ConfigError, match=f"no backend '{name}' here; available: .*{hint}"):
        add_tracking(recipe, clients={name: {}})


@pytest.mark.parametrize("way", ["recipe", "fed_job"])
@pytest.mark.filterwarnings("ignore:trackhub. backend 'acme' cannot be checked here")
def test_the_simulator_does_not_start_if_a_backend_cannot_be_used_here(
    recipe: NumpyFedAvgRecipe, tmp_path: Path, way: str
) -> None:
    add_tracking(recipe, server=["jsonl"], clients=["acme"])

    with pytest.raises(ConfigError, match=r"the job does not start.* there is no backend 'acme' here; available: "):
        if way == "recipe":
            recipe.execute(SimEnv(num_clients=2, workspace_root=str(tmp_path / "workspace")))
        else:
            recipe._job.simulator_run(str(tmp_path / "workspace"), n_clients=2)

    assert not (tmp_path / "workspace" / "server").exists()


def test_a_workspace_with_a_space_in_its_path_is_warned_of(
    recipe: NumpyFedAvgRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FLARE's simulator starts no client there, and ends with 0. If FLARE mends this, delete the warning."""
    (tmp_path / "my jobs").mkdir()
    monkeypatch.chdir(tmp_path / "my jobs")
    job = recipe._job
    monkeypatch.setattr(job, "simulator_run", lambda workspace, **_: 0)
    add_tracking(job, server=["jsonl"])

    with pytest.warns(UserWarning, match="my jobs/runs' has a space in its path"):
        job.simulator_run("runs", n_clients=2)
