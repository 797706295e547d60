# SPDX-License-Identifier: Apache-2.0
"""Runs the commands that trackhub prints, as they are printed, and reads the curves from what they open."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import socket
import subprocess
import sys
import termios
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tests.integration.harness import read_jsonl, without_own_programs
from tests.support.wandb_emulator import Emulator

__all__ = ["Curve", "Shell", "charts_of", "openings"]

Curve = list[tuple[int, float]]
"""The steps and values of one key at one site, sorted."""

_WAIT_S = 300  # MLflow's server alone takes more than a minute to start on a busy machine
_URL = re.compile(r"http://(?:127\.0\.0\.1|localhost|\[::1\]):[1-9]\d*")


def charts_of(page: Path, key: str) -> list[dict[str, Any]]:
    """Return the line charts of a key on a page of ``trackhub report``, as the page's own data."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return [chart for chart in json.loads(found[1])["charts"] if chart["key"] == key and chart["type"] == "lines"]


def openings(screen: str) -> list[tuple[str, str]]:
    """Return the lines below "Open the results", each as the backend's name and the command or path."""
    found = []
    for part in screen.split("Open the results\n")[1:]:
        for line in part.splitlines():
            match = re.fullmatch(r" *([\w ]+)(?: \(.+?\))?: (.+)", line)
            if match is None or match[1] == "http":
                break
            found.append((match[1], match[2]))
    return list(dict.fromkeys(found))


class Shell:
    """A shell of somebody who looks at a job: in a folder of its own, with a login at the W&B server.

    No environment is activated in it, unless ``activate`` is called.
    """

    def __init__(self, folder: Path, wandb: Emulator) -> None:
        """Use the folder, which may not exist yet."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._wandb = wandb
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        login = {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": wandb.state.api_key}
        # MLflow's own setting, in place of 5000, which another test may use at the same time.
        own = {**login, "MLFLOW_PORT": str(port), "PYTHONUNBUFFERED": "1"}
        self._environment = without_own_programs({**os.environ, **own})

    def activate(self) -> None:
        """Activate the environment of this Python, as the harness does for the processes of a job."""
        path = [str(Path(sys.executable).parent), self._environment["PATH"]]
        self._environment["PATH"] = os.pathsep.join(path)

    def run(self, command: str) -> str:
        """Run a command line to its end, and return what it printed."""
        done = subprocess.run(
            command, shell=True, cwd=self._folder, env=self._environment, text=True, timeout=_WAIT_S, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}\n{done.stdout}"
        return done.stdout

    def curves(self, backend: str, opening: str, key: str) -> dict[str, Curve]:
        """Open the results of a backend as its line says, and return the curve of a key at each site that it shows."""
        if backend == "jsonl":
            return {Path(opening).stem: _of_lines(read_jsonl(Path(opening)), key)}
        if backend == "all together":
            self.run(opening)
            return _of_page(self._folder / "report.html", key)
        if "wandb leet " in opening:
            return self._seen_on_a_terminal(opening, key)
        if backend == "wandb":
            before = set(self._wandb.state.runs)
            self.run(opening)
            return _of_emulator(self._wandb, set(self._wandb.state.runs) - before, key)
        read = {"tensorboard": _of_tensorboard, "mlflow": _of_mlflow}[backend]
        with self._opened(opening) as url:
            return _waited_for(lambda: read(url, key))

    def _seen_on_a_terminal(self, command: str, key: str) -> dict[str, Curve]:
        """Start a program that draws on a terminal, and wait until it shows the key. It shows no numbers to read."""
        ours, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (50, 160))
        process = subprocess.Popen(
            command, shell=True, cwd=self._folder, env={**self._environment, "TERM": "xterm-256color"},
            stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
        )  # fmt: skip
        os.close(theirs)
        shown, deadline = b"", time.monotonic() + _WAIT_S
        try:
            while key.encode() not in shown:
                assert time.monotonic() < deadline, f"{command}\n{shown[-3000:]!r}"
                if select.select([ours], [], [], 1.0)[0]:
                    shown += os.read(ours, 65536)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(ours)
        return {"a terminal": []}

    @contextlib.contextmanager
    def _opened(self, command: str) -> Iterator[str]:
        """Start a server by its command line, and yield the address that it prints."""
        log = self._folder / f"server-{time.monotonic_ns()}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command, shell=True, cwd=self._folder, env=self._environment, stdin=subprocess.DEVNULL,
                stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            deadline = time.monotonic() + _WAIT_S
            while not (said := _URL.findall(log.read_text(errors="replace"))):
                assert process.poll() is None, f"{command}\n{log.read_text(errors='replace')}"
                assert time.monotonic() < deadline, f"{command}\n{log.read_text(errors='replace')}"
                time.sleep(0.2)
            yield said[-1]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _waited_for(read: Callable[[], dict[str, Curve]]) -> dict[str, Curve]:
    """Return what a server shows once it shows the same twice: it may still be loading."""
    deadline = time.monotonic() + _WAIT_S
    before: dict[str, Curve] = {}
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            found = read()
            if found and found == before:
                return found
            before = found
        time.sleep(1.0)
    raise AssertionError(f"the server shows no curves within {_WAIT_S} s; last: {before}")


def _ask(url: str, question: str, body: Mapping[str, Any] | None = None, **words: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    query = f"?{urllib.parse.urlencode(words)}" if words else ""
    request = urllib.request.Request(f"{url}{question}{query}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.loads(reply.read())


def _of_tensorboard(url: str, key: str) -> dict[str, Curve]:
    runs = [run for run, tags in _ask(url, "/data/plugin/scalars/tags").items() if key in tags]
    points = {run: _ask(url, "/data/plugin/scalars/scalars", run=run, tag=key) for run in runs}
    return {run.rpartition("/")[2]: sorted((step, value) for _, step, value in found) for run, found in points.items()}


def _of_mlflow(url: str, key: str) -> dict[str, Curve]:
    api = f"{url}/api/2.0/mlflow"
    experiments = [e["experiment_id"] for e in _ask(api, "/experiments/search", max_results="10")["experiments"]]
    found = {}
    for run in _ask(api, "/runs/search", {"experiment_ids": experiments})["runs"]:
        tags = {tag["key"]: tag["value"] for tag in run["data"]["tags"]}
        run_id = run["info"]["run_id"]
        history = _ask(api, "/metrics/get-history", run_id=run_id, metric_key=key).get("metrics", [])
        if history:
            found[tags["site"]] = sorted((int(point.get("step", 0)), point["value"]) for point in history)
    return found


def _of_emulator(server: Emulator, runs: set[str], key: str) -> dict[str, Curve]:
    with server.state.lock:
        held = [server.state.runs[run] for run in runs]
        rows = {run.fields["displayName"]: [json.loads(row) for row in run.rows] for run in held}
    found = {
        name.rpartition("/")[2]: sorted((row["step"], row[key]) for row in own if key in row)
        for name, own in rows.items()
    }
    return {name: curve for name, curve in found.items() if curve}


def _of_lines(lines: list[dict[str, Any]], key: str) -> Curve:
    return sorted((line["step"], line["values"][key]) for line in lines if key in line.get("values", {}))


def _of_page(page: Path, key: str) -> dict[str, Curve]:
    lines = charts_of(page, key)[0]["lines"]
    return {line["site"]: sorted(zip(line["x"], line["y"], strict=True)) for line in lines}
