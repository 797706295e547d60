# SPDX-License-Identifier: Apache-2.0
"""What a job was made with is in each run, where each backend's users look, and passes the site's policy."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import nvflare
import pytest
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from trackhub_wandb.offline_readback import read_log

from tests.integration.harness import Job, JobResult, files_with
from trackhub.errors import ConfigError
from trackhub.flare.log_job_context import check_context, context_of_job, log_context
from trackhub.flare.recipe import add_tracking
from trackhub.flare.sender_widget import TrackhubSender

PLANTED = "pl4nted-value"
TRAINER = """
from trackhub import Writer

with Writer() as writer:
    rounds(lambda now: writer.log({"val/loss": 1.0 / (now + 1)}, now))
"""


def recipe(tmp_path: Path, train_args: str) -> NumpyFedAvgRecipe:
    script = tmp_path / "client.py"
    script.write_text("")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLARE's own about secrets
        return NumpyFedAvgRecipe(
            name="job", model=[0.0], min_clients=2, num_rounds=3, train_script=str(script), train_args=train_args
        )


def test_a_recipes_arguments_are_captured_without_secrets(tmp_path: Path) -> None:
    found = context_of_job(recipe(tmp_path, f"--lr 0.1 --api-key {PLANTED} --token ${{secret:TOK}}"))

    assert found["recipe/class"] == "NumpyFedAvgRecipe"
    assert (found["recipe/min_clients"], found["recipe/num_rounds"]) == (2, 3)
    assert found["recipe/train_args"] == "--lr 0.1 --api-key *** --token ***"
    assert PLANTED not in str(found)
    check_context(found)


def test_context_is_on_by_default_and_one_switch_turns_it_off(tmp_path: Path) -> None:
    on, off = (recipe(tmp_path, "") for _ in range(2))
    add_tracking(on, server=["jsonl"])
    add_tracking(off, server=["jsonl"], context=False)
    on.export(str(tmp_path / "on"))
    off.export(str(tmp_path / "off"))

    for folder, is_on in (("on", True), ("off", False)):
        for side in ("server", "client"):
            text = (tmp_path / folder / "job" / "app" / "config" / f"config_fed_{side}.json").read_text()
            assert ("recipe/num_rounds" in text) is is_on


def test_facts_of_git_are_tags_too_and_a_commit_is_shown_as_git_says_it() -> None:
    params: dict[str, Any] = {}
    tags: dict[str, str] = {}

    log_context({"git/commit": "git:0123", "git/dirty": True, "x": None}, params.update, tags.update)

    assert params == {"context/git/commit": "0123", "context/git/dirty": True}
    assert tags == {"source.git.commit": "0123", "source.git.dirty": "true"}


@pytest.mark.parametrize("context", [["x"], "x", {"a": {"b": 1}}, {1: "x"}])
def test_a_context_of_another_form_is_refused_where_the_job_is_written(context: Any) -> None:
    with pytest.raises(ConfigError, match="context"):
        TrackhubSender(own_records={"context": context})


def repository(folder: Path) -> str:
    """Make the folder a git repository with one commit. Return the commit."""
    folder.mkdir(parents=True)
    for command in (["init", "--quiet"], ["commit", "--quiet", "--allow-empty", "-m", "first"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *identity, *command], cwd=folder, check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True)
    return head.stdout.strip()


def params_of(result: JobResult, receiver: str, site: str) -> list[dict[str, Any]]:
    return [line["values"] for line in result.jsonl(receiver, site) if line["kind"] == "params"]


@pytest.mark.long
def test_each_run_of_each_backend_says_what_it_was_made_with(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    commit = repository(folder)
    server = {"jsonl": {}, "mlflow": {}, "wandb": {"mode": "offline"}}
    tracking = {"server": server, "clients": ["jsonl"], "context": True, "system_metrics": 0.5, "log_model": "last"}

    result = Job(folder, TRAINER, tracking, env={"WANDB_API_KEY": PLANTED}).run()

    assert result.rc == 0, result.log[-6000:]
    assert result.report("server")["balanced"]
    common = {
        "context/command": "python job.py",
        "context/git/commit": commit,
        "context/git/dirty": True,  # git does not know the script
        "context/recipe/class": "NumpyFedAvgRecipe",
        "context/recipe/num_rounds": 2,
        "context/versions/nvflare": nvflare.__version__,
        "context/versions/python": ".".join(map(str, sys.version_info[:3])),
    }
    of_server = {
        "context/flare/min_clients": 2,
        "context/flare/num_rounds": 2,
        "context/flare/sites": "site-1, site-2",
        "context/flare/workflows": "FedAvg",
    }
    for receiver, site in (("server", "federation"), ("server", "site-1"), ("server", "site-2"), ("site-1", "site-1")):
        (params,) = params_of(result, receiver, site)  # once
        expected = common | (of_server if site == "federation" else {})
        assert params.items() >= expected.items(), (receiver, site)
        assert ("context/flare/sites" in params) is (site == "federation")

    with sqlite3.connect(result.run_dir("server") / "mlflow" / "mlflow.db") as db:
        tags = db.execute("SELECT value FROM tags WHERE key = 'mlflow.source.git.commit'").fetchall()
        rounds = db.execute("SELECT value FROM params WHERE key = 'context/recipe/num_rounds'").fetchall()
    assert tags == [(commit,)] * 3
    assert rounds == [("2",)] * 3
    model = (result.run_dir("server") / "models" / "server.npy").read_bytes()
    (artifact,) = [line for line in result.jsonl("server", "federation") if line["kind"] == "artifact"]
    assert (artifact["key"], artifact["artifact_type"]) == ("model/server.npy", "model")
    stored = list((result.run_dir("server") / "mlflow").rglob("server.npy"))
    assert [path.read_bytes() for path in stored] == [model]
    for site in ("site-1", "site-2"):
        keys = {p.key for p in result.jsonl_points("server", site)}
        assert {"system/job_cpu_percentage", "system/system_memory_usage_percentage", "val/loss"} <= keys
    assert not [p for p in result.jsonl_points("server", "federation") if p.key.startswith("system/")]
    logs = [read_log(path) for path in (result.run_dir("server") / "wandb").rglob("run-*.wandb")]
    assert [log.config["context/git/commit"] for log in logs] == [commit] * 3
    assert [artifact.kind for log in logs for artifact in log.artifacts] == ["model"]
    assert not list(files_with(result.workspace, PLANTED.encode()))


@pytest.mark.long
def test_a_policy_that_allows_other_keys_withholds_the_context(tmp_path: Path) -> None:
    tracking: dict[str, Any] = {"server": ["jsonl"], "clients": ["jsonl"], "context": True, "system_metrics": 0.5}
    tracking["policy"] = {"allow": ["val/*"]}

    result = Job(tmp_path / "job", TRAINER, tracking, external=True).run()

    assert result.rc == 0, result.log[-6000:]
    for site in ("site-1", "site-2"):
        assert {p.key for p in result.jsonl_points("server", site)} == {"val/loss"}
        assert {line["kind"] for line in result.jsonl("server", site)} == {"metrics"}
        assert len(params_of(result, site, site)) == 1  # the site's own receiver has it
        of_job = [p.value for p in result.jsonl_points(site, site) if p.key == "system/job_processes"]
        assert max(of_job) > 1  # the trainer is a process of its own
    assert result.report("server")["balanced"]
    assert result.report("server")["sites"]["site-1"]["at_site"]["withheld"]


@pytest.mark.long
def test_on_the_client_side_only_the_server_gets_none_of_it(tmp_path: Path) -> None:
    result = Job(tmp_path / "job", TRAINER, {"clients": ["jsonl"], "context": True, "system_metrics": 0.5}).run()

    assert result.rc == 0, result.log[-6000:]
    for site in ("site-1", "site-2"):
        (params,) = params_of(result, site, site)
        assert params["context/recipe/num_rounds"] == 2
        assert params["context/host/cpus"] >= 1
    assert not list(files_with(result.workspace / "server", b"host/cpus", b"system/job"))
