# SPDX-License-Identifier: Apache-2.0
"""``trackhub attach`` inserts its components into a job's files, and changes nothing else."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pyhocon  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]
from click.testing import CliRunner, Result
from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE

from trackhub.cli.attach import attach
from trackhub.errors import ConfigError
from trackhub.flare.recipe import tracking_components
from trackhub.runnable_commands import runnable

EXECUTOR = {
    "tasks": ["*"],
    "executor": {
        "path": "nvflare.app_common.executors.client_api_executor.ClientAPIExecutor",
        "args": {
            "execution_mode": "external_process",
            "command": ["python3", "custom/client.py"],
            "shutdown_timeout": 0.0,
        },
    },
}
SERVER: dict[str, Any] = {"format_version": 2, "workflows": [], "components": [{"id": "persistor", "path": "a.B"}]}
CLIENT: dict[str, Any] = {"format_version": 2, "executors": [EXECUTOR], "components": []}
HOCON = """# what a person wrote
format_version = 2
rounds = 3
train { lr = 0.1, "a.b" = "${not a reference}" }
executors = [
  { tasks = ["train"], executor { path = "my.Executor", args { lr = ${train.lr} } } }  # one
]
components = [
  { id = "mine", path = "my.Component", args { n = ${rounds} } }
]
"""


def make_job(folder: Path, files: dict[str, str], deploy_map: dict[str, Any] | None = None) -> Path:
    folder.mkdir()
    meta = {"name": "j", "deploy_map": {"app": ["@ALL"]} if deploy_map is None else deploy_map}
    (folder / "meta.json").write_text(json.dumps(meta))
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    return folder


def json_job(folder: Path) -> Path:
    files = {"server": SERVER, "client": CLIENT}
    texts = {f"app/config/config_fed_{side}.json": json.dumps(config, indent=4) for side, config in files.items()}
    return make_job(folder, texts)


def run(*args: str | Path) -> Result:
    return CliRunner().invoke(attach, [str(arg) for arg in args])


def contents(job: Path) -> dict[str, str]:
    return {str(path.relative_to(job)): path.read_text() for path in job.rglob("*") if path.is_file()}


def hocon(text: str) -> Any:
    return pyhocon.ConfigFactory.parse_string(text).as_plain_ordered_dict()


def ids(config: Any) -> list[str]:
    return [component["id"] for component in config["components"]]


def test_a_json_job_gets_the_components_and_keeps_the_rest(tmp_path: Path) -> None:
    job = json_job(tmp_path / "job")
    before = contents(job)
    done = run(job, "--server", "jsonl", "-c", "tensorboard", "-o", "jsonl.path=out", "--name", "n", "--tag", "a",
               "--limit", "deadline_s=60")  # fmt: skip

    assert done.exit_code == 0, done.output
    folder = job / "app" / "config"
    server, client = (json.loads((folder / f"config_fed_{side}.json").read_text()) for side in ("server", "client"))
    common = {"limits": {"deadline_s": 60}, "job": {"name": "n", "tags": ["a"]}}
    assert {**server, "components": server["components"][:-1]} == SERVER
    assert server["components"][-1] == {
        "id": "trackhub_receiver",
        "path": "trackhub.flare.receiver_widget.TrackhubReceiver",
        "args": {"backends": {"jsonl": {"path": "out"}}, **common, "own_records": {"context": {}}},
    }
    assert ids(client) == ["trackhub_receiver", "trackhub_sender"]
    arguments = client["executors"][0]["executor"]["args"]
    assert arguments["shutdown_timeout"] == 30
    arguments["shutdown_timeout"] = 0.0
    assert {**client, "components": []} == CLIENT
    after = contents(job)
    for side in ("server", "client"):
        name = f"app/config/config_fed_{side}.json"
        assert after[f"{name}.orig"] == before[name]
    assert set(after) == {*before, *(f"{name}.orig" for name in before if "config_fed" in name)}
    assert '+                "jsonl": {' in done.output or '+                    "jsonl": {' in done.output
    assert "shutdown_timeout was 0" in done.output


def test_each_of_many_apps_gets_what_its_side_needs(tmp_path: Path) -> None:
    texts = {f"app_{side}/config/config_fed_client.json": json.dumps(CLIENT) for side in ("site-1", "site-2")}
    files = {**texts, "app_server/config/config_fed_server.json": json.dumps(SERVER)}
    job = make_job(
        tmp_path / "job", files,
        {"app_server": ["server"], "app_site-1": ["site-1"], "app_site-2": [{"sites": "site-2"}]},
    )  # fmt: skip
    done = run(job, "--server", "jsonl")

    assert done.exit_code == 0, done.output
    found = {path.parent.parent.name: ids(json.loads(path.read_text())) for path in job.rglob("config_fed_*.json")}
    assert found == {
        "app_server": ["persistor", "trackhub_receiver"],
        "app_site-1": ["trackhub_sender"],
        "app_site-2": ["trackhub_sender"],
    }


@pytest.mark.parametrize("text", [HOCON, "{\n" + HOCON + "}\n", HOCON.partition("components")[0]])
def test_a_hocon_job_keeps_its_comments_and_references(tmp_path: Path, text: str) -> None:
    job = make_job(tmp_path / "job", {f"app/config/config_fed_{side}.conf": text for side in ("server", "client")})
    done = run(job, "--server", "jsonl", "-o", "jsonl.path=a.b")

    assert done.exit_code == 0, done.output
    new = (job / "app" / "config" / "config_fed_client.conf").read_text()
    assert new.startswith(text.strip().removesuffix("}").rstrip() if text.startswith("{") else text.rstrip())
    before, after = hocon(text), hocon(new)
    mine = before.pop("components", [])
    assert after.pop("components")[:-1] == mine
    assert after == before
    server = hocon((job / "app" / "config" / "config_fed_server.conf").read_text())
    assert server["components"][-1]["args"]["backends"] == {"jsonl": {"path": "a.b"}}


def test_a_file_that_cannot_be_changed_is_left_and_the_block_is_printed(tmp_path: Path) -> None:
    """In YAML, and where the list of a HOCON file is a reference that pyhocon cannot add to."""
    referring = "base = [{id = x, path = p}]\ncomponents = ${base} [{id = y, path = p}]\n"
    files = {"app/config/config_fed_server.yml": "components: []\n", "app/config/config_fed_client.conf": referring}
    job = make_job(tmp_path / "job", files)
    before = contents(job)
    done = run(job, "--server", "jsonl")

    assert done.exit_code == 1
    assert "config_fed_server.yml: trackhub does not change YAML" in done.output
    block = done.output.partition("list of components:\n")[2].partition("\n\n")[0]
    assert ids(yaml.safe_load(block)) == ["trackhub_receiver"]
    if contents(job) == before:
        assert "config_fed_client.conf" in done.output
    else:
        assert ids(hocon((job / "app/config/config_fed_client.conf").read_text())) == ["x", "y", "trackhub_sender"]


def test_a_dry_run_shows_the_change_and_changes_nothing(tmp_path: Path) -> None:
    job = json_job(tmp_path / "job")
    before = contents(job)
    done = run(job, "--client", "jsonl", "--dry-run")

    assert done.exit_code == 0
    assert "+" in done.output
    assert "would change 1 file(s)" in done.output
    assert contents(job) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "name a backend"),
        (["--server", "jsonl", "-o", "wandb.project=x"], "gets no backend 'wandb'"),
        (["--server", "jsonl", "-o", "jsonl.nothing=x"], "unknown option"),
        (["--server", "jsonl", "--limit", "deadline_s=soon"], "expected NAME=VALUE"),
        (["--client", "jsonl", "--take-over", "false"], "client side only"),
    ],
)
def test_a_wrong_argument_changes_nothing(tmp_path: Path, args: list[str], message: str) -> None:
    job = json_job(tmp_path / "job")
    before = contents(job)
    done = run(job, *args)

    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert contents(job) == before


def test_a_second_time_is_refused_and_so_is_another_original(tmp_path: Path) -> None:
    job = json_job(tmp_path / "job")
    assert run(job, "--server", "jsonl").exit_code == 0
    again = run(job, "--server", "jsonl")
    assert "has tracking already" in str(again.exception)

    config = yaml.safe_dump({"components": tracking_components({"jsonl": {}})["config_fed_server.json"]})
    in_yaml = make_job(tmp_path / "yaml", {"app/config/config_fed_server.yml": config}, {"app": ["server"]})
    assert "has tracking already" in str(run(in_yaml, "--server", "jsonl").exception)

    other = json_job(tmp_path / "other")
    (other / "app" / "config" / "config_fed_client.json.orig").write_text("{}")
    before = contents(other)
    assert "are there already" in str(run(other, "--server", "jsonl").exception)
    assert contents(other) == before


def test_all_files_that_are_in_the_way_are_named_at_once(tmp_path: Path) -> None:
    job, other = json_job(tmp_path / "job"), json_job(tmp_path / "other")
    files = [f"app/config/config_fed_{side}.json" for side in ("server", "client")]
    for file in files:
        (other / f"{file}.orig").write_text("{}")
    run(job, "--server", "jsonl")

    tracked, in_the_way = (str(run(folder, "--server", "jsonl").exception) for folder in (job, other))

    assert all(f"mv {job / file}.orig {job / file}" in tracked for file in files)
    assert all(f"{other / file}.orig" in in_the_way for file in files)


def test_the_last_lines_are_the_commands_that_run_the_job(tmp_path: Path) -> None:
    job = json_job(tmp_path / "my job")
    (job / "meta.json").write_text(json.dumps({"min_clients": 3, "deploy_map": {"app": ["@ALL"]}}))

    dry, done = run(job, "--server", "jsonl", "--dry-run").stdout, run(job, "--server", "jsonl").stdout

    assert "nvflare" not in dry
    nvflare = runnable("nvflare")
    assert f"  {nvflare} simulator '{job}' -w 'runs/my job' -n 3 -t 3\n" in done
    assert f"  {runnable('trackhub')} status 'runs/my job'\n" in done
    assert done.endswith(f"  {nvflare} job submit -j '{job}'\n")


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda job: (job / "meta.json").unlink(), "export the job first"),
        (lambda job: (job / "meta.json").write_text("[]"), "expected a deploy_map"),
        (lambda job: (job / "meta.json").write_text("{"), "meta.json cannot be read"),
        (lambda job: (job / "app/config/config_fed_client.json").unlink(), "expected config_fed_client.json"),
        (lambda job: (job / "app/config/config_fed_client.json").write_text("{"), "config_fed_client.json cannot be"),
        (lambda job: (job / "app/config/config_fed_client.json").write_text("[]"), "expected a mapping"),
    ],
)
def test_a_folder_that_is_no_job_is_refused(tmp_path: Path, break_it: Any, message: str) -> None:
    job = json_job(tmp_path / "job")
    break_it(job)
    before = contents(job)
    done = run(job, "--server", "jsonl")

    assert isinstance(done.exception, ConfigError)
    assert message in str(done.exception)
    assert contents(job) == before


def test_the_folder_above_a_job_names_the_job(tmp_path: Path) -> None:
    json_job(tmp_path / "job")
    assert "give one of these: job" in str(run(tmp_path, "--server", "jsonl").exception)


def test_a_job_whose_meta_file_is_hocon_is_attached(tmp_path: Path) -> None:
    job = json_job(tmp_path / "job")
    (job / "meta.json").unlink()
    (job / "meta.conf").write_text('name = "j"\nmin_clients = 3\ndeploy_map { app = ["@ALL"] }\n')

    done = run(job, "--server", "jsonl")

    assert done.exit_code == 0
    assert "-n 3 -t 3" in done.output
    assert "trackhub_receiver" in ids(json.loads((job / "app/config/config_fed_server.json").read_text()))


COLLECTOR = """
from nvflare.apis.analytix import ANALYTIC_EVENT_TYPE
from nvflare.widgets.widget import Widget


class Collector(Widget):
    pass
"""
NOT_OPTIONS = ["policy", "federation", "aggregate_weight", "update_statistics"]
STOCK = {"id": "tb", "path": "nvflare.app_opt.tracking.tb.tb_receiver.TBAnalyticsReceiver"}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--client", "jsonl"], "Nothing is sent to the server"),
        (["--server", "jsonl"], "With take_over='copy', they get everything"),
        (["--server", "jsonl", "--take-over", "copy"], ""),
    ],
)
def test_what_becomes_of_the_jobs_own_receivers_is_said(tmp_path: Path, args: list[str], said: str) -> None:
    """Also of those in a file that does not change, and of a component of the user's own."""
    job = json_job(tmp_path / "job")
    config = job / "app/config/config_fed_server.json"
    own = {"id": "mine", "path": "my.collector.Collector"}
    config.write_text(json.dumps({**SERVER, "components": [STOCK, own, {"id": "other", "path": "my.other.Thing"}]}))
    (job / "app/custom/my").mkdir(parents=True)
    (job / "app/custom/my/collector.py").write_text(COLLECTOR)

    done = run(job, *args)

    assert done.exit_code == 0
    notes = [line for line in done.output.splitlines() if "on the server will get nothing" in line]
    assert [line.split(" on the server")[0] for line in notes] == (
        ["note: tb (TBAnalyticsReceiver), mine (Collector)"] if said else []
    )
    assert said in " ".join(notes)


@pytest.mark.parametrize("key", ["path", "name"])
def test_flares_own_senders_of_events_are_no_listeners(tmp_path: Path, key: str) -> None:
    """Stock jobs have them, and their arguments name the event."""
    job = json_job(tmp_path / "job")
    package = "nvflare.app_common.widgets.convert_to_fed_event." if key == "path" else ""
    sender = {"id": "to_fed", key: f"{package}ConvertToFedEvent", "args": {"events_to_convert": [ANALYTIC_EVENT_TYPE]}}
    (job / "app/config/config_fed_client.json").write_text(json.dumps({**CLIENT, "components": [sender]}))

    assert "to_fed (" not in run(job, "--server", "jsonl").output


def test_every_argument_of_the_tracking_components_is_an_option(tmp_path: Path) -> None:
    """`docs/migrating.md` names those that are not."""
    options = {option.name for option in attach.params}
    names = {"clients": "client", "tags": "tag", "limits": "limit", "context": "no_context"}
    arguments = [names.get(name, name) for name in inspect.signature(tracking_components).parameters]

    assert [name for name in arguments if name not in options] == NOT_OPTIONS
    page = Path("docs/migrating.md").read_text()
    assert all(f"`{name}`" in page for name in NOT_OPTIONS)


def test_captures_and_statistics_are_handed_on(tmp_path: Path) -> None:
    job = json_job(tmp_path / "job")

    more = ["--capture", "wandb", "--capture-only", "--aggregate", "val/*", "--system-metrics", "1"]
    run(job, "--server", "jsonl", *more, "--take-over", "false")

    server, client = (
        json.loads((job / f"app/config/config_fed_{side}.json").read_text())["components"][-1]["args"]
        for side in ("server", "client")
    )
    assert (client["capture"], client["capture_only"], client["take_over"]) == (["wandb"], True, False)
    assert client["own_records"]["system_metrics"] == 1.0
    assert "val/*" in json.dumps(server["federation"])
    assert "cannot capture 'wndb'" in str(run(job, "--server", "jsonl", "--capture", "wndb").exception)
