# SPDX-License-Identifier: Apache-2.0
"""Forms in which a trainer's Python may start: flags, launchers, start methods, and a ``sitecustomize`` of the user's.

Each process is tracked, and finds its own path and ``sitecustomize`` as without tracking.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest

import trackhub
from tests.integration.test_trainer_startup import API, OWN, STARTUP, _announced, _metrics, _python, _run
from trackhub.spool.layout import SpoolInfo, create_spool

pytestmark = pytest.mark.long

ONE_CALL = API + "scalar('a', 1.0)\nprint(left_to_flare)\n"


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    folder = tmp_path / "spool"
    create_spool(folder, SpoolInfo("site-1", "job", ("server",)))
    return folder


def _start(command: list[str], env: dict[str, str], script: str = "") -> list[str]:
    """Start a command with a script on its standard input. Return the words that it printed."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("TRACKHUB", "PYTHON"))}
    done = subprocess.run(command, env={**clean, **env}, input=script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@pytest.mark.parametrize("flags", [["-P"], ["-OO"], ["-B"], ["-bb"], ["-u"], ["-X", "dev"]], ids=str)
def test_a_trainer_is_tracked_whatever_its_flags_are(spool: Path, flags: list[str]) -> None:
    assert _run(ONE_CALL, _announced(spool), *flags).split() == ["[]"]
    assert _metrics(spool) == [({"a": 1.0}, None)]


def test_a_script_from_standard_input_and_a_module_are_tracked(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "as_module.py").write_text(ONE_CALL)
    env = _announced(spool, tmp_path)

    assert _start([sys.executable, "-"], env, ONE_CALL) == ["[]"]
    assert _start([sys.executable, "-m", "as_module"], env) == ["[]"]
    assert _metrics(spool) == [({"a": 1.0}, None)] * 2


FORMS = {
    "runpy": "import runpy\nrunpy.run_path({one_call!r}, run_name='__main__')",
    "replaces itself": "import os, sys\nos.execv(sys.executable, [sys.executable, {one_call!r}])",
    "closes all descriptors": "import os\nos.closerange(3, 4096)\n" + ONE_CALL,
    "loads FLARE again": API
    + "import importlib\nfrom nvflare.client.cell import api as module\nimportlib.reload(module)\n"
    + "CellClientAPI = module.CellClientAPI\nscalar('a', 1.0)\nprint(left_to_flare)",
    "logs when it ends": API + "import atexit\natexit.register(lambda: (scalar('a', 1.0), print(left_to_flare)))",
    "has an import hook of its own": "import sys\nclass Hook:\n    def find_spec(self, *_):\n        return None\n"
    + "sys.meta_path.insert(0, Hook())\n"
    + ONE_CALL,
    "logs in a pool of processes": API
    + "from concurrent.futures import ProcessPoolExecutor\ndef work():\n    scalar('a', 1.0)\n"
    + "    return left_to_flare\nif __name__ == '__main__':\n    with ProcessPoolExecutor(1) as pool:\n"
    + "        print(pool.submit(work).result())",
}
"""What a script may do, and its source. ``{one_call}`` is the path of a script that makes one call."""


@pytest.mark.parametrize("form", FORMS)
def test_a_script_is_tracked_whatever_it_does_before_it_logs(spool: Path, tmp_path: Path, form: str) -> None:
    (tmp_path / "one_call.py").write_text(ONE_CALL)
    source = FORMS[form].replace("{one_call!r}", repr(str(tmp_path / "one_call.py")))
    (tmp_path / "script.py").write_text(source)

    assert _start([sys.executable, str(tmp_path / "script.py")], _announced(spool)) == ["[]"]
    assert _metrics(spool) == [({"a": 1.0}, None)]


def test_a_script_in_a_zip_file_and_one_without_a_safe_path_are_tracked(spool: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "app.pyz", "w") as file:
        file.writestr("__main__.py", ONE_CALL)
    env = _announced(spool) | {"PYTHONSTARTUP": "/not/there"}

    assert _start([sys.executable, str(tmp_path / "app.pyz")], env) == ["[]"]
    assert _start([sys.executable, str(tmp_path / "app.pyz")], env | {"PYTHONSAFEPATH": "1"}) == ["[]"]
    assert _metrics(spool) == [({"a": 1.0}, None)] * 2


@pytest.mark.parametrize("wrapper", ["unset PYTHONPATH\nexec", "exec env -u PYTHONPATH", "exec env -i"])
def test_a_wrapper_that_takes_the_path_away_leaves_the_calls_to_flare(
    spool: Path, tmp_path: Path, wrapper: str
) -> None:
    """As scripts do that activate an environment."""
    (tmp_path / "script.py").write_text(ONE_CALL)
    (tmp_path / "wrapper.sh").write_text(f"{wrapper} {sys.executable} {tmp_path / 'script.py'}\n")

    assert _start(["/bin/sh", str(tmp_path / "wrapper.sh")], _announced(spool)) == ["['a']"]
    assert _metrics(spool) == []


def test_each_rank_of_torchrun_is_tracked(spool: Path, tmp_path: Path) -> None:
    rank = "rank = os.environ['RANK']\nfor i in range(50):\n    scalar('rank/' + rank, i / 7, i, rank=rank)\n"
    (tmp_path / "script.py").write_text(API + rank + "print(left_to_flare)")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node", "2", "--master-port", "29614"]

    assert _start([*torchrun, str(tmp_path / "script.py")], _announced(spool)) == ["[]", "[]"]
    records = _metrics(spool)
    for n in (0, 1):
        assert [r for r in records if f"rank/{n}" in r[0]] == [({f"rank/{n}": i / 7}, i) for i in range(50)]


def test_workers_of_a_fork_server_are_tracked(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(API + "\ndef work(n):\n    scalar('worker', 1.0, n, rank=str(n))\n")
    (tmp_path / "main.py").write_text(
        textwrap.dedent("""
        import multiprocessing
        from work import work

        if __name__ == "__main__":
            context = multiprocessing.get_context("forkserver")
            workers = [context.Process(target=work, args=(n,)) for n in range(2)]
            [worker.start() for worker in workers]
            [worker.join() for worker in workers]
        """)
    )

    _start([sys.executable, str(tmp_path / "main.py")], _announced(spool, tmp_path))

    assert sorted(_metrics(spool), key=str) == [({"worker": 1.0}, 0), ({"worker": 1.0}, 1)]


@pytest.mark.parametrize("form", ["a package", "in a zip file", "imports FLARE", "chains to another one"])
def test_a_sitecustomize_of_the_users_may_have_any_form(spool: Path, tmp_path: Path, form: str) -> None:
    path = [tmp_path / "first", tmp_path / "second"]
    for folder in path:
        folder.mkdir()
    if form == "a package":
        (path[0] / "sitecustomize").mkdir()
        (path[0] / "sitecustomize" / "__init__.py").write_text(OWN)
    elif form == "in a zip file":
        path[0] = tmp_path / "own.zip"
        with zipfile.ZipFile(path[0], "w") as file:
            file.writestr("sitecustomize.py", OWN)
    elif form == "imports FLARE":
        (path[0] / "sitecustomize.py").write_text(OWN + "import nvflare.client.tracking, nvflare.client.cell.api\n")
    else:  # as auto-instrumentation does
        chain = "import os\nsys.path.remove(os.path.dirname(__file__))\ndel sys.modules['sitecustomize']\n"
        (path[0] / "sitecustomize.py").write_text(OWN + chain + "import sitecustomize\n")
        (path[1] / "sitecustomize.py").write_text(OWN)
    source = "import sys\nprint(sys.own_was_run, sys.modules['sitecustomize'].__file__, sys.path)"

    tracked, plain = _python(source, _announced(spool, *path)), _python(source, {"PYTHONPATH": _joined(path)})

    assert tracked.stdout == plain.stdout != ""
    assert _run(ONE_CALL, _announced(spool, *path)).split() == ["[]"]
    assert _metrics(spool) == [({"a": 1.0}, None)]


def _joined(path: list[Path]) -> str:
    return os.pathsep.join(map(str, path))


@pytest.mark.parametrize("version", [f"3.{minor}" for minor in range(6, 16)])
def test_another_python_is_as_without_tracking(spool: Path, tmp_path: Path, version: str) -> None:
    """What is compiled for the client's Python, such as msgspec, cannot be imported there."""
    python = shutil.which(f"python{version}")
    is_ours = version == "{}.{}".format(*sys.version_info[:2])
    if python is None or is_ours or subprocess.run([python, "--version"], capture_output=True).returncode != 0:
        pytest.skip(f"there is no other Python {version} here")
    api = tmp_path / "nvflare" / "client" / "cell" / "api.py"
    api.parent.mkdir(parents=True)
    for package in api.parents[:3]:
        (package / "__init__.py").touch()
    api.write_text("class CellClientAPI:\n    def log(self, *args):\n        print('FLARE', *args)\n")
    (tmp_path / "sitecustomize.py").write_text(OWN)
    source = "import sys\nfrom nvflare.client.cell.api import CellClientAPI\nCellClientAPI().log(1)\n"
    source += "print(sys.own_was_run, sys.path)\n"

    path = [tmp_path, *(Path(entry) for entry in sys.path if entry.endswith("site-packages"))]
    tracked = _python(source, _announced(spool, *path), python=python)
    plain = _python(source, {"PYTHONPATH": _joined(path)}, python=python)

    assert (tracked.returncode, tracked.stdout) == (plain.returncode, plain.stdout)
    assert tracked.stdout.startswith("FLARE 1\n1 ")
    assert _metrics(spool) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a disk that is read-only")
def test_a_trackhub_on_a_disk_that_is_read_only_tracks_as_ever(spool: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", disk], check=True)
    try:
        package = shutil.copytree(
            Path(trackhub.__file__).parent, disk / "trackhub", ignore=shutil.ignore_patterns("__pycache__")
        )
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        startup = package / STARTUP.relative_to(Path(trackhub.__file__).parent)
        env = {**_announced(spool), "PYTHONPATH": _joined([startup, disk])}

        assert _run(ONE_CALL, env).split() == ["[]"]
    finally:
        subprocess.run(["umount", disk], check=True)
    assert _metrics(spool) == [({"a": 1.0}, None)]
