# SPDX-License-Identifier: Apache-2.0
"""The global model is found where FLARE's own persistors save it, in the job's folder, and what is missing is said."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from nvflare.apis.fl_constant import FLContextKey, ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model import ModelLearnable
from nvflare.app_common.abstract.model_persistor import ModelPersistor
from nvflare.app_common.np.np_model_persistor import NPModelPersistor
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_opt.pt.file_model_persistor import PTFileModelPersistor

from trackhub.errors import ConfigError
from trackhub.flare.find_global_model import find_model
from trackhub.flare.recipe import add_tracking
from trackhub.flare.records_made_by_trackhub import OwnRecords, ServerRecords

SIMULATED = "simulate_job"
"""The id of each job in the simulator."""


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


def context(run_dir: Path, *, job: str = "job-1", app_root: Path | None = None, **components: Any) -> Any:
    """Return what stands for FLARE's context in a job with these components, at a provisioned server by default."""
    workspace = SimpleNamespace(
        get_result_root=lambda job: str(run_dir),
        get_run_dir=lambda job: str(run_dir),
        get_startup_kit_dir=lambda: str(run_dir.parent / "startup"),
    )
    engine = SimpleNamespace(
        get_all_components=lambda: components, components=components, get_workspace=lambda: workspace
    )
    fl_ctx = FLContext()
    for key, value in {
        ReservedKey.ENGINE: engine,
        ReservedKey.RUN_NUM: job,
        FLContextKey.APP_ROOT: str(app_root),
    }.items():
        fl_ctx.put(key, value, private=True, sticky=False)
    return fl_ctx


def found(which: Any, fl_ctx: Any) -> list[tuple[Path, str]]:
    """Return the files of the model, and the key of each."""
    return [(file.path, file.key) for file in find_model(which, fl_ctx).files]


class Federation:
    """Takes the place of the federation run, and keeps what it is given."""

    def __init__(self) -> None:
        self.logged: dict[str, bytes] = {}

    def log_file(self, file: Any, key: str, artifact_type: str) -> None:
        self.logged[key] = file.read()


def logged_and_warned(which: Any, fl_ctx: Any) -> tuple[dict[str, bytes], list[str]]:
    """Return the files that the federation run gets at the end of the job, and the warnings."""
    warnings: list[str] = []
    component: Any = SimpleNamespace(log_warning=lambda fl_ctx, message, **_: warnings.append(message))
    federation: Any = Federation()
    ServerRecords(OwnRecords(log_model=which), component).end(federation, fl_ctx)
    return federation.logged, warnings


def test_pytorchs_best_and_last_models_are_told_apart(tmp_path: Path) -> None:
    persistor = PTFileModelPersistor(model=None)
    for attribute, name in (("_ckpt_save_path", "last.pt"), ("_best_ckpt_save_path", "best.pt")):
        (tmp_path / name).write_bytes(name.encode())
        setattr(persistor, attribute, str(tmp_path / name))
    job = context(tmp_path, persistor=persistor)

    assert found("best", job) == [(tmp_path / "best.pt", "model/best.pt")]
    assert found("last", job) == [(tmp_path / "last.pt", "model/last.pt")]


def test_numpys_model_is_found_and_a_best_one_is_said_to_be_missing(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "server.npy").write_bytes(b"x")
    job = context(tmp_path, persistor=NPModelPersistor())

    assert found("last", job) == [(tmp_path / "models" / "server.npy", "model/server.npy")]
    best = find_model("best", job)
    assert best.files == []
    assert "NPModelPersistor has saved no best model" in best.problem


def test_a_persistor_of_the_users_says_what_it_has(tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("first", "best_one", "newest")}
    for path in models.values():
        path.write_bytes(b"x")
    job = context(tmp_path, persistor=UsersPersistor(**models))

    assert found("best", job) == [(tmp_path / "best_one", "model/best_one")]
    assert found("last", job) == [(tmp_path / "newest", "model/newest")]


def test_each_file_of_a_model_that_is_a_folder_is_taken(tmp_path: Path) -> None:
    (tmp_path / "saved" / "variables").mkdir(parents=True)
    for name in ("saved_model.pb", "variables/data"):
        (tmp_path / "saved" / name).write_bytes(b"x")
    (tmp_path / "saved" / "link").symlink_to("/etc/hostname")
    job = context(tmp_path, persistor=UsersPersistor(saved=tmp_path / "saved"))

    keys = [key for _, key in found("last", job)]

    assert keys == ["model/saved/saved_model.pb", "model/saved/variables/data"]


@pytest.mark.parametrize(("files", "problem"), [(0, "has no file"), (1001, "has more than 1,000 files")])
def test_a_model_folder_without_files_or_with_too_many_gives_a_warning(
    tmp_path: Path, files: int, problem: str
) -> None:
    """No part of a model is logged in place of the whole."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for number in range(files):
        (folder / f"part-{number}").touch()

    logged, warnings = logged_and_warned("last", context(tmp_path, persistor=UsersPersistor(saved=folder)))

    assert logged == {}
    assert len(warnings) == 1
    assert problem in warnings[0]


@pytest.mark.parametrize("components", [{}, {"persistor": UsersPersistor()}])
def test_without_a_model_there_is_one_warning_that_says_why(tmp_path: Path, components: dict[str, Any]) -> None:
    _, warnings = logged_and_warned("last", context(tmp_path, **components))

    assert len(warnings) == 1
    assert "log_model='last'" in warnings[0]
    assert ("no persistor" if not components else "UsersPersistor has saved no last model") in warnings[0]


@pytest.fixture
def server(tmp_path: Path) -> tuple[Path, Path]:
    """A server's workspace with a job's run folder and a file that is none of the job's. Return these two."""
    run_dir, secret = tmp_path / "job-1", tmp_path / "startup" / "server.key"
    (run_dir / "app_server").mkdir(parents=True)
    secret.parent.mkdir()
    secret.write_bytes(b"PRIVATE KEY")
    return run_dir, secret


PLACES = ["{secret}", "../../startup/server.key", "../../startup", "link", "folder/server.key", "..", "../.."]
"""Where a job says that its model is, relative to the folder of its app."""


@pytest.mark.parametrize("place", PLACES)
def test_a_job_gets_no_file_of_the_server_as_pytorchs_best_model(server: tuple[Path, Path], place: str) -> None:
    run_dir, secret = server
    app = run_dir / "app_server"
    (app / "link").symlink_to(secret)
    (app / "folder").symlink_to(secret.parent)
    persistor = PTFileModelPersistor(model=None, best_global_model_file_name=place.format(secret=secret))
    job = context(run_dir, app_root=app, persistor=persistor)
    persistor._initialize(job)

    logged, warnings = logged_and_warned("best", job)

    assert logged == {}
    assert len(warnings) == 1
    assert "outside the job's folder" in warnings[0]


@pytest.mark.parametrize(
    ("model_dir", "model_name"),
    [("{startup}", "server.key"), ("../startup", "server.key"), ("../startup", ""), (".", "link"), ("", "")],
)
def test_a_job_gets_no_file_of_the_server_as_numpys_last_model(
    server: tuple[Path, Path], model_dir: str, model_name: str
) -> None:
    run_dir, secret = server
    (run_dir / "link").symlink_to(secret)
    persistor = NPModelPersistor(model_dir=model_dir.format(startup=secret.parent), model_name=model_name)

    logged, warnings = logged_and_warned("last", context(run_dir, persistor=persistor))

    assert logged == {}
    assert len(warnings) == 1


def test_what_a_persistor_lists_outside_the_job_is_not_read(server: tuple[Path, Path]) -> None:
    run_dir, secret = server

    logged, warnings = logged_and_warned("last", context(run_dir, persistor=UsersPersistor(newest=secret)))

    assert logged == {}
    assert len(warnings) == 1
    assert str(secret) in warnings[0]


@pytest.mark.parametrize("replaced", ["file", "folder"])
def test_a_link_that_takes_the_models_place_later_is_not_followed(server: tuple[Path, Path], replaced: str) -> None:
    run_dir, secret = server
    model = run_dir / "models" / "server.key"
    model.parent.mkdir()
    model.write_bytes(b"model")
    (file,) = find_model("last", context(run_dir, persistor=UsersPersistor(newest=model))).files
    model.unlink()
    if replaced == "file":
        model.symlink_to(secret)
    else:
        model.parent.rmdir()
        model.parent.symlink_to(secret.parent)

    with pytest.raises(OSError):
        file.open()


def test_a_pipe_in_the_place_of_the_model_holds_nothing_up(server: tuple[Path, Path]) -> None:
    run_dir, _ = server
    (run_dir / "models").mkdir()
    os.mkfifo(run_dir / "models" / "server.npy")

    logged, _ = logged_and_warned("last", context(run_dir, persistor=NPModelPersistor()))

    assert logged == {}


def test_a_run_folder_that_is_reached_by_a_link_is_the_jobs_own(tmp_path: Path) -> None:
    (tmp_path / "disk" / "job-1" / "models").mkdir(parents=True)
    (tmp_path / "disk" / "job-1" / "models" / "server.npy").write_bytes(b"model")
    (tmp_path / "workspace").symlink_to(tmp_path / "disk")

    logged, warnings = logged_and_warned(
        "last", context(tmp_path / "workspace" / "job-1", persistor=NPModelPersistor())
    )

    assert (logged, warnings) == ({"model/server.npy": b"model"}, [])


def test_in_the_simulator_a_model_may_be_saved_anywhere(tmp_path: Path) -> None:
    """There, the submitter is the operator."""
    (tmp_path / "run").mkdir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "newest.pt").write_bytes(b"model")
    persistor = UsersPersistor(newest=tmp_path / "mine" / "newest.pt")

    logged, warnings = logged_and_warned("last", context(tmp_path / "run", job=SIMULATED, persistor=persistor))

    assert (logged, warnings) == ({"model/newest.pt": b"model"}, [])


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
