# SPDX-License-Identifier: Apache-2.0
"""The folder that trackhub puts into a trainer's path: what it does to the process, and where it stays out.

Each test starts Python as FLARE starts a trainer, with FLARE's real modules in it. No cell is connected: a call that
trackhub leaves to FLARE is noted by the cell's place holder.
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import textwrap
import venv
from pathlib import Path

import pytest

import trackhub
from trackhub.framing import decode_body, scan_frames
from trackhub.records import Metrics, Record
from trackhub.spool.announce_spool import SPOOL_ENV, spool_env
from trackhub.spool.layout import SpoolInfo, close_spool, create_spool
from trackhub.spool.reading import SpoolReader

STARTUP = Path(trackhub.__file__).parent / "flare" / "trainer" / "startup"
CELL = "site-1.job-1"

API = """
import json, os, sys
from nvflare.apis.analytix import AnalyticsDataType as Type
from nvflare.client.cell.api import CellClientAPI

left_to_flare = []


class Cell:
    def fire_and_forget(self, message, **more):
        left_to_flare.append(message.payload["key"])


def api(cell="site-1.job-1", rank="0"):
    made = CellClientAPI.__new__(CellClientAPI)
    made._cj_fqcn, made._rank, made._is_control_rank, made._closed = cell, rank, rank == "0", False
    made._cell, made._session_id, made._protocol_secure = Cell(), "session", False
    return made


def scalar(key, value, step=None, **of):
    api(**of).log(key, value, Type.SCALAR, global_step=step)

"""


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    create_spool(folder, SpoolInfo("site-1", "job", ("server",)))
    return folder


def _announced(spool: Path, *path: Path) -> dict[str, str]:
    path_env = os.pathsep.join(map(str, (STARTUP, *path)))
    return {"PYTHONPATH": path_env, SPOOL_ENV: spool_env(spool, "site-1", "job"), "TRACKHUB_TAKE_OVER": CELL}


def _python(
    source: str, env: dict[str, str], *args: str, python: str = sys.executable
) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKHUB", "PYTHON"))}
    return subprocess.run(
        [python, *args, "-c", textwrap.dedent(source)], env={**clean, **env}, cwd="/", capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def _run(source: str, env: dict[str, str], *args: str, python: str = sys.executable) -> str:
    done = _python(source, env, *args, python=python)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _records(spool: Path) -> list[Record]:
    reader, records = SpoolReader(spool, "server"), list[Record]()
    reader.begin_pass(final=True)
    while batch := reader.next_batch(1000, 1 << 20):
        records += [decode_body(batch.frames[f.body : f.end]) for f in scan_frames(batch.frames)]
        reader.settle(batch, None)
    return records


def _metrics(spool: Path) -> list[tuple[dict[str, float], int | None]]:
    return [(r.payload.values, r.step) for r in _records(spool) if isinstance(r.payload, Metrics)]


STATE = """
import json, sys
print(json.dumps([sorted(sys.modules), sys.path, [repr(type(finder)) for finder in sys.meta_path]]))
"""


def test_where_nothing_is_announced_the_process_is_as_without_the_folder(tmp_path: Path) -> None:
    with_folder = json.loads(_run(STATE, {"PYTHONPATH": f"{STARTUP}{os.pathsep}{tmp_path}"}))
    without = json.loads(_run(STATE, {"PYTHONPATH": str(tmp_path)}))

    assert with_folder == without


def test_an_announced_process_has_loaded_no_module_more(spool: Path, tmp_path: Path) -> None:
    modules, path, finders = json.loads(_run(STATE, _announced(spool, tmp_path)))
    expected = json.loads(_run(STATE, {"PYTHONPATH": str(tmp_path)}))

    assert [modules, path] == expected[:2]
    assert finders[1:] == expected[2]


def test_a_python_that_warns_of_all_it_can_warn_of_prints_what_it_prints_without_the_folder(spool: Path) -> None:
    flags = ["-X", "dev", "-X", "warn_default_encoding", "-W", "always"]

    assert _python("print(1)", _announced(spool), *flags).stderr == _python("print(1)", {}, *flags).stderr


OWN = "import sys\nsys.own_was_run = getattr(sys, 'own_was_run', 0) + 1\n"


@pytest.mark.parametrize("end", ["", "raise RuntimeError('mine')\n", "import not_there\n", "sys.exit(5)\n"])
def test_a_sitecustomize_of_the_users_runs_once_and_as_without_the_folder(
    spool: Path, tmp_path: Path, end: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(OWN + end)
    source = "import sys; print(sys.own_was_run, getattr(sys.modules.get('sitecustomize'), '__file__', None))"

    tracked = _python(source, _announced(spool, tmp_path))
    plain = _python(source, {"PYTHONPATH": str(tmp_path)})

    assert (tracked.returncode, tracked.stdout) == (plain.returncode, plain.stdout)
    assert tracked.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]
    assert end or tracked.stdout.startswith("1 ")


def test_without_a_sitecustomize_of_the_users_there_is_none(spool: Path) -> None:
    done = _python("import sitecustomize", _announced(spool))

    assert done.returncode == 1
    assert "No module named 'sitecustomize'" in done.stderr


def test_calls_by_all_functions_of_flare_are_one_stream_in_their_order(spool: Path) -> None:
    source = """
    from types import SimpleNamespace
    from nvflare.client import tracking

    context = SimpleNamespace(api=api())
    tensorboard, mlflow = tracking.SummaryWriter(context), tracking.MLflowWriter(context)
    for i in range(0, 50, 5):
        tensorboard.add_scalar("a", float(i), i)
        tensorboard.add_scalars("b", {"c": float(i + 1)}, i + 1)
        scalar("d", float(i + 2), i + 2)
        tracking.WandBWriter(context).log({"e": float(i + 3)}, i + 3)
        mlflow.log_metrics({"f": float(i + 4)}, i + 4)
    print(left_to_flare)
    """

    assert _run(API + textwrap.dedent(source), _announced(spool)).strip() == "[]"
    keys = ["a", "b/c", "d", "e", "f"]
    assert _metrics(spool) == [({keys[i % 5]: float(i)}, i) for i in range(50)]


def test_log_calls_of_all_ranks_threads_and_children_are_records_with_their_times(spool: Path) -> None:
    child = API + "scalar('child', 1.0)"
    source = (
        API
        + f"""
import subprocess, threading, time
before = time.time()
scalar("a", 1.5, 3)
api().log("metrics", {{"b": 1, "c": 2.5}}, Type.METRICS, global_step=4)
closed = api()
closed._closed = True
closed.log("after", 1.0, Type.METRIC)
scalar("rank", 1.0, rank="1")
threads = [threading.Thread(target=lambda: [scalar("thread", float(i), i) for i in range(100)]) for _ in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
if os.fork() == 0:
    scalar("forked", 1.0)
    os._exit(0)
os.wait()
after = time.time()
subprocess.run([sys.executable, "-c", {child!r}], check=True)
print(json.dumps([left_to_flare, before, after]))
"""
    )

    left_to_flare, before, after = json.loads(_run(source, _announced(spool)))

    assert left_to_flare == []
    records = _records(spool)
    values = [(r.payload.values, r.step) for r in records if isinstance(r.payload, Metrics)]
    first = values.index(({"a": 1.5}, 3))
    assert values[first + 1 : first + 4] == [({"b": 1.0, "c": 2.5}, 4), ({"after": 1.0}, None), ({"rank": 1.0}, None)]
    for i in range(100):
        assert values.count(({"thread": float(i)}, i)) == 4
    assert values.count(({"forked": 1.0}, None)) == values.count(({"child": 1.0}, None)) == 1
    assert len(values) == 406
    assert sum(before <= r.time <= after for r in records) == 405


def test_a_script_that_clears_its_environment_is_tracked(spool: Path) -> None:
    out = _run("import os\nos.environ.clear()\n" + API + "scalar('a', 1.0)\nprint(left_to_flare)", _announced(spool))

    assert out.strip() == "[]"
    assert _metrics(spool) == [({"a": 1.0}, None)]


def test_spawned_processes_of_multiprocessing_are_tracked(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(API + "\ndef work(rank):\n    scalar('spawned', 1.0, rank, rank=str(rank))\n")
    source = """
    import multiprocessing
    from work import work
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=work, args=(rank,)) for rank in range(2)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    print([w.exitcode for w in workers])
    """

    assert _run(source, _announced(spool, tmp_path)).strip() == "[0, 0]"
    assert sorted(_metrics(spool), key=str) == [({"spawned": 1.0}, 0), ({"spawned": 1.0}, 1)]


def test_a_killed_process_loses_no_call_that_had_returned(spool: Path) -> None:
    done = _python(
        API + "for i in range(3000):\n    scalar('a', float(i), i)\nos.kill(os.getpid(), 9)", _announced(spool)
    )

    assert done.returncode == -9
    assert _metrics(spool) == [({"a": float(i)}, i) for i in range(3000)]


def test_calls_of_another_job_are_left_to_flare(spool: Path) -> None:
    out = _run(API + "scalar('other', 1.0, cell='site-1.job-2')\nprint(left_to_flare)", _announced(spool))

    assert out.strip() == "['other']"
    assert _records(spool) == []


@pytest.mark.parametrize("reason", ["ended", "gone", "other trackhub", "no trackhub", "wrong strict"])
def test_where_it_cannot_be_used_flare_carries_the_calls_and_the_log_says_why(
    spool: Path, tmp_path: Path, reason: str
) -> None:
    env = _announced(spool)
    if reason == "ended":
        close_spool(spool)
    elif reason == "gone":
        (spool / "spool.json").unlink()
    elif reason == "other trackhub":
        (tmp_path / "trackhub").mkdir()
        (tmp_path / "trackhub" / "__init__.py").write_text("raise SystemExit('it is not even imported')")
        env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    elif reason == "no trackhub":
        env["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
        (tmp_path / "trackhub.py").write_text("")
    else:
        env["TRACKHUB_STRICT"] = "maybe"

    done = _python(API + "scalar('a', 1.0)\nprint(left_to_flare)", env)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['a']"
    assert done.stderr.count("FLARE's messages carry them") == 1
    assert list(spool.glob("*.spool")) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk that is read-only")
def test_a_trainer_that_may_not_write_to_the_spool_leaves_the_calls_to_flare(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
    try:
        create_spool(disk / "spool", SpoolInfo("site-1", "job", ("server",)))
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)

        done = _python(API + "scalar('a', 1.0)\nprint(left_to_flare)", _announced(disk / "spool"))
    finally:
        subprocess.run(["umount", disk], check=True)

    assert done.stdout.strip() == "['a']", done.stderr
    assert "may not write" in done.stderr


@pytest.mark.parametrize(
    "flag", ["-I", pytest.param("-S", marks=pytest.mark.long), pytest.param("-E", marks=pytest.mark.long)]
)
def test_a_python_that_does_not_look_leaves_the_calls_to_flare(spool: Path, flag: str) -> None:
    site = os.pathsep.join(path for path in sys.path if path)
    source = f"import sys\nsys.path[:0] = {site.split(os.pathsep)!r}\n" + API + "scalar('a', 1.0)\nprint(left_to_flare)"

    assert _run(source, _announced(spool), flag).strip() == "['a']"
    assert _records(spool) == []


@pytest.mark.parametrize("has_trackhub", [True, False])
def test_a_virtual_environment_uses_the_trackhub_of_the_client_or_none(
    spool: Path, tmp_path: Path, has_trackhub: bool
) -> None:
    """FLARE puts the packages of the client's process into the trainer's path. An editable trackhub is not in them."""
    venv.create(tmp_path / "venv", symlinks=True)
    packages = tmp_path / "packages"
    packages.mkdir()
    site = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    for entry in site.iterdir():
        if "trackhub" not in entry.name:
            (packages / entry.name).symlink_to(entry)
    env = _announced(spool, packages)
    if has_trackhub:
        shutil.copytree(Path(trackhub.__file__).parent, packages / "trackhub")
        startup = packages / "trackhub" / "flare" / "trainer" / "startup"
        env["PYTHONPATH"] = os.pathsep.join([str(startup), str(packages)])

    source = API + "scalar('a', 1.0)\nprint(left_to_flare)"
    out = _run(source, env, python=str(tmp_path / "venv" / "bin" / "python"))

    assert out.strip() == ("[]" if has_trackhub else "['a']")
    assert _metrics(spool) == ([({"a": 1.0}, None)] if has_trackhub else [])


HOSTILE = """
class Hostile:
    def __eq__(self, other):
        raise ValueError("mine")
    __float__ = __str__ = __repr__ = __index__ = __hash__ = __len__ = __iter__ = __bool__ = __getattr__ = __eq__


from types import SimpleNamespace
from nvflare.client import tracking

context, hostile, nested = SimpleNamespace(api=api()), Hostile(), {}
nested["nested"] = nested
tensorboard, wandb = tracking.SummaryWriter(context), tracking.WandBWriter(context)
mlflow = tracking.MLflowWriter(context)
api().log(hostile, hostile, hostile)
api().log("key", 1.0, Type.SCALAR, global_step=hostile)
api().log("model", object(), Type.MODEL)
tensorboard.add_scalar(hostile, hostile, hostile)
tensorboard.add_scalars("key", hostile)
wandb.log(hostile)
wandb.log(nested)
mlflow.log_param(hostile, hostile)
mlflow.log_text("text", hostile)
tensorboard.add_scalar("key", 1.0, 1)
print(left_to_flare)
"""


def test_no_call_raises_whatever_it_is_given(spool: Path) -> None:
    assert _run(API + HOSTILE, _announced(spool)).strip() == "[]"
    assert _metrics(spool) == [({"key": 1.0}, 1)]
    (count,) = SpoolReader(spool, "server").counts().values()
    assert (count.logged, sum(count.dropped.values())) == (10, 9)


@pytest.mark.long
def test_a_signal_handler_that_raises_in_a_call_reaches_the_script(spool: Path) -> None:
    source = """
    import signal

    class Slow:
        def __float__(self):
            signal.raise_signal(signal.SIGALRM)
            return 1.0

    def handler(*args):
        raise TimeoutError("the script's own time limit")

    signal.signal(signal.SIGALRM, handler)
    try:
        scalar("a", Slow())
    except TimeoutError as e:
        print(e)
    """

    assert _run(API + textwrap.dedent(source), _announced(spool)).strip() == "the script's own time limit"


def test_a_second_copy_of_trackhub_in_the_path_changes_nothing(spool: Path, tmp_path: Path) -> None:
    """As where a trainer runs a job of its own: both copies watch the same imports."""
    shutil.copytree(Path(trackhub.__file__).parent, tmp_path / "trackhub")
    other = tmp_path / "trackhub" / "flare" / "trainer" / "startup"

    assert _run(API + "scalar('a', 1.0)\nprint(left_to_flare)", _announced(spool, other)).strip() == "[]"
    assert _metrics(spool) == [({"a": 1.0}, None)]


@pytest.mark.long
def test_exec_reload_and_the_end_of_the_process_lose_no_call(spool: Path) -> None:
    """The script begins another one in its place, which loads FLARE's module anew, and logs when it ends."""
    second = API + (
        "import atexit, importlib, nvflare.client.cell.api as loaded\n"
        "atexit.register(lambda: (scalar('end', 3.0), print(left_to_flare)))\n"
        "scalar('a', 1.0)\n"
        "CellClientAPI = importlib.reload(loaded).CellClientAPI\n"
        "scalar('reloaded', 2.0)\n"
    )
    out = _run(f"import os, sys\nos.execv(sys.executable, [sys.executable, '-c', {second!r}])", _announced(spool))

    assert out.strip() == "[]"
    assert _metrics(spool) == [({"a": 1.0}, None), ({"reloaded": 2.0}, None), ({"end": 3.0}, None)]


METRICS_SENDER = """
import json
from nvflare.apis.analytix import AnalyticsDataType as Type
from nvflare.app_common.metrics_exchange.metrics_sender import MetricsSender


class Cell:
    def send_request(self, *args):
        return None


def sender(rank="0", closed=False, cell="site-1.job-1"):
    made = MetricsSender({"schema_version": 1, "connect_url": "tcp://x", "receiver_fqcn": cell,
                          "client_fqcn": cell + ".metrics"})
    made.rank, made.closed, made.initialized, made.cell = rank, closed, True, Cell()
    return made


print(json.dumps([
    sender().add("a", 1.0, Type.SCALAR, global_step=2),
    sender(rank="1").add("rank", 1.0, Type.SCALAR),
    sender(closed=True).add("closed", 1.0, Type.SCALAR),
    sender(cell="site-1.job-2").add("other", 1.0, Type.SCALAR),
]))
"""


def test_the_sender_of_a_process_without_the_client_api_is_taken_from_rank_0(spool: Path) -> None:
    out = json.loads(_run(METRICS_SENDER, _announced(spool)))

    assert out == [True, False, False, False]
    assert _metrics(spool) == [({"a": 1.0}, 2)]


def test_an_old_python_runs_the_file_too(tmp_path: Path) -> None:
    source = (STARTUP / "sitecustomize.py").read_text()

    ast.parse(source, feature_version=(3, 4))
    assert 'f"' not in source
    assert "->" not in source
