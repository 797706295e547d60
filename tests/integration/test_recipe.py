# SPDX-License-Identifier: Apache-2.0
"""What ``add_tracking`` writes into a job."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContextManager
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.app_common.workflows.fedavg import FedAvg
from nvflare.app_opt.tracking.tb.tb_receiver import TBAnalyticsReceiver
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import ScriptRunner
from nvflare.recipe.utils import set_per_site_config

from trackhub.errors import ConfigError, InvalidOptionError
from trackhub.flare.flare_internals import state_folder
from trackhub.flare.job_name_notes_tags import job_info
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.recipe import add_tracking, tracking_components
from trackhub.flare.sender_widget import TrackhubSender
from trackhub.job_and_run_info import JobInfo
from trackhub.limits import Limits

SCRIPT = "import nvflare.client as flare\nfrom trackhub import Writer\n"


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "client.py"
    path.write_text(SCRIPT)
    return str(path)


def _recipe(script: str, **more: Any) -> NumpyFedAvgRecipe:
    return NumpyFedAvgRecipe(name="job", model=[0.0], min_clients=2, num_rounds=1, train_script=script, **more)


def _export(recipe_or_job: Any, folder: Path) -> Path:
    job = getattr(recipe_or_job, "_job", recipe_or_job)
    job.export_job(str(folder))
    return folder / str(job.name)


def _config(job: Path, app: str, file: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((job / app / "config" / file).read_text())
    return config


def _components(job: Path, app: str, file: str) -> dict[str, dict[str, Any]]:
    found = {c["id"]: c for c in _config(job, app, file)["components"] if c["id"].startswith("trackhub")}
    for component in found.values():
        component["args"].pop("own_records", None)  # test_context.py reads it
    return found


def test_server_side_tracking_adds_a_receiver_and_a_sender_by_stable_names(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)

    add_tracking(recipe, server={"jsonl": {"path": "elsewhere"}})

    job = _export(recipe, tmp_path / "out")
    assert _components(job, "app", "config_fed_server.json") == {
        "trackhub_receiver": {
            "id": "trackhub_receiver",
            "path": "trackhub.flare.receiver_widget.TrackhubReceiver",
            "args": {"backends": {"jsonl": {"path": "elsewhere"}}},
        }
    }
    assert _components(job, "app", "config_fed_client.json") == {
        "trackhub_sender": {"id": "trackhub_sender", "path": "trackhub.flare.sender_widget.TrackhubSender", "args": {}}
    }


def test_the_job_refers_to_the_installed_package_and_takes_no_copy_along(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)
    recipe._job.set_app_packages(["numpy"])

    add_tracking(recipe, server=["jsonl"], clients=["jsonl"])

    job = _export(recipe, tmp_path / "out")
    assert sorted(p.name for p in job.rglob("*.py")) == ["client.py"]
    assert recipe._job.job.app_packages == ["numpy", "trackhub"]


def test_the_helper_for_json_jobs_gives_what_a_recipe_exports(script: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "server": {"jsonl": {}},
        "clients": {"jsonl": {"path": "x"}},
        "limits": {"deadline_s": 5.0},
        "state_dir": "/var/trackhub",
        "name": "cifar10",
        "notes": "with *momentum*",
        "tags": ("sgd", "demo"),
        "aggregate": ("val/*",),
        "aggregate_weight": "train/samples",
        "update_statistics": True,
    }
    recipe = _recipe(script)
    add_tracking(recipe, **given)
    job = _export(recipe, tmp_path / "out")

    helped = tracking_components(**given)

    for file, components in helped.items():
        exported = _components(job, "app", file)
        assert [c["id"] for c in components] == list(exported)
        for component in components:
            assert component["path"] == exported[component["id"]]["path"]
            # FLARE leaves out arguments that are as the constructor's defaults.
            assert exported[component["id"]]["args"].items() <= component["args"].items()
    assert json.loads(json.dumps(helped)) == helped


def test_name_notes_and_tags_are_arguments_of_both_components(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)

    add_tracking(recipe, server=["jsonl"], clients=["jsonl"], name="cifar10", notes="a *note*", tags=("a", "b"))

    job = _export(recipe, tmp_path / "out")
    server, client = (_components(job, "app", f"config_fed_{end}.json") for end in ("server", "client"))
    for component in (server["trackhub_receiver"], client["trackhub_receiver"], client["trackhub_sender"]):
        assert component["args"]["job"] == {"name": "cifar10", "notes": "a *note*", "tags": ["a", "b"]}


@pytest.mark.parametrize(("name", "expected"), [("cifar10", "cifar10"), (None, "from meta"), ("", "from meta")])
def test_a_job_has_the_given_name_or_the_one_that_flare_knows(name: str | None, expected: str) -> None:
    context = FLContextManager(
        identity_name="site-1", job_id="b6b7a1f4", public_stickers={},
        private_stickers={FLContextKey.JOB_META: {"name": "from meta"}},
    ).new_context()  # fmt: skip

    info = job_info(context, {"name": name, "notes": "a note", "tags": ["a"]})

    assert info == JobInfo("b6b7a1f4", expected, "a note", ("a",))


@pytest.mark.parametrize(
    ("job", "message"),
    [({"nmae": "x"}, "'nmae' is not one of name, notes, tags"), ("cifar10", "got 'cifar10'"), ({"name": 3}, "got 3")],
)
def test_labels_that_are_none_are_refused_where_the_job_is_written(job: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrackhubSender(job=job)
    with pytest.raises(ConfigError, match=message):
        TrackhubReceiver({}, job=job)


@pytest.mark.parametrize("name", ["two\nlines", "n" * 2000])
def test_a_name_of_flare_that_cannot_be_stored_stops_no_job(name: str) -> None:
    context = FLContextManager(
        identity_name="site-1", job_id="b6b7a1f4", public_stickers={},
        private_stickers={FLContextKey.JOB_META: {"name": name}},
    ).new_context()  # fmt: skip

    assert job_info(context, None).name == "b6b7a1f4"


def test_two_jobs_of_one_name_share_no_folder_of_state(tmp_path: Path) -> None:
    context = FLContextManager(
        identity_name="site-1", job_id="j", public_stickers={}, private_stickers={}
    ).new_context()
    alike = [JobInfo(f"12345678-0000-4000-8000-00000000000{n}", "lr-0.1") for n in range(2)]
    assert alike[0].unique_name == alike[1].unique_name

    folders = [state_folder(context, str(tmp_path), job) for job in alike]

    assert folders[0] != folders[1]


def test_each_backend_is_checked_once_and_kept_as_it_was_given(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr("trackhub.registry.refuse_literal_secrets", lambda name, options: seen.append(options["path"]))
    recipe = _recipe(script)

    add_tracking(recipe, server={"jsonl": {"path": "on the server"}}, clients={"jsonl": {"path": "at a client"}})

    assert seen == ["on the server", "at a client"]


def test_sites_can_have_backends_of_their_own_or_none(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)
    set_per_site_config(recipe, {"site-1": {}, "site-2": {}, "site-3": {}})

    add_tracking(
        recipe, server=["jsonl"], clients={"jsonl": {}}, sites={"site-1": {"jsonl": {"path": "p"}}, "site-2": {}}
    )

    job = _export(recipe, tmp_path / "out")
    found = {s: _components(job, f"app_{s}", "config_fed_client.json") for s in ("site-1", "site-2", "site-3")}
    assert found["site-1"]["trackhub_receiver"]["args"] == {"backends": {"jsonl": {"path": "p"}}}
    assert list(found["site-2"]) == ["trackhub_sender"]
    assert found["site-3"]["trackhub_receiver"]["args"] == {"backends": {"jsonl": {}}}
    assert found["site-3"]["trackhub_sender"]["args"] == {"client_receiver": "trackhub_receiver"}


def test_a_site_without_a_client_app_of_its_own_is_an_error_that_says_what_to_call(script: str) -> None:
    with pytest.raises(ValueError, match=r"'site-1'.*set_per_site_config"):
        add_tracking(_recipe(script), server=["jsonl"], sites={"site-1": ["jsonl"]})


def test_a_plain_fed_job_is_served_as_a_recipe_is(script: str, tmp_path: Path) -> None:
    job = FedJob(name="plain")
    job.to_server(FedAvg(num_clients=2, num_rounds=1))
    job.to_clients(ScriptRunner(script=script))

    add_tracking(job, clients=["jsonl"])

    folder = _export(job, tmp_path / "out")
    assert _components(folder, "app", "config_fed_server.json") == {}
    client = _components(folder, "app", "config_fed_client.json")
    assert client["trackhub_sender"]["args"] == {"server_receiver": None, "client_receiver": "trackhub_receiver"}


def test_an_external_trainer_gets_time_to_finish_its_script_without_a_warning(
    script: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """FLARE's own default is 0, so a warning would greet everybody who did nothing wrong."""
    caplog.set_level("INFO", "trackhub")
    recipe = _recipe(script, launch_external_process=True)

    add_tracking(recipe, server=["jsonl"])

    (said,) = [record for record in caplog.records if "shutdown_timeout of 1 external trainer" in record.getMessage()]
    assert said.levelname == "INFO"
    executors = _config(_export(recipe, tmp_path / "out"), "app", "config_fed_client.json")["executors"]
    assert executors[0]["executor"]["args"]["shutdown_timeout"] == 30.0


def test_a_shutdown_timeout_that_somebody_chose_is_left_alone(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script, launch_external_process=True, shutdown_timeout=3.0)

    add_tracking(recipe, server=["jsonl"])

    executors = _config(_export(recipe, tmp_path / "out"), "app", "config_fed_client.json")["executors"]
    assert executors[0]["executor"]["args"]["shutdown_timeout"] == 3.0


def test_a_literal_secret_is_refused_and_not_shown(script: str) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        add_tracking(_recipe(script), server={"acme": {"api_key": "hunter2-hunter2"}})

    assert "acme.api_key" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_unknown_option_of_an_installed_backend_is_an_error_in_the_job_script(script: str) -> None:
    with pytest.raises(InvalidOptionError, match="jsonl"):
        add_tracking(_recipe(script), server={"jsonl": {"pth": "x"}})


def test_a_backend_that_is_not_installed_here_is_left_for_the_sites_to_check(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)

    with pytest.warns(UserWarning, match="'acme'"):
        add_tracking(recipe, server={"acme": {"level": 3}})

    server = _components(_export(recipe, tmp_path / "out"), "app", "config_fed_server.json")
    assert server["trackhub_receiver"]["args"] == {"backends": {"acme": {"level": 3}}}


def test_only_limits_that_differ_from_the_defaults_are_written(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)

    add_tracking(recipe, server=["jsonl"], limits=Limits(deadline_s=5.0))

    sender = _components(_export(recipe, tmp_path / "out"), "app", "config_fed_client.json")["trackhub_sender"]
    assert sender["args"] == {"limits": {"deadline_s": 5.0}}


def test_a_limit_that_is_given_by_name_is_written_even_if_it_is_the_default(script: str, tmp_path: Path) -> None:
    """So that nothing in a site's environment takes its place."""
    recipe = _recipe(script)
    given = {"deadline_s": Limits().deadline_s}

    add_tracking(recipe, server=["jsonl"], limits=given)

    sender = _components(_export(recipe, tmp_path / "out"), "app", "config_fed_client.json")["trackhub_sender"]
    assert sender["args"] == {"limits": given}


def test_a_policy_is_in_the_configuration_of_the_senders_alone(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)
    policy = {"allow": ["val/*"], "digits": 3, "clip": {"*": [0, 1]}}

    add_tracking(recipe, server=["jsonl"], clients=["jsonl"], policy=policy)

    export = _export(recipe, tmp_path / "out")
    client = _components(export, "app", "config_fed_client.json")
    assert client["trackhub_sender"]["args"]["policy"] == {**policy, "clip": {"*": [0.0, 1.0]}}
    server = _components(export, "app", "config_fed_server.json")
    assert "policy" not in {**client["trackhub_receiver"]["args"], **server["trackhub_receiver"]["args"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "nothing to track with"),
        ({"server": ["jsonl"], "policy": {"alow": ["val/*"]}}, "policy.alow: unknown rule"),
        ({"server": ["jsonl"], "policy": {"deny": ["images:*"]}}, "policy.deny: .* expected one of metrics"),
        ({"server": ["jsonl"], "policy": {"digits": 3}, "take_over": False}, "past the policy"),
        ({"server": {}}, "nothing to track with"),
        ({"clients": ["jsonl"], "take_over": False}, "take_over is False"),
        ({"clients": ["jsonl"], "take_over": "copy"}, "take_over is 'copy'"),
        ({"server": ["jsonl"], "take_over": "copy", "policy": {"allow": ["a"]}}, "'copy'.*past the policy"),
        ({"server": ["jsonl"], "take_over": "source"}, "expected true, false, 'events' or 'copy', got 'source'"),
        ({"server": ["jsonl"], "capture": "wandb"}, "capture: expected a list of tensorboard, wandb, mlflow"),
        ({"server": ["jsonl"], "capture": ["comet"]}, "cannot capture 'comet'; expected one of tensorboard"),
        ({"server": ["jsonl"], "capture_only": True}, "True only with capture"),
        ({"server": "jsonl"}, "expected {backend: options} or a list"),
        ({"server": {"jsonl": "x"}}, "expected {backend: {option: value}}"),
        ({"server": ["jsonl"], "limits": {"deadline": 5}}, "limits.deadline: unknown limit"),
        ({"server": {"jsonl": {"path": object()}}}, "what JSON can hold"),
        ({"server": ["jsonl"], "aggregate": "val/*"}, "aggregate: expected a list of patterns such as 'val/"),
        ({"server": ["jsonl"], "aggregate": ["a", ""]}, "aggregate: expected a list of patterns such as 'val/"),
        ({"server": ["jsonl"], "aggregate_weight": 3}, "aggregate_weight: expected a key such as 'train/samples'"),
        ({"server": ["jsonl"], "aggregate_weight": ""}, "aggregate_weight: expected a key"),
        (
            {"server": ["jsonl"], "federation": False, "aggregate": ["a"]},
            r"aggregate=\['a'\] contradicts federation=False",
        ),
        (
            {"server": ["jsonl"], "federation": False, "aggregate_weight": "n"},
            "aggregate_weight='n' contradicts federat",
        ),
        (
            {"server": ["jsonl"], "federation": False, "update_statistics": True},
            "update_statistics=True contradicts fe",
        ),
        (
            {"server": ["jsonl"], "federation": False, "log_model": "best"},
            "log_model='best' contradicts federation=False",
        ),
        (
            {"server": ["jsonl"], "aggregate": [], "aggregate_weight": "n"},
            "aggregate_weight: 'n' .* but aggregate is an empty list",
        ),
        ({"clients": ["jsonl"], "aggregate": ["val/*"]}, "aggregate=.* no backend is on the server"),
        ({"clients": ["jsonl"], "update_statistics": True}, "update_statistics=True .* no backend is on the server"),
        ({"clients": ["jsonl"], "log_model": "last"}, "log_model='last' .* no backend is on the server"),
        ({"server": ["jsonl"], "name": 7}, "name: expected a text that is not empty, got 7"),
        ({"server": ["jsonl"], "name": "a\nb"}, "name: .* contains U.000A"),
        ({"server": ["jsonl"], "notes": ["a"]}, "notes: expected a text"),
        ({"server": ["jsonl"], "tags": "a"}, "tags: expected a list of texts, got 'a'"),
        ({"server": ["jsonl"], "tags": ["a", ""]}, r"tags\[1\]: expected a text that is not empty"),
    ],
)
def test_a_wrong_configuration_is_an_error_before_anything_is_written(
    script: str, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        add_tracking(_recipe(script), **given)


LISTENER = """
from nvflare.widgets.widget import Widget

EVENT = "fed.analytix_log_stats"


class Collector(Widget):
    def handle_event(self, event_type, fl_ctx):
        if event_type == EVENT:
            raise AssertionError


class Other(Widget):
    def handle_event(self, event_type, fl_ctx):
        if event_type == "round_started":
            raise AssertionError
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "collector_parts.py").write_text(LISTENER)
    monkeypatch.syspath_prepend(str(tmp_path))
    return importlib.import_module("collector_parts")


@pytest.mark.parametrize(
    ("take_over", "server", "expected"),
    [
        (
            True,
            ["jsonl"],
            [
                "a .Collector., stock .TBAnalyticsReceiver. on the server will get nothing.*take_over='copy'",
                "at .Collector. at the clients needs FLARE's analytics events",
            ],
        ),
        ("events", ["jsonl"], ["on the server will get nothing"]),
        (True, None, ["on the server will get nothing.*tracking is on the client side only", "needs FLARE's"]),
        ("copy", ["jsonl"], []),
        (False, ["jsonl"], []),
    ],
)  # fmt: skip
def test_what_happens_to_listeners_of_the_job_is_said_when_tracking_is_added(
    script: str, parts: Any, take_over: Any, server: Any, expected: list[str], recwarn: pytest.WarningsRecorder
) -> None:
    recipe = _recipe(script)
    job = recipe._job
    job.to_server(parts.Collector(), id="a")
    job.to_server(parts.Other(), id="b")
    job.to_server(TBAnalyticsReceiver(), id="stock")
    job.to_clients(parts.Collector(), id="at")

    add_tracking(recipe, server=server, clients=["jsonl"], take_over=take_over)

    found = [str(w.message) for w in recwarn if "trackhub" in str(w.message)]
    assert len(found) == len(expected)
    for message, pattern in zip(found, expected, strict=True):
        assert re.search(pattern, message)


def test_where_flare_leaves_out_the_apps_of_single_sites_the_app_for_all_is_tracked(
    script: str, tmp_path: Path
) -> None:
    job = FedJob(name="both")
    job.to_server(FedAvg(num_clients=2, num_rounds=1))
    job.to_clients(ScriptRunner(script=script))
    job.to(ScriptRunner(script=script), "site-1")

    with pytest.warns(UserWarning, match=r"FLARE leaves out the own apps of site-1"):
        add_tracking(job, server=["jsonl"])

    folder = _export(job, tmp_path / "out")
    assert list(_components(folder, "app", "config_fed_client.json")) == ["trackhub_sender"]


def test_capture_is_an_argument_of_the_sender(script: str, tmp_path: Path) -> None:
    recipe = _recipe(script)

    add_tracking(recipe, server=["jsonl"], capture=("wandb", "mlflow"), capture_only=True)

    job = _export(recipe, tmp_path / "out")
    client = _components(job, "app", "config_fed_client.json")
    assert client["trackhub_sender"]["args"] == {"capture": ["wandb", "mlflow"], "capture_only": True}
    assert "capture" not in _components(job, "app", "config_fed_server.json")["trackhub_receiver"]["args"]


def test_tracking_is_added_once(script: str) -> None:
    recipe = _recipe(script)
    add_tracking(recipe, server=["jsonl"])

    with pytest.raises(ConfigError, match="already"):
        add_tracking(recipe, clients=["jsonl"])


def test_something_that_is_no_job_is_an_error() -> None:
    with pytest.raises(ConfigError, match="recipe or FedJob, got str"):
        add_tracking("job.json", server=["jsonl"])
