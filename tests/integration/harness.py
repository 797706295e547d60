# SPDX-License-Identifier: Apache-2.0
"""Runs real FLARE jobs for tests, each in a process of its own, and reads what they left.

A test gives the training code as text. `Job` puts it into a minimal FedAvg job over numpy arrays. Such a job takes
some 12 s, and almost all of it is FLARE's own waiting. The trainer notes what it logs, and when, in a file that no
part of trackhub touches. Tests compare this file with what the backends hold.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trackhub.job_and_run_info import JobInfo

__all__ = [
    "TRAINER",
    "Fact",
    "Job",
    "JobResult",
    "Point",
    "flare_environment",
    "install_plugin",
    "processes_with",
    "read_jsonl",
    "read_tensorboard",
    "run_script",
    "simulate",
]

SIMULATOR_MEND = Path(__file__).parents[1] / "support" / "simulator_mend"
TRAINER = '''
import json, os, time
import nvflare.client as flare

flare.init()
SITE = flare.get_site_name()
OUT = os.environ["TRACKHUB_TEST_OUT"].replace("{job}", flare.get_job_id())
os.makedirs(OUT, exist_ok=True)
_facts = open(os.path.join(OUT, SITE + ".facts"), "a", buffering=1)


def fact(call, values, step=None):
    """Make a log call, and note what it logged and the clock before and after it."""
    before = time.time()
    call()
    after = time.time()
    _facts.write("".join(json.dumps([key, value, step, before, after]) + "\\n" for key, value in values.items()))


def rounds(train):
    """Train in each round that the server starts."""
    while flare.is_running():
        model = flare.receive()
        if model is None:
            break
        train(model.current_round)
        params = {name: array + 1 for name, array in model.params.items()}
        flare.send(flare.FLModel(params=params, params_type="FULL"))
'''
"""The beginning of every training script. It defines ``fact`` and ``rounds``."""

_JOB = """
import json, sys
from pathlib import Path
from nvflare.app_common.np.recipes.fedavg import NumpyFedAvgRecipe
from nvflare.recipe import SimEnv
from nvflare.recipe.utils import set_per_site_config
from trackhub.flare.recipe import add_tracking


def run_fed_job(here, config):
    # The same training as a FedJob that no recipe has made.
    from nvflare.app_common.np.np_model_persistor import NPModelPersistor
    from nvflare.app_common.workflows.fedavg import FedAvg
    from nvflare.client.config import ExchangeFormat
    from nvflare.job_config.api import FedJob
    from nvflare.job_config.script_runner import FrameworkType, ScriptRunner

    job = FedJob(name="job", min_clients=config["n_clients"])
    job.to_server(NPModelPersistor(model=config["model"]), id="persistor")
    job.to_server(FedAvg(num_clients=config["n_clients"], num_rounds=config["rounds"], persistor_id="persistor"))
    script = str(here / "client.py")
    job.to_clients(
        ScriptRunner(script, launch_external_process=config["external"], framework=FrameworkType.NUMPY)
    )
    add_tracking(job, **config["tracking"])
    job.simulator_run(str(here / "workspace" / "job"), n_clients=config["n_clients"], threads=config["threads"])


if __name__ == "__main__":
    here = Path(__file__).parent
    config = json.loads((here / "config.json").read_text())
    if config["way"] == "fed_job":
        run_fed_job(here, config)
        sys.exit()
    sites = [f"site-{i + 1}" for i in range(config["n_clients"])]
    recipe = NumpyFedAvgRecipe(
        name="job", model=config["model"], min_clients=config["n_clients"], num_rounds=config["rounds"],
        train_script=str(here / "client.py"), launch_external_process=config["external"],
    )
    if config["own_apps"]:
        set_per_site_config(recipe, {site: {} for site in sites})
    if config["tracking"] is not None and config["way"] == "recipe":
        add_tracking(recipe, **config["tracking"])
    job = recipe._job
@@more@@
    if sys.argv[1:] == ["write"]:
        recipe.export(str(here / "export"))
    else:
        clients = {"clients": sites} if config["own_apps"] else {"num_clients": len(sites)}
        recipe.execute(SimEnv(**clients, num_threads=config["threads"], workspace_root=str(here / "workspace")))
"""


@dataclass(frozen=True)
class Fact:
    """One log call as the trainer noted it, with the clock before and after the call."""

    key: str
    value: Any
    step: int | None
    before: float
    after: float


@dataclass(frozen=True)
class Point:
    """One scalar as a reader without code of trackhub finds it in a backend's files."""

    key: str
    value: float
    step: int | None
    time: float
    round: int | None = None


@dataclass
class Job:
    """A FedAvg job in FLARE's simulator.

    Attributes:
        folder: where the job is written and run. Each job needs a folder of its own.
        trainer: the source that follows ``TRAINER`` in the training script.
        tracking: arguments of ``add_tracking``; None for a job without tracking. Without ``context``, there is none:
            tests count what the script logs.
        way: how the job is made: as a ``recipe``; as a ``fed_job`` without a recipe, which takes no ``more``; or as
            ``json``, to which tracking is added by hand.
        external: whether the trainers are processes of their own.
        n_clients, rounds: how many clients and rounds.
        more: source that runs before the job starts. It can use ``recipe`` and ``job``.
        modules: further modules beside the job, name to source.
        env: further environment variables.
        threads: the simulator's threads; by default one for each client.
        own_apps: whether every client has an app of its own.
        model: the first global model, a nested list.
    """

    folder: Path
    trainer: str
    tracking: dict[str, Any] | None = None
    way: Literal["recipe", "fed_job", "json"] = "recipe"
    external: bool = False
    n_clients: int = 2
    rounds: int = 2
    more: str = ""
    modules: dict[str, str] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    own_apps: bool = False
    model: list[Any] = field(default_factory=lambda: [[0.0, 0.0], [0.0, 0.0]])

    def run(self, timeout_s: float = 240) -> JobResult:
        """Run the job in the simulator, and wait for its end."""
        if self.way == "json":
            job = self.export()
            self._add_tracking_by_hand(job / "app" / "config")
            return simulate(
                job, self.folder / "run", n_clients=self.n_clients, name=self._name(), env=self.env, timeout_s=timeout_s
            )
        out = self.folder / "out"
        rc, log = self._run_script([], out, timeout_s)
        return JobResult(rc, log, self.folder / "workspace" / "job", out, self._name())

    def export(self) -> Path:
        """Write the job as a folder that FLARE accepts, and return the folder."""
        rc, log = self._run_script(["write"], self.folder / "out", 60)
        assert rc == 0, log
        return self.folder / "export" / "job"

    def _name(self) -> str:
        return (self.tracking or {}).get("name") or "job"

    def _tracking(self) -> dict[str, Any] | None:
        return None if self.tracking is None else {"context": False} | self.tracking

    def _add_tracking_by_hand(self, config: Path) -> None:
        """Put tracking into a job's JSON files, as `tracking_components` tells a person to do."""
        from trackhub.flare.recipe import tracking_components

        for file, components in tracking_components(**(self._tracking() or {})).items():
            content = json.loads((config / file).read_text())
            content["components"] += components
            for executor in content.get("executors", []) if self.external else []:  # only these have a timeout
                executor["executor"]["args"]["shutdown_timeout"] = 30.0
            (config / file).write_text(json.dumps(content))

    def _run_script(self, args: list[str], out: Path, timeout_s: float) -> tuple[int, str]:
        config = {"n_clients": self.n_clients, "rounds": self.rounds, "external": self.external,
                  "tracking": self._tracking(), "threads": self.threads, "own_apps": self.own_apps,
                  "model": self.model, "way": self.way}  # fmt: skip
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(config))
        (self.folder / "client.py").write_text(TRAINER + textwrap.dedent(self.trainer))
        (self.folder / "job.py").write_text(
            _JOB.replace("@@more@@", textwrap.indent(textwrap.dedent(self.more), "    "))
        )
        for name, source in self.modules.items():
            (self.folder / f"{name}.py").write_text(textwrap.dedent(source))
        return run_script(["job.py", *args], self.folder, out, self.env, timeout_s)


def simulate(
    job: Path,
    folder: Path,
    *,
    n_clients: int,
    name: str = "job",
    env: Mapping[str, str] | None = None,
    timeout_s: float = 240,
) -> JobResult:
    """Run a job that ``Job.export`` wrote in the simulator. It can run again, each time in a new folder.

    Args:
        job: the exported job.
        folder: where it runs.
        n_clients: how many clients.
        name: the job's name in trackhub.
        env: further environment variables.
        timeout_s: kill the job and fail after this time.
    """
    out, workspace, number = folder / "out", folder / "workspace", str(n_clients)
    module = "nvflare.private.fed.app.simulator.simulator"  # as FedJob.simulator_run starts it
    command = ["-m", module, str(job), "-w", str(workspace), "-n", number, "-t", number]
    rc, log = run_script(command, folder, out, env or {}, timeout_s)
    return JobResult(rc, log, workspace, out, name)


def run_script(
    args: list[str], folder: Path, out: Path, env: Mapping[str, str], timeout_s: float, *, python: str = sys.executable
) -> tuple[int, str]:
    """Run Python in this folder and wait for its end. Return its exit status and what it printed.

    Args:
        args: what Python runs.
        folder: where it runs.
        out: the folder for what the trainers note.
        env: further environment variables.
        timeout_s: kill the job and fail after this time.
        python: the interpreter, by default that of the tests.
    """
    out.mkdir(parents=True)
    log = folder / "log.txt"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [python, *args], cwd=folder, env={**flare_environment(env, python), "TRACKHUB_TEST_OUT": str(out)},
            stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            rc = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            # Clients and trainers are in process groups of their own: killing the group does not reach them.
            for pid in processes_with(f"TRACKHUB_TEST_OUT={out}\0".encode()):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()
            tail = log.read_text(errors="replace")[-6000:]
            raise AssertionError(f"the job did not end within {timeout_s} s; its log ends:\n{tail}") from None
    return rc, log.read_text(errors="replace")


def processes_with(mark: bytes) -> Iterator[int]:
    """Yield the processes with this text in their environment. All processes of a job have its folder there."""
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if mark in Path("/proc", name, "environ").read_bytes():
                yield int(name)


def flare_environment(env: Mapping[str, str] = MappingProxyType({}), python: str = sys.executable) -> dict[str, str]:
    """Return the environment of a FLARE job's processes.

    ``python3``, as FLARE starts it, is the interpreter of the tests, and a race of FLARE's simulator is mended.

    Args:
        env: further variables, which win. Of ``PYTHONPATH``, their entries come first.
        python: the interpreter.
    """
    path = os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])
    python_path = [env.get("PYTHONPATH"), str(SIMULATOR_MEND), os.environ.get("PYTHONPATH")]
    own = {"PATH": path, "PYTHONUNBUFFERED": "1"}
    return {**os.environ, **own, **env, "PYTHONPATH": os.pathsep.join(filter(None, python_path))}


def without_own_programs(env: Mapping[str, str]) -> dict[str, str]:
    """Return an environment whose PATH lacks the programs of this Python's environment, which nobody activated."""
    own = Path(sys.executable).parent
    path = [folder for folder in env["PATH"].split(os.pathsep) if Path(folder) != own]
    return {**env, "PATH": os.pathsep.join(path)}


@dataclass(frozen=True)
class JobResult:
    """What a job left: its exit status, its log, its workspace, the trainers' notes, and its name in trackhub."""

    rc: int
    log: str
    workspace: Path
    out: Path
    name: str = "job"

    def run_dir(self, site: str) -> Path:
        """Return the job's run folder at this site."""
        return self.workspace / site / "simulate_job"

    @property
    def job(self) -> JobInfo:
        """The job as backends know it: its id in trackhub, and its name."""
        return JobInfo((self.workspace / ".trackhub" / "execution").read_text(), self.name)

    def report(self, receiver: str) -> dict[str, Any]:
        """Return the delivery report of the receiver at this site."""
        report: dict[str, Any] = json.loads((self.run_dir(receiver) / "trackhub" / "delivery.json").read_text())
        return report

    def facts(self, site: str) -> list[Fact]:
        """Return what the trainer of this site noted, in order."""
        return [Fact(*json.loads(line)) for line in (self.out / f"{site}.facts").read_text().splitlines()]

    def jsonl(self, receiver: str, site: str) -> list[dict[str, Any]]:
        """Return this site's records in the receiver's ``jsonl`` files, without the line that ends the run."""
        return [line for line in read_jsonl(self.jsonl_file(receiver, site)) if line["kind"] != "end"]

    def jsonl_file(self, receiver: str, site: str) -> Path:
        """Return the receiver's ``jsonl`` file of this site."""
        return self.run_dir(receiver) / "jsonl" / f"{self.name}-{self.job.id}" / f"{site}.jsonl"

    def jsonl_points(self, receiver: str, site: str) -> list[Point]:
        """Return this site's scalars in the receiver's ``jsonl`` files, in order."""
        return [
            Point(key, value, line.get("step"), line["time"], line.get("round"))
            for line in self.jsonl(receiver, site)
            if line["kind"] == "metrics"
            for key, value in line["values"].items()
        ]

    def tensorboard_points(self, receiver: str, site: str) -> list[Point]:
        """Return this site's scalars in the receiver's event files. The scalars of one key keep their order."""
        return read_tensorboard(self.run_dir(receiver) / "tensorboard" / f"{self.name}-{self.job.id}" / site)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_tensorboard(folder: Path) -> list[Point]:
    """Return a run's scalars, read with TensorBoard's own reader and without its sampling."""
    reader = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    reader.Reload()
    return [
        Point(tag, event.value, event.step, event.wall_time)
        for tag in reader.Tags()["scalars"]
        for event in reader.Scalars(tag)
    ]


def install_plugin(site: Path, distribution: str, points: dict[str, str], modules: dict[str, str]) -> dict[str, str]:
    """Write a distribution with backends as pip would install it.

    Args:
        site: the folder that takes the place of ``site-packages``.
        distribution: its name.
        points: backend to ``module:class``.
        modules: module to source.

    Returns:
        The environment variable that makes Python find it.
    """
    info = site / f"{distribution.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[trackhub.backends]", *lines, ""]))
    for name, source in modules.items():
        (site / f"{name}.py").write_text(textwrap.dedent(source))
    return {"PYTHONPATH": str(site)}


def files_with(folder: Path, *needles: bytes) -> Iterator[Path]:
    """Yield the files below a folder that contain any of these bytes."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if any(needle in content for needle in needles):
                yield path
