# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import html
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image as PilImage
from trackhub_wandb import WandBBackend

from backends.wandb.tests.conftest import T0, Rig, entry, losses, services
from tests.support.wandb_emulator import ENTITY, Emulator
from trackhub.open_without_links import find_way_out
from trackhub.spi import (
    Artifact,
    Histogram,
    Image,
    Metrics,
    Params,
    Payload,
    Redelivery,
    RunStatus,
    Table,
    Tags,
    Text,
)

Online = Callable[..., WandBBackend]


def test_run_arrives_with_name_group_steps_and_times(online: Online, rig: Rig, emulator: Emulator) -> None:
    """The server has what flush confirmed before the run ends: rows by position, step and round as columns."""
    backend = online(project="demo", job_type="train", notes="a note", tags=["pilot"])
    run = backend.open_run(rig.info())
    steps = [10, 5, 5, 0]
    run.write([entry(n, Metrics({"val/acc": n / 4, "a.b": 1.0}), step=step, round=1) for n, step in enumerate(steps)])
    run.flush()
    held = emulator.state.run(rig.info().run_id)
    assert held.state == "running"
    found = [(r["_step"], r["step"], r["round"], r["_timestamp"], r["val/acc"]) for r in held.history()]
    assert found == [(n, step, 1, T0 + n, n / 4) for n, step in enumerate(steps)]
    run.finish(RunStatus.FINISHED)
    assert (held.state, held.exit_code, held.entity, held.project) == ("finished", 0, ENTITY, "demo")
    fields = {name: held.fields[name] for name in ("displayName", "groupName", "jobType", "notes")}
    assert fields == {
        "displayName": "fedavg lr=0.1/site-1",
        "groupName": "fedavg lr=0.1-6f2c8a10",
        "jobType": "train",
        "notes": "a note",
    }
    assert held.tags == ["pilot"]
    summary = json.loads(held.summary)
    assert (summary["val/acc"], {"step", "round"} & set(summary)) == (3 / 4, set())
    results = backend.results(rig.info())
    assert results is not None
    assert results.url == f"{emulator.url}/{ENTITY}/demo/runs/{rig.info().run_id}"
    assert services() == []


def test_every_kind_is_at_the_server_when_flush_returns(online: Online, rig: Rig, emulator: Emulator) -> None:
    """Not only rows, but also config, tags, media files and artifacts."""
    picture = io.BytesIO()
    PilImage.new("RGB", (8, 6)).save(picture, "PNG")
    run = online().open_run(rig.info())
    payloads: list[Payload] = [
        Params({"lr": 0.1, "x": float("nan"), "net": {"layers": [1, 2]}}),
        Tags({"stage": "pilot"}),
        Text("note", "a < b"),
        Image("image", rig.blob(picture.getvalue(), "image/png"), 8, 6),
        Histogram("weights", [0.0, 0.5, 1.0], [3.0, 4.0]),
        Table("preds", ["name", "p"], [["cat", 0.5]]),
        Artifact("model", rig.blob(b"weights", "application/octet-stream"), "model.pt", "model"),
    ]
    run.write([entry(n, payload) for n, payload in enumerate(payloads)])
    run.flush()
    held = emulator.state.run(rig.info().run_id)
    params = held.params()
    assert (params["lr"], params["x"], params["net"]) == (0.1, "NaN", {"layers": [1, 2]})
    assert held.tags == ["stage:pilot"]
    text, image, histogram, table = held.history()
    assert html.escape("a < b") in held.files[text["note"]["path"]].decode()
    assert held.files[image["image"]["path"]] == picture.getvalue()
    assert histogram["weights"] == {"_type": "histogram", "bins": [0, 0.5, 1], "values": [3, 4]}
    assert json.loads(held.files[table["preds"]["path"]])["data"] == [["cat", 0.5]]
    (model,) = [one for one in emulator.state.artifacts if one.artifact_type == "model"]
    assert (model.collection, model.state, model.files["model.pt"]) == ("model--site-1", "COMMITTED", b"weights")
    assert model.run_name == rig.info().run_id
    run.finish(RunStatus.FINISHED)


@pytest.mark.parametrize(
    ("status", "shown"),
    [
        (RunStatus.FAILED, ("failed", 1)),
        (RunStatus.ABORTED, ("failed", 1)),
        (RunStatus.KILLED, ("crashed", 254)),
    ],
)
def test_site_that_did_not_finish_ends_as_failed_or_crashed(
    online: Online, rig: Rig, emulator: Emulator, status: RunStatus, shown: tuple[str, int]
) -> None:
    """W&B shows it neither as running nor as finished."""
    run = online().open_run(rig.info())
    run.finish(status)
    held = emulator.state.run(rig.info().run_id)
    assert (held.state, held.exit_code) == shown


def test_a_runs_folder_is_for_those_who_may_use_the_folder_around_it(online: Online, rig: Rig) -> None:
    rig.wandb_dir.chmod(0o700)

    run = online().open_run(rig.info())
    run.finish(RunStatus.FINISHED)

    (folder,) = rig.wandb_dir.glob("run-*")
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("ended", [False, True])
def test_nothing_in_a_runs_folder_leads_out_of_it(online: Online, rig: Rig, ended: bool) -> None:
    """A replay of the job refuses links that do."""
    run = online().open_run(rig.info())
    run.write([entry(0, Artifact("a", rig.blob(b"x", "application/octet-stream"), "a.bin"))])
    run.flush()
    if ended:
        run.finish(RunStatus.FINISHED)

    assert find_way_out(rig.wandb_dir, rig.wandb_dir) == ""


def test_new_value_of_a_nested_param_replaces_the_old_one_at_the_server(
    online: Online, rig: Rig, emulator: Emulator
) -> None:
    """Also after the run was opened again. W&B by itself merges dicts leaf by leaf."""
    for number, net in enumerate(({"layers": 2, "width": 8}, {"layers": 3}, {"depth": {"a": 1}}, "none", {"x": 1})):
        backend = online()
        run = backend.open_run(rig.info(resume_from=number))
        run.write([entry(number, Params({"net": net, "lr": 0.1}))])
        run.flush()
        assert emulator.state.run(rig.info().run_id).params()["net"] == net
        backend.close()
    assert emulator.state.run(rig.info().run_id).params()["lr"] == 0.1


def test_param_that_refers_to_an_artifact_asks_no_server_for_it(online: Online, rig: Rig, emulator: Emulator) -> None:
    """Neither when it is written nor when the run is opened again. The site must not use the receiver's login."""
    for number in range(2):
        backend = online()
        run = backend.open_run(rig.info(resume_from=number))
        run.write([entry(number, Params({f"a{number}": "wandb-artifact://x", "b": {"c": "wandb-artifact://y"}}))])
        run.flush()
        backend.close()
    params = emulator.state.run(rig.info().run_id).params()
    assert (params["a0"], params["a1"], params["b"]) == (*['"wandb-artifact://x"'] * 2, {"c": '"wandb-artifact://y"'})


def test_entity_of_the_environment_is_the_runs(
    online: Online, rig: Rig, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend asks for a run by the name that it writes under, also when it resumes the run."""
    monkeypatch.setenv("WANDB_ENTITY", "hospital")
    for number in range(2):
        backend = online()
        run = backend.open_run(rig.info())
        run.write(losses(range(10 * number, 10 * number + 10)))
        run.flush()
        assert len(emulator.state.run(rig.info().run_id).rows) == 10 * number + 10
        backend.close()
    assert emulator.state.run(rig.info().run_id).entity == "hospital"


def test_run_that_is_opened_again_goes_on(online: Online, rig: Rig, emulator: Emulator) -> None:
    """A second receiver hands over some records again. Every row is there once, and the tags stay."""
    first = online(tags=["fixed"])
    assert first.capabilities.redelivery is Redelivery.IDEMPOTENT
    run = first.open_run(rig.info())
    run.write([entry(0, Tags({"stage": "pilot"})), entry(1, Params({"lr": 0.1})), *losses(range(2, 20))])
    run.flush()
    first.close()
    assert services() == []
    again = online(tags=["fixed"]).open_run(rig.info(resume_from=10))
    again.write(losses(range(10, 30)))
    again.write([entry(30, Tags({"stage": "done", "more": ""})), entry(31, Params({"epochs": 3}))])
    again.flush()
    again.finish(RunStatus.FINISHED)
    held = emulator.state.run(rig.info().run_id)
    assert [row["_step"] for row in held.history()] == list(range(2, 30))
    assert held.tags == ["fixed", "stage:done", "more"]
    assert {name: held.params()[name] for name in ("lr", "epochs")} == {"lr": 0.1, "epochs": 3}
    assert held.state == "finished"


CHILD = """
import os, signal, sys
from pathlib import Path
from backends.wandb.tests.conftest import JOB, Rig, losses
rig = Rig.__new__(Rig)
rig.folder = Path(sys.argv[1]); rig.job = JOB
rig.wandb_dir = rig.folder / "wandb"; rig.blobs = rig.folder; rig.backends = []
run = rig.backend(mode="online", upload_interval_s=1.0).open_run(rig.info())
run.write(losses(range(100)))
run.flush()
run.write(losses(range(100, 150)))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_run_is_resumed_with_exact_rows(
    online: Online, rig: Rig, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What flush confirmed survives SIGKILL. The rest is handed over again, and nothing is there twice."""
    monkeypatch.setenv("WANDB_API_KEY", emulator.state.api_key)
    monkeypatch.setenv("WANDB_BASE_URL", emulator.url)
    done = subprocess.run(
        [sys.executable, "-c", CHILD, str(rig.folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    held = emulator.state.run(rig.info().run_id)
    assert len(held.rows) >= 100
    assert held.state == "running"
    run = online().open_run(rig.info(resume_from=100))
    run.write(losses(range(100, 200)))
    run.flush()
    run.finish(RunStatus.FINISHED)
    assert [row["_step"] for row in held.history()] == list(range(200))
    assert held.state == "finished"


def test_sixteen_sites_share_one_process(online: Online, rig: Rig, emulator: Emulator) -> None:
    """W&B costs one process for any number of sites, and the process ends with the last run."""
    backend = online()
    sites = [f"site-{number}" for number in range(1, 17)]
    runs = {site: backend.open_run(rig.info(site)) for site in sites}
    assert len(services()) == 1
    for site, run in runs.items():
        run.write([entry(n, Metrics({"loss": float(site.removeprefix("site-"))})) for n in range(20)])
    for run in runs.values():
        run.flush()
    assert len(services()) == 1
    for run in runs.values():
        run.finish(RunStatus.FINISHED)
    assert services() == []
    for site in sites:
        rows = emulator.state.run(rig.info(site).run_id).history()
        assert [row["loss"] for row in rows] == [float(site.removeprefix("site-"))] * 20


def test_each_site_may_have_its_own_server_and_key(tmp_path: Path, emulator: Emulator) -> None:
    """Two receivers in one process, as in a simulator, write to two servers with two keys, at the same time."""
    with Emulator("z" * 40) as other:
        rigs = [Rig(tmp_path / name) for name in ("one", "two")]
        servers = [emulator, other]
        backends = [
            rig.backend(mode="online", base_url=server.url, api_key=server.state.api_key, upload_interval_s=1.0)
            for rig, server in zip(rigs, servers, strict=True)
        ]
        for backend in backends:
            backend.preflight()
        sites = ("site-1", "site-2")
        runs = [b.open_run(rig.info(site)) for b, rig, site in zip(backends, rigs, sites, strict=True)]
        for number, run in enumerate(runs):
            run.write([entry(n, Metrics({"server": float(number)})) for n in range(5)])
        for run in runs:
            run.flush()
            run.finish(RunStatus.FINISHED)
        for backend in backends:
            backend.close()
        for number, server in enumerate(servers):
            (held,) = server.state.runs.values()
            assert [row["server"] for row in held.history()] == [number] * 5
        assert other.violations == []


def test_key_is_in_no_file_and_no_command_line(
    rig: Rig, emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor in the home folder, the output, or the data at the server."""
    key = emulator.state.api_key = "5ec7e7" * 7
    monkeypatch.setenv("WANDB_API_KEY", key)
    backend = rig.backend(mode="online", base_url=emulator.url, upload_interval_s=1.0)
    backend.preflight()
    run = backend.open_run(rig.info())
    assert all(key not in command for command in services())
    run.write([entry(0, Params({"lr": 1})), *losses(range(1, 5))])
    run.flush()
    run.finish(RunStatus.FINISHED)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert [path for path in files if key.encode() in path.read_bytes()] == []
    assert key not in "".join(capfd.readouterr())
    held = emulator.state.run(rig.info().run_id)
    assert key not in json.dumps([held.fields, held.config, held.rows, held.summary])
    assert not any(key.encode() in data for data in held.files.values())


def test_run_of_the_users_own_is_left_alone(online: Online, rig: Rig, emulator: Emulator, tmp_path: Path) -> None:
    """The training code of an in-process client may use W&B itself. Its run goes on when ours has ended."""
    import wandb

    own = wandb.init(project="mine", mode="offline", dir=tmp_path, reinit="create_new", settings={"silent": True})
    backend = online()
    run = backend.open_run(rig.info())
    run.write(losses(range(3)))
    run.flush()
    run.finish(RunStatus.FINISHED)
    backend.close()
    assert len(services()) == 1
    own.log({"a": 1})
    own.finish()
    assert len(emulator.state.run(rig.info().run_id).rows) == 3
