# SPDX-License-Identifier: Apache-2.0
"""The global model is found where FLARE's own persistors save it, and what is missing is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor

from trackhub.errors import ConfigError
from trackhub.flare.find_global_model import find_model
from trackhub.flare.recipe import add_tracking
from trackhub.flare.records_made_by_trackhub import OwnRecords, ServerRecords


class UsersPersistor(ModelPersistor):  # type: ignore[misc]  # FLARE has no types
    """Knows its models by their inventory alone."""

    def __init__(self, **models: Path) -> None:
        super().__init__()
        self._models = models

    def load_model(self, fl_ctx: Any) -> Any:
        return ModelLearnable()

    def save_model(self, model: Any, fl_ctx: Any) -> None:
        """Save nothing."""

    def get_model_inventory(self, fl_ctx: Any) -> Any:
        return {
            name: SimpleNamespace(location=str(path), props={"source": "initial_ckpt"} if name == "first" else {})
            for name, path in self._models.items()
        }


def context(result_root: Path, **components: Any) -> Any:
    """Return what stands for FLARE's context in a job with these components."""
    engine = SimpleNamespace(get_all_components=lambda: components, components=components)
    workspace = SimpleNamespace(get_result_root=lambda job: str(result_root))
    return SimpleNamespace(get_engine=lambda: engine, get_workspace=lambda: workspace, get_job_id=lambda: "job-1")


def test_pytorchs_best_and_last_models_are_told_apart(tmp_path: Path) -> None:
    persistor = PTFileModelPersistor(model=None)
    for attribute, name in (("_ckpt_save_path", "last.pt"), ("_best_ckpt_save_path", "best.pt")):
        (tmp_path / name).write_bytes(name.encode())
        setattr(persistor, attribute, str(tmp_path / name))
    job = context(tmp_path, persistor=persistor)

    assert find_model("best", job).files == [(tmp_path / "best.pt", "model/best.pt")]
    assert find_model("last", job).files == [(tmp_path / "last.pt", "model/last.pt")]


def test_numpys_model_is_found_and_a_best_one_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "server.npy").write_bytes(b"x")
    job = context(tmp_path, persistor=NPModelPersistor())

    assert find_model("last", job).files == [(tmp_path / "models" / "server.npy", "model/server.npy")]
    best = find_model("best", job)
    assert best.files == []
    assert "NPModelPersistor has saved no best model" in best.problem


def test_a_persistor_of_the_users_says_what_it_has(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("first", "best_one", "newest")}
    for path in models.values():
        path.write_bytes(b"x")
    job = context(tmp_path, persistor=UsersPersistor(**models))

    assert find_model("best", job).files == [(tmp_path / "best_one", "model/best_one")]
    assert find_model("last", job).files == [(tmp_path / "newest", "model/newest")]


def test_each_file_of_a_model_that_is_a_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    for name in ("saved_model.pb", "variables/data"):
        (tmp_path / "saved" / name).write_bytes(b"x")
    (tmp_path / "saved" / "link").symlink_to("/etc/hostname")
    job = context(tmp_path, persistor=UsersPersistor(saved=tmp_path / "saved"))

    keys = [key for _, key in find_model("last", job).files]

    assert keys == ["model/saved/saved_model.pb", "model/saved/variables/data"]


@pytest.mark.parametrize("components", [{}, {"persistor": UsersPersistor()}])
def test_without_a_model_there_is_one_warning_that_says_why(tmp_path: Path, components: dict[str, Any]) -> None:
    warnings: list[str] = []
    component: Any = SimpleNamespace(log_warning=lambda fl_ctx, message, **_: warnings.append(message))
    records = ServerRecords(OwnRecords(log_model="last"), component)

    records.end(SimpleNamespace(), context(tmp_path, **components))  # type: ignore[arg-type]

    assert len(warnings) == 1
    assert "log_model='last'" in warnings[0]
    assert ("no persistor" if not components else "UsersPersistor has saved no last model") in warnings[0]


@pytest.mark.parametrize(
    "given",
    [
        {"clients": ["jsonl"], "log_model": "best"},
        {"server": ["jsonl"], "federation": False, "log_model": "best"},
        {"server": ["jsonl"], "log_model": "worst"},
        {"server": ["jsonl"], "system_metrics": 0},
    ],
)
def test_what_cannot_be_logged_is_an_error_where_the_job_is_written(given: dict[str, Any], tmp_path: Path) -> None:
    script = tmp_path / "client.py"
    script.write_text("")
    recipe = NumpyFedAvgRecipe(name="job", model=[0.0], min_clients=2, num_rounds=1, train_script=str(script))

    with pytest.raises(ConfigError, match=r"log_model|system_metrics"):
        add_tracking(recipe, **given)


@pytest.mark.parametrize("values", [{"contexts": {}}, {"log_model": "worst"}, ["x"], {"system_metrics": "fast"}])
def test_an_argument_of_another_form_is_refused(values: Any) -> None:
    with pytest.raises(ConfigError):
        OwnRecords.of(values)
