# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job's command line: what is accepted, what it becomes, and what is refused before training."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import data
import flags
import job
import optimizer
import pytest
import synthetic
from evaluation import prediction_grid
from torch.utils.data import TensorDataset

from trackhub.config import TrackingConfig
from trackhub.errors import ConfigError, InvalidOptionError, UnknownBackendError


@pytest.fixture(autouse=True)
def no_nvflare_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLARE's import reads sys.argv; pytest's own arguments are none of its business."""
    monkeypatch.setattr("sys.argv", ["job.py"])


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, where a job that starts would leave its runs folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(*argv: str) -> TrackingConfig:
    """Return the tracking that these flags mean."""
    return job.tracking_config(job.parse_args([*argv]))


def test_the_defaults_are_those_that_the_readme_names() -> None:
    args = job.parse_args([])

    assert (args.n_clients, args.num_rounds, args.local_epochs) == (2, 5, 1)
    assert (args.dataset, args.partition, args.launch_external_process, args.strict) == ("auto", "same", False, False)
    assert (config().server, config().clients) == ({"tensorboard": {}}, None)


def test_context_is_on_and_system_metrics_and_the_model_are_off_unless_asked_for() -> None:
    given = config("--no-context", "--system_metrics", "10", "--log_model", "best")

    assert (config().context, config().system_metrics, config().log_model) == (True, None, None)
    assert (given.context, given.system_metrics, given.log_model) == (False, 10.0, "best")


def test_aggregate_may_be_given_several_times() -> None:
    assert config().aggregate is None
    assert config("--aggregate", "val/*", "--aggregate", "train/loss").aggregate == ("val/*", "train/loss")


def test_a_weight_may_be_named_and_updates_measured() -> None:
    given = config("--aggregate_weight", "train/accuracy", "--update_statistics")

    assert (config().aggregate_weight, config().update_statistics) == (None, False)
    assert (given.aggregate_weight, given.update_statistics) == ("train/accuracy", True)


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--client_backend", "jsonl"),
        ("--n_clients", "3"),
        ("--num_rounds", "3"),
        ("--local_epochs", "3"),
        ("--batch_size", "3"),
        ("--launch_external_process", None),
        ("--streamed_to_server", None),
        ("--no-streamed_to_server", None),
        ("--streamed_to_clients", None),
        ("--no-streamed_to_clients", None),
        ("--data_root", "d"),
        ("--samples_per_site", "3"),
        ("--prepare_data", None),
        ("--torch_threads", "3"),
    ],
)
def test_hyphens_and_underscores_mean_the_same(flag: str, value: str | None) -> None:
    rest = [] if value is None else [value]
    spellings = [flag, "--" + flag[2:].replace("_", "-"), "--" + flag[2:].replace("-", "_")]

    parsed = [job.parse_args([spelling, *rest]) for spelling in spellings]
    if value is not None:
        parsed.append(job.parse_args([f"{spellings[1]}={value}"]))

    assert all(args == parsed[0] for args in parsed)


def test_values_keep_their_hyphens_and_underscores() -> None:
    args = job.parse_args(["--option", "wandb.project=a-b_c", "--workspace=a-b_c", "--export", "x-y_z"])

    assert (args.option, args.workspace, args.export) == (["wandb.project=a-b_c"], Path("a-b_c"), Path("x-y_z"))


@pytest.mark.parametrize(
    ("argv", "server", "clients"),
    [
        ([], True, False),
        (["--streamed_to_clients"], True, True),
        (["--streamed_to_clients", "--no-streamed_to_server"], False, True),
        (["--no-streamed_to_server", "--streamed_to_clients"], False, True),
    ],
)
def test_each_side_is_chosen_by_its_flag(argv: list[str], server: bool, clients: bool) -> None:
    chosen = config("--backend", "jsonl", *argv)

    assert (chosen.server is not None, chosen.clients is not None) == (server, clients)


def test_clients_may_have_other_backends_than_the_server() -> None:
    chosen = config("--backend=jsonl", "--backend=tensorboard", "--client_backend=jsonl", "--streamed_to_clients")

    assert set(chosen.server or ()) == {"jsonl", "tensorboard"}
    assert set(chosen.clients or ()) == {"jsonl"}


def test_backend_none_turns_tracking_off() -> None:
    assert (config("--backend", "none").server, config("--backend", "none").clients) == (None, None)


def test_options_reach_their_backend_on_both_sides(tmp_path: Path) -> None:
    chosen = config("--option", f"tensorboard.logdir={tmp_path}", "--streamed_to_clients")

    assert chosen.server == chosen.clients == {"tensorboard": {"logdir": str(tmp_path)}}


@pytest.mark.parametrize(
    ("argv", "error", "message"),
    [
        (
            ["--no-streamed_to_server"],
            ConfigError,
            "no side to run on: give --streamed_to_server or --streamed_to_clients",
        ),
        (["--client_backend", "jsonl"], ConfigError, "contradicts sides: ['server']. Nothing runs"),
        (
            ["--streamed_to_clients", "--no-streamed_to_server", "--log_model", "best"],
            ConfigError,
            "contradicts sides: ['client']. Only a server",
        ),
        (["--backend", "none", "--backend", "jsonl"], ConfigError, "cannot stand beside other backends"),
        (["--backend", "tensorbord"], UnknownBackendError, "tensorboard"),
        (["--option", "tensorboard.logdirr=x"], InvalidOptionError, "tensorboard.logdirr"),
        (["--option", "jsonl.x=1"], ConfigError, "no backend 'jsonl' in this job"),
        (["--option", "tensorboard"], ConfigError, "expected NAME.KEY=VALUE"),
    ],
)
def test_a_wrong_tracking_flag_is_refused_with_what_to_do(
    argv: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=re.escape(message)):
        config(*argv)


@pytest.mark.parametrize(
    "argv",
    [
        ["--backend", "tensorbord"],
        ["--no-streamed_to_server"],
        ["--option", "tensorboard.logdirr=x"],
        ["--dataset", "synthetic", "--workspace", "with space"],
        ["--dataset", "cifar10", "--data_root", "not-an-image-folder"],
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_nothing_is_started(
    argv: list[str], here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "cache"))
    (here / "not-an-image-folder" / "train").mkdir(parents=True)
    (here / "not-an-image-folder" / "test").mkdir()

    status = job.main(argv)

    assert status == job.EXIT_BAD_FLAGS
    assert capsys.readouterr().err.startswith("job.py: error: ")
    assert {path.name for path in here.iterdir()} <= {"cache", "not-an-image-folder"}


@pytest.mark.parametrize(
    "argv",
    [
        ["--n_clients", "0"],
        ["--batch_size", "1.5"],
        ["--lr", "nan"],
        ["--lr", "-1"],
        ["--alpha", "0"],
        ["--seed", "-1"],
        ["--partition", "random"],
        ["--dataset", "mnist"],
        ["--samples_per_site", "0"],
        ["--num_round", "3"],
    ],
)
def test_a_value_that_makes_no_sense_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.parse_args(argv)

    assert stopped.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_the_client_gets_what_the_job_was_told() -> None:
    argv = ["--partition", "dirichlet", "--alpha", "0.3", "--samples_per_site", "7", "--lr", "0.01", "--seed", "9"]
    told = job.parse_args([*argv, "--data_root", "d", "--torch_threads", "2", "--n_clients", "4"])

    received = flags.client_args(flags.training_args(told))

    for name in ("partition", "alpha", "samples_per_site", "lr", "seed", "data_root", "torch_threads", "n_clients"):
        assert getattr(received, name) == getattr(told, name)


def test_prepare_data_says_where_the_images_are_and_stops(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "test"):
        (here / "images" / split).mkdir(parents=True)

    assert job.main(["--prepare_data", "--data_root", "images"]) == 0
    assert capsys.readouterr().out == f"CIFAR-10 is in {here / 'images'}\n"


def exported(target: Path, *argv: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Export the job, and return the server's and the clients' configuration."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # FLARE's own
        assert job.main(["--export", str(target), *argv]) == 0
    server, clients = (
        json.loads(next((target / job.NAME).rglob(f"config_fed_{side}.json")).read_text())
        for side in ("server", "client")
    )
    return server, clients


def component_paths(configuration: dict[str, Any]) -> set[str]:
    """Return the classes of a configuration's components."""
    return {component["path"] for component in configuration["components"]}


def test_an_exported_job_is_whole_and_names_nothing_of_this_machine(here: Path) -> None:
    server, clients = exported(here / "out", "--partition", "iid")

    assert "trackhub.flare.receiver_widget.TrackhubReceiver" in component_paths(server)
    assert "trackhub.flare.sender_widget.TrackhubSender" in component_paths(clients)
    executor = clients["executors"][0]["executor"]["args"]
    assert executor["task_script_path"] == "client.py"
    assert "--partition iid" in executor["task_script_args"]
    assert "--summary_dir" not in executor["task_script_args"]
    shipped = {path.name for path in (here / "out" / job.NAME).rglob("custom/*.py")}
    assert {"client.py", "data.py", "evaluation.py", "flags.py", "model.py", "partition.py", "synthetic.py"} <= shipped
    assert not {"writer.py", "spool.py"} & shipped
    texts = [path.read_text() for path in (here / "out").rglob("*.json")]
    assert not any(str(Path(job.__file__).parent) in text or str(here) in text for text in texts)


def test_a_client_only_job_sends_no_metrics_and_has_no_receiver_on_the_server(here: Path) -> None:
    server, clients = exported(here / "out", "--streamed_to_clients", "--no-streamed_to_server")

    assert "trackhub.flare.receiver_widget.TrackhubReceiver" not in component_paths(server)
    assert "trackhub.flare.receiver_widget.TrackhubReceiver" in component_paths(clients)
    assert "--no_send_metrics" in clients["executors"][0]["executor"]["args"]["task_script_args"]


def test_a_job_without_tracking_has_no_part_of_trackhub(here: Path) -> None:
    server, clients = exported(here / "out", "--backend", "none")

    assert not any(path.startswith("trackhub") for path in component_paths(server) | component_paths(clients))


def test_external_trainers_get_time_to_finish_and_the_sites_own_python(here: Path) -> None:
    _, clients = exported(here / "out", "--launch_external_process")

    executor = clients["executors"][0]["executor"]["args"]
    assert executor["shutdown_timeout"] >= 30
    assert executor["command"][:3] == ["python3", "-u", "custom/client.py"]


def test_a_data_root_with_a_space_cannot_be_exported(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--export", "out", "--data_root", "my images"]) == job.EXIT_BAD_FLAGS
    assert "'my images' has a space in it" in capsys.readouterr().err


def test_the_learning_rate_rises_then_falls_to_zero() -> None:
    factors = [optimizer.schedule(step, 100) for step in range(100)]

    assert max(factors) == pytest.approx(1, abs=0.01)
    assert factors.index(max(factors)) == 9
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert factors[-1] == pytest.approx(0, abs=1e-9)


def test_the_prediction_grid_frames_right_green_and_wrong_red() -> None:
    images = TensorDataset(*synthetic.synthetic(0)[1][:160])
    pixels, labels = images.tensors
    predictions = labels.clone()
    predictions[0] = (predictions[0] + 1) % 10

    grid, caption = prediction_grid(images, predictions)

    assert grid.shape == (3, 144, 144)
    assert grid[:, 0, 0].tolist() == [200, 0, 0]
    assert grid[:, 0, 36].tolist() == [0, 160, 0]
    assert (grid[:, 2:34, 2:34] == pixels[0]).all()
    assert caption.startswith(f"predicted, by row: {data.CLASSES[int(predictions[0])]}, ")


@pytest.mark.parametrize(
    "argv",
    [
        ["--env", "prod"],
        ["--startup_kit", "kit"],
        ["--env", "poc", "--startup_kit", "kit"],
        ["--env", "poc", "--strict"],
        ["--env", "poc", "--workspace", "here"],
        ["--env", "prod", "--startup_kit", "kit", "--export", "here"],
        ["--env", "simulator"],
    ],
)
def test_flags_that_do_not_fit_the_environment_are_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        job.parse_args(argv)

    assert stopped.value.code == job.EXIT_BAD_FLAGS
    assert "--env" in capsys.readouterr().err


def test_a_folder_that_is_no_startup_kit_is_refused(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--env", "prod", "--startup_kit", "."]) == job.EXIT_BAD_FLAGS
    assert "startup/fed_admin.json" in capsys.readouterr().err
