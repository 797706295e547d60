# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import html
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from trackhub_wandb.offline_readback import LoggedRun, find_runs

from backends.wandb.tests.conftest import JOB, T0, Rig, entry, losses, png, services
from trackhub.open_without_links import find_way_out
from trackhub.spi import (
    Artifact,
    Histogram,
    Image,
    JobInfo,
    Metrics,
    Params,
    Redelivery,
    Rejection,
    RunStatus,
    Summary,
    Table,
    Tags,
    Text,
    TransientError,
)


def only_run(rig: Rig) -> LoggedRun:
    """Return the one offline run of this receiver."""
    (run,) = find_runs(rig.wandb_dir)
    return run


def test_run_is_named_by_job_and_site_and_grouped_by_job(rig: Rig) -> None:
    """A person finds it by the job's name. Its group is the job's unique name, and its id never changes."""
    run = rig.backend(mode="offline", project="demo", notes="a note", job_type="train", tags=["pilot"]).open_run(
        rig.info()
    )
    run.finish(RunStatus.FINISHED)
    logged = only_run(rig)
    assert logged.settings == {
        "run_id": rig.info().run_id,
        "entity": "",
        "project": "demo",
        "run_group": "fedavg lr=0.1-6f2c8a10",
        "job_type": "train",
        "display_name": "fedavg lr=0.1/site-1",
        "notes": "a note",
        "host": "",
    }
    assert logged.tags == ["pilot"]


@pytest.mark.parametrize("ended", [False, True])
def test_nothing_in_a_runs_folder_leads_out_of_it(rig: Rig, ended: bool) -> None:
    """The SDK links to a log in the user's home. A replay of a killed job refuses such links."""
    backend = rig.backend(mode="offline")
    run = backend.open_run(rig.info())
    run.write([entry(0, Metrics({"loss": 1.0}))])
    run.flush()
    if ended:
        run.finish(RunStatus.FINISHED)

    assert find_way_out(rig.wandb_dir, rig.wandb_dir) == ""
    assert list(rig.wandb_dir.rglob("logs")) != []
    backend.close()


@pytest.mark.parametrize("shared", [0o700, 0o755])
def test_a_runs_folder_is_for_those_who_may_use_the_folder_around_it(rig: Rig, shared: int) -> None:
    """The SDK's service makes the files in it readable for all. The folder keeps others out."""
    rig.wandb_dir.chmod(shared)

    run = rig.backend(mode="offline").open_run(rig.info())
    run.finish(RunStatus.FINISHED)

    (folder,) = rig.wandb_dir.glob("offline-run-*")
    assert folder.stat().st_mode & 0o777 == shared


def test_environment_fills_what_the_options_leave_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """``WANDB_*`` of the receiver is honoured; an option wins."""
    for name, value in {"PROJECT": "env", "RUN_GROUP": "group", "TAGS": "a,b", "NOTES": "n", "ENTITY": "team"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    rig.backend(mode="offline", notes="mine").open_run(rig.info()).finish(RunStatus.FINISHED)
    logged = only_run(rig)
    found = {name: logged.settings[name] for name in ("project", "run_group", "notes", "entity")}
    assert found == {"project": "env", "run_group": "group", "notes": "mine", "entity": "team"}
    assert logged.tags == ["a", "b"]


def test_two_jobs_of_one_name_are_two_groups(tmp_path: Path) -> None:
    """Their runs have one name, and other ids."""
    found = []
    for job_id in ("3f2a", "9c1b"):
        rig = Rig(tmp_path / job_id, JobInfo(job_id, "fedavg"))
        backend = rig.backend(mode="offline")
        backend.open_run(rig.info()).finish(RunStatus.FINISHED)
        backend.close()
        found.append(only_run(rig).settings)
    assert [(one["display_name"], one["run_group"]) for one in found] == [
        ("fedavg/site-1", "fedavg-3f2a"),
        ("fedavg/site-1", "fedavg-9c1b"),
    ]
    assert found[0]["run_id"] != found[1]["run_id"]


def test_notes_and_tags_of_the_job_are_those_of_its_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The notes win over the receiver's environment. A tag that W&B would refuse is shortened."""
    monkeypatch.setenv("WANDB_NOTES", "n")
    monkeypatch.setenv("WANDB_TAGS", "a")
    rig = Rig(tmp_path / "job", JobInfo("3f2a", "fedavg", "# What for", ("pilot", "t" * 100, "pilot")))
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write([entry(0, Tags({"stage": "one"}))])
    run.finish(RunStatus.FINISHED)
    logged = only_run(rig)
    assert logged.settings["notes"] == "# What for"
    assert [tag[:8] for tag in logged.tags] == ["pilot", "t" * 8, "a", "stage:on"]
    assert max(map(len, logged.tags)) == 64


def test_notes_of_the_options_replace_those_of_the_job_and_tags_join(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The options win over the environment in both."""
    monkeypatch.setenv("WANDB_NOTES", "n")
    monkeypatch.setenv("WANDB_TAGS", "a")
    for name, options, expected in (
        ("given", {"notes": "mine", "tags": ["own", "pilot"]}, ("mine", ["pilot", "own"])),
        ("settings", {"settings": {"run_notes": "other", "run_tags": ["more"]}}, ("other", ["pilot", "more"])),
    ):
        rig = Rig(tmp_path / name, JobInfo("3f2a", "fedavg", "job's", ("pilot",)))
        rig.backend(mode="offline", **options).open_run(rig.info()).finish(RunStatus.FINISHED)
        logged = only_run(rig)
        assert (logged.settings["notes"], logged.tags) == expected


def test_late_and_equal_steps_are_rows_of_their_own(rig: Rig) -> None:
    """Every record is a row, at its position; step, round and time are those of the log call."""
    run = rig.backend(mode="offline").open_run(rig.info())
    steps = [10, 5, 5, 20, 0, 2**62]
    run.write([entry(n, Metrics({"loss": n / 4}), step=step, round=n // 2) for n, step in enumerate(steps)])
    run.finish(RunStatus.FINISHED)
    rows = only_run(rig).rows
    found = [(r["_step"], r["step"], r["round"], r["_timestamp"], r["loss"]) for r in rows]
    assert found == [(n, step, n // 2, T0 + n, n / 4) for n, step in enumerate(steps)]


def test_step_and_round_can_be_the_x_axis(rig: Rig) -> None:
    """The step is the default x axis of all metrics, and the round is a metric to choose; both can be renamed."""
    backend = rig.backend(mode="offline", step_metric="trainer/global_step", round_metric="fl_round")
    run = backend.open_run(rig.info())
    run.write([entry(0, Metrics({"loss": 1.0, "step": 2.0}), step=7, round=1)])
    run.finish(RunStatus.FINISHED)
    logged = only_run(rig)
    assert logged.metrics == {"trainer/global_step": "", "fl_round": "", "*": "trainer/global_step"}
    row = logged.rows[0]
    assert (row["trainer/global_step"], row["fl_round"], row["step"]) == (7, 1, 2.0)


def test_record_without_a_round_has_none(rig: Rig) -> None:
    """W&B does not repeat the last step or round."""
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write([entry(0, Metrics({"a": 1.0}), round=3), entry(1, Metrics({"a": 2.0}))])
    run.finish(RunStatus.FINISHED)
    assert ["round" in row for row in only_run(rig).rows] == [True, False]


def test_numbers_of_any_size_are_kept(rig: Rig) -> None:
    """NaN, infinities and float64's limits come back as they were."""
    values = [math.nan, math.inf, -math.inf, 1e308, 5e-324, float(2**53), 0.1]
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write([entry(n, Metrics({"x": value})) for n, value in enumerate(values)])
    run.finish(RunStatus.FINISHED)
    found = [row["x"] for row in only_run(rig).rows]
    assert math.isnan(found[0])
    assert found[1:] == values[1:]


def test_kinds_become_wandb_types(rig: Rig) -> None:
    """Params are config, tags are tags, and the rest are W&B's media in the run's folder."""
    run = rig.backend(mode="offline").open_run(rig.info())
    payloads: list[Any] = [
        Params({"lr": 0.1, "net": {"layers": [1, 2]}}),
        Params({"lr": 0.2}),
        Tags({"stage": "pilot", "long": "v" * 100}),
        Text("note", "a < b & c\n\u00fc"),
        Image("im/../g", rig.blob(png(), "image/png"), 8, 6, "a caption"),
        Histogram("weights", [0.0, 0.5, 1.0], [3.0, 4.0]),
        Table("preds", ["name", "p"], [["cat", 0.5], [None, 1]]),
        Artifact("best model", rig.blob(b"weights", "application/octet-stream"), "model.pt", "model"),
    ]
    assert run.write([entry(n, payload, step=9) for n, payload in enumerate(payloads)]) is None
    run.finish(RunStatus.FINISHED)
    logged = only_run(rig)
    assert (logged.config["lr"], logged.config["net"]) == (0.2, {"layers": [1, 2]})
    assert logged.config["trackhub"] == {
        "job_id": JOB.id,
        "job_name": "fedavg lr=0.1",
        "site": "site-1",
        "side": "server",
        "tags": {"stage": "pilot", "long": "v" * 100},
        "through": 7,
    }
    assert logged.tags[0] == "stage:pilot"
    assert len(logged.tags[1]) == 64
    text, image, histogram, table = logged.rows
    files = logged.folder / "files"
    assert html.escape("a < b & c\n\u00fc") in (files / text["note"]["path"]).read_text()
    media = image["im/../g"]
    assert (files / media["path"]).read_bytes() == png()
    assert (media["_type"], media["format"], media["width"], media["height"], media["caption"]) == (
        "image-file",
        "png",
        8,
        6,
        "a caption",
    )
    assert histogram["weights"] == {"_type": "histogram", "bins": [0, 0.5, 1], "values": [3, 4]}
    assert json.loads((files / table["preds"]["path"]).read_text())["data"] == [["cat", 0.5], [None, 1]]
    assert {row["step"] for row in logged.rows} == {9}
    artifact = next(one for one in logged.artifacts if one.kind == "model")
    assert artifact.name.startswith("best_model--site-1")
    assert artifact.metadata["key"] == "best model"
    assert {name: (rig.folder / path).read_bytes() for name, path in artifact.files.items()} == {"model.pt": b"weights"}


def test_what_wandb_cannot_hold_is_rejected_by_name(rig: Rig) -> None:
    """The neighbours of such a record are stored."""
    run = rig.backend(mode="offline").open_run(rig.info())
    bins = 513
    report = run.write(
        [
            entry(0, Metrics({"a": 1.0})),
            entry(1, Histogram("h", [float(n) for n in range(bins + 1)], [1.0] * bins)),
            entry(2, Image("i", rig.blob(b"no image", "image/png"), 1, 1)),
            entry(3, Image("i", rig.blob(b"GIF89a", "image/gif"), 1, 1)),
            entry(4, Table("t", ["a"] * 1_000_000, [])),
            entry(5, Metrics({"a": 2.0})),
        ]
    )
    assert report is not None
    assert [(one.position, one.reason) for one in report.rejected] == [
        (1, "too_many_bins"),
        (2, "invalid_value"),
        (3, "invalid_value"),
        (4, "too_large"),
    ]
    assert all(isinstance(one, Rejection) and one.detail for one in report.rejected)
    run.finish(RunStatus.FINISHED)
    assert [row["_step"] for row in only_run(rig).rows] == [0, 5]


def test_a_table_is_stored_as_by_the_sdk_without_its_look_at_each_cell(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For 100,000 cells, the SDK needs seconds to work out types that it does not store."""
    import wandb
    from wandb.sdk.artifacts._internal_artifact import InternalArtifact

    columns = ["name", "p", "n", "ok"]
    rows: list[list[Any]] = [["cat", 0.5, 1, True], [None, float("inf"), 2**60, "é"], [1, "x", -1.5, None]]
    table = wandb.Table(columns=[*columns], data=rows, allow_mixed_types=True)
    by_sdk = table.to_json(InternalArtifact("run-x-t", "run_table"))
    looks: list[Any] = []
    monkeypatch.setattr(wandb.Table, "add_data", lambda *row: looks.append(row))
    run = rig.backend(mode="offline").open_run(rig.info())

    run.write([entry(0, Table("t", columns, rows))])
    run.finish(RunStatus.FINISHED)

    (stored,) = rig.folder.rglob("artifacts/0/*.table.json")
    assert stored.read_text() == json.dumps(by_sdk, sort_keys=True)
    assert looks == []


def test_many_final_values_and_tags_of_a_batch_are_handed_over_once(rig: Rig) -> None:
    """With each call, the SDK stores all of them again: 2,000 of 500 characters took two gigabytes."""
    run = rig.backend(mode="offline").open_run(rig.info())
    batch = [entry(i, Summary({f"k{i}": "v" * 500})) for i in range(1000)]
    batch += [entry(1000 + i, Tags({f"t{i % 10}": str(i)})) for i in range(500)]
    batch += [entry(1500, Metrics({"a": 1.0})), entry(1501, Params({"lr": 0.1})), entry(1502, Params({"lr": 0.2}))]

    assert run.write(batch) is None
    run.finish(RunStatus.FINISHED)

    logged = only_run(rig)
    assert logged.config["lr"] == 0.2
    assert len(logged.config["trackhub"]["summary"]) == 1000
    assert logged.config["trackhub"]["tags"] == {f"t{i}": str(490 + i) for i in range(10)}
    assert sum(path.stat().st_size for path in rig.folder.rglob("*.wandb")) < 10_000_000


@pytest.mark.parametrize("payload", [Tags, Summary])
def test_tags_and_final_values_of_a_run_are_limited_together(rig: Rig, payload: type[Tags | Summary]) -> None:
    """With each new one, the SDK keeps all of them again: 30 of a megabyte took a gigabyte and held up all runs."""
    run = rig.backend(mode="offline").open_run(rig.info())
    large: list[Any] = [entry(i, payload({f"k{i}": "v" * 300_000})) for i in range(5)]

    report = run.write([*large, entry(5, Tags({"stage": "pilot"})), entry(6, Metrics({"a": 1.0}))])

    assert report is not None
    assert [(one.position, one.reason) for one in report.rejected] == [(3, "too_large"), (4, "too_large")]
    run.finish(RunStatus.FINISHED)
    kept = only_run(rig).config["trackhub"]
    assert kept["tags"]["stage"] == "pilot"
    assert len(kept["tags" if payload is Tags else "summary"]) == 3 + (payload is Tags)


def test_new_value_of_a_nested_param_replaces_the_old_one(rig: Rig) -> None:
    """The last value holds, though W&B by itself merges dicts leaf by leaf."""
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(
        [entry(0, Params({"net": {"layers": 2, "width": 8}, "lr": 0.1})), entry(1, Params({"net": {"layers": 3}}))]
    )
    run.flush()
    run.finish(RunStatus.FINISHED)
    logged = only_run(rig)
    assert (logged.config["net"], logged.config["lr"]) == ({"layers": 3}, 0.1)


def test_param_that_refers_to_an_artifact_is_text(rig: Rig) -> None:
    """The SDK would look it up, with the receiver's login and at a host that the site chose."""
    run = rig.backend(mode="offline").open_run(rig.info())
    report = run.write(
        [
            entry(0, Params({"a": "wandb-artifact://evil.example/x", "b": {"c": "wandb-artifact://y"}})),
            entry(1, Params({"d": {"_type": "artifactVersion", "id": "QXJ0"}})),
            entry(2, Tags({"from": "wandb-artifact://z"})),
            entry(3, Summary({"best": "wandb-artifact://s"})),
        ]
    )
    run.finish(RunStatus.FINISHED)
    assert report is None
    config = only_run(rig).config
    assert (config["a"], config["b"]) == ('"wandb-artifact://evil.example/x"', {"c": '"wandb-artifact://y"'})
    assert json.loads(config["d"]) == {"_type": "artifactVersion", "id": "QXJ0"}
    assert config["trackhub"]["tags"] == {"from": '"wandb-artifact://z"'}
    assert only_run(rig).summary["best"] == '"wandb-artifact://s"'


@pytest.mark.parametrize(("status", "exit_code"), [("finished", 0), ("failed", 1), ("aborted", 1), ("killed", 254)])
def test_run_ends_as_what_it_was(rig: Rig, status: str, exit_code: int) -> None:
    """W&B shows exit code 254 as crashed, and other codes as failed."""
    rig.backend(mode="offline").open_run(rig.info()).finish(RunStatus(status))
    assert only_run(rig).exit_code == exit_code


def test_batch_that_is_handed_over_twice_is_stored_once(rig: Rig) -> None:
    """An error after the SDK took the batch does no harm."""
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(5)))
    run.write(losses(range(7)))
    run.finish(RunStatus.FINISHED)
    assert [row["_step"] for row in only_run(rig).rows] == list(range(7))


def test_flushed_records_survive_the_service_and_the_process(rig: Rig) -> None:
    """When flush has returned, everything is in the file, although the run is open."""
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write(losses(range(300)))
    run.flush()
    assert len(only_run(rig).rows) == 300
    run.write([entry(300, Params({"lr": 1}))])
    run.flush()
    assert only_run(rig).config["lr"] == 1


def test_flush_says_so_when_the_file_is_gone(rig: Rig) -> None:
    """A folder that somebody took away is no success."""
    run = rig.backend(mode="offline", flush_timeout_s=0.5).open_run(rig.info())
    run.write(losses(range(3)))
    rig.wandb_dir.rename(rig.folder / "away")
    with pytest.raises(TransientError):
        run.flush()


CHILD = """
import os, signal, sys
from pathlib import Path
from backends.wandb.tests.conftest import JOB, Rig, losses
rig = Rig.__new__(Rig)
rig.folder = Path(sys.argv[1]); rig.job = JOB
rig.wandb_dir = rig.folder / "wandb"; rig.blobs = rig.folder; rig.backends = []
run = rig.backend(mode="offline").open_run(rig.info())
run.write(losses(range(100)))
run.flush()
run.write(losses(range(100, 150)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_is_rebuilt_with_exact_rows(rig: Rig) -> None:
    """A torn folder is replaced: afterwards there is one folder of that run, with every row once."""
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(rig.folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    torn = only_run(rig)
    assert torn.exit_code is None
    assert len(torn.rows) >= 100
    backend = rig.backend(mode="offline")
    assert backend.capabilities.redelivery is Redelivery.REBUILD
    run = backend.open_run(rig.info())
    run.write(losses(range(200)))
    run.flush()
    run.finish(RunStatus.FINISHED)
    rebuilt = only_run(rig)
    assert [row["_step"] for row in rebuilt.rows] == list(range(200))
    assert rebuilt.exit_code == 0


def test_close_ends_what_was_not_ended(rig: Rig) -> None:
    """A run that the lane gave up leaves no process, and what was flushed is on disk."""
    backend = rig.backend(mode="offline")
    run = backend.open_run(rig.info())
    run.write(losses(range(10)))
    run.flush()
    backend.close()
    assert services() == []
    assert (len(only_run(rig).rows), only_run(rig).exit_code) == (10, None)


def test_nothing_is_left_outside_the_folder_of_the_receiver(rig: Rig, tmp_path: Path) -> None:
    """No staged artifact, no settings and no process. The SDK's service leaves its log in the home folder."""
    run = rig.backend(mode="offline").open_run(rig.info())
    run.write([entry(0, Table("t", ["a"], [[1]])), entry(1, Artifact("m", rig.blob(b"x", "a/b"), "m"))])
    run.finish(RunStatus.FINISHED)
    left = [path.name for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert [name for name in left if not name.startswith("core-debug-")] == []
    assert services() == []


def test_the_first_images_of_two_runs_may_come_at_the_same_time(tmp_path: Path) -> None:
    """Two lanes open their first image. Pillow loaded its formats then, and could not identify one of them."""
    (tmp_path / "image.png").write_bytes(png())
    code = """
        import os, sys, threading
        from trackhub_wandb.sdk_start_and_stop import import_sdk
        wandb = import_sdk()
        sys.setswitchinterval(1e-6)
        def open_in_two_threads():
            barrier, opened = threading.Barrier(2), []
            def work():
                barrier.wait()
                opened.append(wandb.Image(sys.argv[1]))
            threads = [threading.Thread(target=work) for _ in range(2)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            os._exit(len(opened) != 2)
        for _ in range(12):
            if os.fork() == 0:
                open_in_two_threads()
        sys.exit(any([os.wait()[1] for _ in range(12)]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "image.png")],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
