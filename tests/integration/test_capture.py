# SPDX-License-Identifier: Apache-2.0
"""Scripts that log with TensorBoard's, W&B's or MLflow's own SDK, and know nothing of trackhub.

The first tests start a process as FLARE starts a trainer, with the real SDKs. Jobs are at the end.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import trackhub
from tests.integration.harness import Job, read_tensorboard
from trackhub.flare.trainer.capture import Capture
from trackhub.framing import decode_body, scan_frames
from trackhub.records import Artifact, Histogram, Image, Metrics, Params, Record, Table, Tags, Text
from trackhub.spool.announce_spool import SPOOL_ENV, spool_env
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader

STARTUP = Path(trackhub.__file__).parent / "flare" / "trainer" / "startup"
ALL = "beside:tensorboard,wandb,mlflow"


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    create_spool(folder, SpoolInfo("site-1", "job", ("server",)))
    return folder


def _python(
    script: str, spool: Path, capture: str, *, command: tuple[str, ...] = (), expected: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a script with these loggers captured, in the folder ``work`` beside the spool."""
    work = spool.parent / "work"
    work.mkdir(exist_ok=True)
    (work / "script.py").write_text(textwrap.dedent(script))
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("TRACKHUB", "PYTHON", "WANDB", "MLFLOW"))}
    env = {**keep, "PYTHONPATH": str(STARTUP), SPOOL_ENV: spool_env(spool, "site-1", "job"),
           "TRACKHUB_CAPTURE": capture, "WANDB_MODE": "offline", "WANDB_SILENT": "true", "HOME": str(work),
           "WANDB_ERROR_REPORTING": "false", "MPLBACKEND": "agg"}  # fmt: skip
    done = subprocess.run(
        [*(command or (sys.executable,)), "script.py"], env=env, cwd=work, capture_output=True, text=True, timeout=240,
        check=False,
    )  # fmt: skip
    assert done.returncode == expected, done.stderr[-4000:]
    return done


def _records(spool: Path) -> list[Record]:
    reader, records = SpoolReader(spool, "server"), list[Record]()
    reader.begin_pass(final=True)
    while batch := reader.next_batch(1000, 1 << 20):
        records += [decode_body(batch.frames[f.body : f.end]) for f in scan_frames(batch.frames)]
        reader.settle(batch, None)
    return records


def _of(records: list[Record], *kinds: type) -> list[tuple[Any, int | None]]:
    return [(r.payload, r.step) for r in records if isinstance(r.payload, kinds)]


def _dropped(spool: Path) -> dict[str, int]:
    found: Counter[str] = Counter()
    for count in SpoolReader(spool, "server").counts().values():
        found.update(count.dropped)
    return dict(found)


TENSORBOARD = """
import os, sys
sys.modules["wandb"] = None  # it is not installed here
sys.modules["mlflow"] = None
try:
    import wandb
except ImportError:
    pass
os.environ.clear()
os.environ["MPLBACKEND"] = "agg"

import numpy as np, torch
from matplotlib import pyplot as plt
from torch.utils.tensorboard import SummaryWriter


class Mine(SummaryWriter):
    def add_scalar(self, tag, *args, **kwargs):
        super().add_scalar("mine/" + tag, *args, **kwargs)


writer, mine = SummaryWriter("own"), Mine("mine")
for step in range(1000):
    writer.add_scalar("loss", torch.tensor(step / 7), step)
writer.add_scalar(tag="named", scalar_value=1.5, global_step=3)
writer.add_scalars("both", {"x": 1, "y": 2.5}, 4)
mine.add_scalar("a", 2.5, 1)
writer.add_text("note", "hello", 1)
writer.add_histogram("weights", np.arange(10.0), 2)
writer.add_image("image", np.zeros((3, 4, 5), np.uint8), 2)
writer.add_images("images", np.zeros((2, 3, 4, 5), np.uint8), 2)
figure = plt.figure()
writer.add_figure("figure", figure, 2)
writer.add_hparams({"lr": 0.1}, {"final": 0.75}, global_step=9)
writer.add_embedding(torch.zeros(2, 3))
writer.add_embedding(torch.zeros(2, 3), global_step=1)
try:
    writer.add_scalar("wrong")
except TypeError:
    print("as without trackhub", flush=True)
writer.flush()
os.kill(os.getpid(), 9)  # it closes nothing
"""


def test_calls_of_a_summary_writer_become_records_beside_its_own_file(spool: Path) -> None:
    """In a script that clears its environment, has a subclass, lacks the other SDKs, closes nothing and is killed."""
    done = _python(TENSORBOARD, spool, ALL, expected=-9)

    records = _records(spool)
    metrics = _of(records, Metrics)
    assert [(payload.values, step) for payload, step in metrics[:1000]] == [
        ({"loss": pytest.approx(step / 7)}, step) for step in range(1000)
    ]
    assert metrics[1000:] == [
        (Metrics({"named": 1.5}), 3),
        (Metrics({"both/x": 1.0, "both/y": 2.5}), 4),
        (Metrics({"mine/a": 2.5}), 1),
        (Metrics({"final": 0.75}), 9),
    ]
    assert _of(records, Params, Text) == [(Text("note", "hello"), 1), (Params({"lr": 0.1}), None)]
    assert [payload.key for payload, _ in _of(records, Histogram)] == ["weights"]
    assert [(image.key, step) for image, step in _of(records, Image)] == [("image", 2), ("images", 2), ("figure", 2)]
    assert _dropped(spool) == {"unconvertible": 2, "invalid_value": 1}
    assert done.stderr.count("add_embedding: trackhub has no kind of record") == 1
    assert done.stdout.strip() == "as without trackhub"
    own = [p for p in read_tensorboard(spool.parent / "work" / "own") if p.key == "loss"]
    assert [p.step for p in own] == list(range(1000))


WANDB = """
import json, os
import numpy as np, wandb

run = wandb.init(project="p", config={"lr": 1, "optim": {"a": 2}})
wandb.log({"loss": 1.0})
wandb.log({"loss": 0.5, "n": {"k": 3}}, commit=False)
wandb.log({"accuracy": 0.25})
try:
    wandb.log({3: 1})
except TypeError:
    assert wandb.run.settings.mode != "disabled"  # as without trackhub. W&B has counted no step
run.log({"late": 1.0}, step=7)
run.log({"early": 1.0}, step=5)
run.log({"note": "text", "image": wandb.Image(np.zeros((4, 4, 3), np.uint8), caption="c"),
         "h": wandb.Histogram(np.arange(5.0)), "t": wandb.Table(columns=["a"], data=[[1]]), "html": wandb.Html("<a>"),
         "two": [wandb.Image(np.zeros((4, 4, 3), np.uint8))] * 2, "x": 2.0,
         "deep": {"note": "inner", "of": {"image": wandb.Image(np.zeros((4, 4, 3), np.uint8)), "y": 3.0}}})
wandb.config.update({"batch": 3})
wandb.config.z = 4
run.config["y"] = 5
wandb.run.summary["best"] = 0.9
wandb.summary.update({"name": "x"})
own = wandb.log_artifact("script.py", name="code", type="dataset")
run.log_model("script.py", name="model")
run.alert("title", "text")
assert own is not None
step = run.step
wandb.finish()
print(step)
"""


@pytest.mark.parametrize("mode", ["beside", pytest.param("only", marks=pytest.mark.long)])
def test_calls_of_wandb_become_records_with_the_steps_that_wandb_gives(spool: Path, mode: str) -> None:
    _python(WANDB, spool, f"{mode}:wandb")

    records = _records(spool)
    assert _of(records, Metrics) == [
        (Metrics({"loss": 1.0}), 0),
        (Metrics({"loss": 0.5, "n/k": 3.0}), 1),
        (Metrics({"accuracy": 0.25}), 1),
        (Metrics({"3": 1.0}), 2),
        (Metrics({"late": 1.0}), 7),
        (Metrics({"early": 1.0}), 5),
        (Metrics({"x": 2.0, "deep/of/y": 3.0}), 7),
        (Metrics({"summary/best": 0.9}), None),
    ]
    params = [payload.values for payload, _ in _of(records, Params)]
    assert params == [{"lr": 1, "optim/a": 2}, {"batch": 3}, {"z": 4}, {"y": 5}]
    texts = [(Text("note", "text"), 7), (Text("deep/note", "inner"), 7)]
    assert _of(records, Tags, Text) == [*texts, (Tags({"summary/name": "x"}), None)]
    images = ["image", "two/0", "two/1", "deep/of/image"]
    assert [(p.key, step) for p, step in _of(records, Image)] == [(key, 7) for key in images]
    assert _of(records, Table) == [(Table("t", ["a"], [[1]]), 7)]
    assert [p.key for p, _ in _of(records, Histogram)] == ["h"]
    assert [(p.key, p.artifact_type) for p, _ in _of(records, Artifact)] == [("code", "dataset"), ("model", "model")]
    assert _dropped(spool) == {"unconvertible": 2}
    assert bool(list((spool.parent / "work").glob("wandb/offline-run-*"))) is (mode == "beside")


MLFLOW = """
import mlflow
from mlflow import log_metric
from mlflow.entities import Metric, RunTag

mlflow.set_tracking_uri("sqlite:///own.db")
with mlflow.start_run() as run:
    assert mlflow.log_param("p", 1) == 1
    mlflow.log_params({"q": 2})
    for _ in range(3):
        log_metric("m", 1.5)
    mlflow.log_metric("s", 2.0, step=4)
    mlflow.log_metrics({"n": 2.5}, step=3, synchronous=False).wait()
    mlflow.set_tag("t", "v")
    mlflow.log_text("hello", "a.txt")
    mlflow.log_dict({"a": 1}, "d.json")
    client = mlflow.MlflowClient()
    client.log_metric(run.info.run_id, "c", 4.0, step=9)
    client.log_batch(run.info.run_id, metrics=[Metric("x", 1.0, 0, 1), Metric("x", 2.0, 0, 2), Metric("y", 3.0, 0, 2)],
                     tags=[RunTag("mlflow.own", "no"), RunTag("u", "w")])
print(sorted(client.get_run(run.info.run_id).data.metrics))
"""


@pytest.mark.long
@pytest.mark.parametrize("mode", ["beside", "only"])
def test_calls_of_mlflow_become_records(spool: Path, mode: str) -> None:
    done = _python(MLFLOW, spool, f"{mode}:mlflow")

    records = _records(spool)
    assert _of(records, Metrics) == [
        *[(Metrics({"m": 1.5}), None)] * 3,
        (Metrics({"s": 2.0}), 4),
        (Metrics({"n": 2.5}), 3),
        (Metrics({"c": 4.0}), 9),
        (Metrics({"x": 1.0}), 1),
        (Metrics({"x": 2.0, "y": 3.0}), 2),
    ]
    assert [payload.values for payload, _ in _of(records, Params)] == [{"p": 1}, {"q": 2}]
    assert [payload.values for payload, _ in _of(records, Tags)] == [{"t": "v"}, {"u": "w"}]
    assert [payload.key for payload, _ in _of(records, Text)] == ["a.txt", "d.json"]
    assert _dropped(spool) == {}
    own = "['c', 'm', 'n', 's', 'x', 'y']" if mode == "beside" else "[]"
    assert done.stdout.strip().splitlines()[-1] == own


CHILDREN = """
import multiprocessing, subprocess, sys
from pathlib import Path


def child(n):
    from torch.utils.tensorboard import SummaryWriter
    writer = SummaryWriter(f"child-{n}")
    for i in range(100):
        writer.add_scalar(f"child/{n}", i / 7, i)
    writer.close()


def by_backend(n):
    # As a backend does that calls the same SDK: with threads and programs of its own.
    import threading
    from torch.utils.tensorboard import SummaryWriter
    made.append(SummaryWriter("backend"))
    made[0].add_scalar("echo", 1.0, 1)
    thread = threading.Thread(target=made[0].add_scalar, args=("echo/thread", 1.0, 1))
    thread.start()
    thread.join()
    program = "from torch.utils.tensorboard import SummaryWriter; SummaryWriter('program').add_scalar('echo/p', 1, 1)"
    subprocess.run([sys.executable, "-c", program], check=True)


if __name__ == "__main__":
    from trackhub.mark_own_threads import OwnThread
    processes = [multiprocessing.get_context("spawn").Process(target=child, args=(n,)) for n in range(2)]
    [p.start() for p in processes]
    child(2)
    made = []
    own = OwnThread(target=by_backend, args=(0,))
    own.start()
    own.join()
    made[0].add_scalar("echo/later", 1.0, 1)  # by another thread, with what the backend has made
    [p.join() for p in processes]
    made[0].close()
    assert len(list(Path("backend").iterdir())) == 1 and Path("program").exists()
"""


@pytest.mark.long
def test_spawned_processes_are_captured_and_nothing_of_a_backend_is(spool: Path) -> None:
    _python(CHILDREN, spool, "beside:tensorboard")

    found = Counter(key for payload, _ in _of(_records(spool), Metrics) for key in payload.values)
    assert found == {"child/0": 100, "child/1": 100, "child/2": 100}


@pytest.mark.long
def test_each_rank_of_torchrun_is_captured(spool: Path) -> None:
    script = """
    import os
    from torch.utils.tensorboard import SummaryWriter
    rank = os.environ["RANK"]
    writer = SummaryWriter("rank-" + rank)
    for i in range(50):
        writer.add_scalar("rank/" + rank, i / 7, i)
    """
    torchrun = Path(sys.executable).parent / "torchrun"

    _python(script, spool, ALL, command=(str(torchrun), "--nproc-per-node", "2", "--master-port", "29611"))

    found = Counter(key for payload, _ in _of(_records(spool), Metrics) for key in payload.values)
    assert found == {"rank/0": 50, "rank/1": 50}


@pytest.mark.long
def test_in_place_of_its_own_file_a_summary_writer_writes_none(spool: Path) -> None:
    script = """
    from torch.utils.tensorboard import SummaryWriter
    with SummaryWriter("own") as writer:
        writer.add_scalar("a\\nb", 1.0, 1)  # a key that trackhub has not
        writer.add_scalar("a", 1.0, 1)
        writer.add_hparams({"lr": 0.1}, {"m": 1.0})
        writer.get_logdir()
        writer.flush()
    """

    _python(script, spool, "only:tensorboard")

    assert len(_of(_records(spool), Metrics)) == 2
    assert _dropped(spool) == {"invalid_value": 1}
    assert not (spool.parent / "work" / "own").exists()


@pytest.mark.long
def test_without_capture_the_use_of_a_logger_is_noted_and_nothing_is_recorded(spool: Path) -> None:
    script = """
    from torch.utils.tensorboard import SummaryWriter
    SummaryWriter("own").add_scalar("a", 1.0, 1)
    """

    _python(script, spool, "beside:")

    assert _records(spool) == []
    assert [path.name for path in spool.glob("*.logger")] == ["tensorboard.logger"]


def test_the_trainers_file_names_the_modules_that_the_capture_wants() -> None:
    names = next(
        node.value
        for node in ast.parse((STARTUP / "sitecustomize.py").read_text()).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_SDK_MODULES"
    )

    assert ast.literal_eval(names) == Capture.MODULES


JOB = """
import threading
import wandb
from torch.utils.tensorboard import SummaryWriter
from nvflare.client.tracking import SummaryWriter as FlareWriter

run = wandb.init(project="own", dir=OUT, config={"lr": 0.1, "site": SITE})
tensorboard, flares = SummaryWriter(os.path.join(OUT, SITE + "-own")), FlareWriter()
CALLS = 200


def train(n):
    for step in range(CALLS * n, CALLS * (n + 1)):
        fact(lambda: tensorboard.add_scalar("tb", step / 7, step), {"tb": step / 7}, step)
        fact(lambda: wandb.log({"w": step / 3}), {"w": step / 3}, step)
        fact(lambda: flares.add_scalar("flare", 1.5, step), {"flare": 1.5}, step)


rounds(train)
run.summary["best"] = 0.5
run.finish()
tensorboard.close()
"""


def test_in_process_each_call_is_there_once_beside_a_lane_that_calls_the_same_sdk(tmp_path: Path) -> None:
    """A lane of each client calls W&B's SDK in the process in which the script calls it. There is no echo."""
    tracking = {
        "clients": {"jsonl": {}, "tensorboard": {}, "wandb": {"mode": "offline"}},
        "capture": ["tensorboard", "wandb"],
    }
    env = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}

    result = Job(tmp_path, JOB, tracking, env=env).run()

    assert result.rc == 0, result.log[-6000:]
    for site in ("site-1", "site-2"):
        report = result.report(site)
        assert report["balanced"]
        assert {lane: runs[site]["pending"] for lane, runs in report["lanes"].items()} == dict.fromkeys(
            ("jsonl", "tensorboard", "wandb"), 0
        )
        points = [p for p in result.jsonl_points(site, site) if not p.key.startswith("summary/")]
        facts = result.facts(site)
        assert [(p.key, p.value, p.step) for p in points] == [(f.key, f.value, f.step) for f in facts]
        assert all(f.before <= p.time <= f.after for p, f in zip(points, facts, strict=True))
        assert [p.round for p in points] == [0] * 600 + [1] * 600
        stored = Counter(p.key for p in result.tensorboard_points(site, site))
        assert stored == {"tb": 400, "w": 400, "flare": 400, "summary/best": 1}
        (params,) = [line["values"] for line in result.jsonl(site, site) if line["kind"] == "params"]
        assert params == {"lr": 0.1, "site": site}
        own = read_tensorboard(result.out / f"{site}-own")
        assert [p.step for p in own if p.key == "tb"] == list(range(400))
        assert len(list(result.out.glob("wandb/offline-run-*"))) == 2


@pytest.mark.long
@pytest.mark.parametrize("external", [False, True], ids=["in_process", "external"])
def test_a_site_that_logged_nothing_is_named_with_the_likely_reason(tmp_path: Path, external: bool) -> None:
    trainer = """
    from torch.utils.tensorboard import SummaryWriter

    if SITE == "site-1":
        writer = SummaryWriter(os.path.join(OUT, "own"))
    rounds(lambda n: SITE == "site-1" and writer.add_scalar("a", n + 0.5, n))
    """
    tracking: dict[str, Any] = {"server": ["jsonl"]}

    result = Job(tmp_path, trainer, tracking, external=external).run()

    assert result.rc == 0, result.log[-6000:]
    sites = result.report("server")["sites"]
    assert [sites[site]["at_site"]["not_captured"] for site in ("site-1", "site-2")] == [["tensorboard"], []]
    assert "the scripts used tensorboard: give capture to record it" in result.log
    assert "nothing was logged: no log call of trackhub or FLARE was made" in result.log


@pytest.mark.long
def test_an_external_trainer_is_captured_and_client_side_only_sends_nothing(tmp_path: Path) -> None:
    from tests.integration.harness import files_with

    trainer = """
    import mlflow
    from torch.utils.tensorboard import SummaryWriter

    KEY = "".join(reversed("cirtem_terces/detnalp"))
    mlflow.set_tracking_uri("sqlite:///" + os.path.join(OUT, SITE + ".db"))
    writer = SummaryWriter(os.path.join(OUT, SITE))
    mlflow.start_run()
    rounds(lambda n: [writer.add_scalar(KEY, n + i / 8, i) or mlflow.log_metric("m", i, step=i) for i in range(20)])
    writer.add_scalar("last", 1.0, 1)
    os.kill(os.getpid(), 9)
    """
    tracking: dict[str, Any] = {"clients": ["jsonl"], "capture": ["tensorboard", "mlflow", "wandb"]}

    result = Job(tmp_path, trainer, tracking, external=True).run()

    assert result.rc == 0, result.log[-6000:]
    assert list(files_with(result.workspace / "server", b"planted/secret_metric")) == []
    for site in ("site-1", "site-2"):
        points = Counter(p.key for p in result.jsonl_points(site, site))
        assert points == {"planted/secret_metric": 40, "m": 40, "last": 1}
        assert result.report(site)["sites"][site]["at_site"]["not_used"] == ["wandb"]
    assert "capture: no use of wandb was seen" in result.log
    assert json.dumps(result.report("site-1"))
