# SPDX-License-Identifier: Apache-2.0
"""A federated job with real gradient steps in FLARE's simulator, under faults of backends or of the receiver.

The fault suite compares its model with that of the same job without tracking; the benchmark compares the time of its
steps. The training draws from the global random generators of Python and NumPy: if tracking used these, the model
would change.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.integration.harness import Job, JobResult, install_plugin

__all__ = [
    "BACKEND_FAULTS",
    "HEALTHY",
    "LOGGED",
    "NONE",
    "RECEIVER_FAULTS",
    "ROUNDS",
    "Fault",
    "all_at_once",
    "model",
    "steps_s",
    "train",
]

ROUNDS, STEPS = 2, 150
LOGGED = ROUNDS * STEPS
"""Records of each site, unless a job has other steps."""

_FEATURES, _CLASSES, _BATCH = 512, 32, 256
_TRAINER = f"""
import array, random
import numpy as np

log = lambda values, step: None
if os.environ["TRACKHUB_TEST_TRACKED"] == "yes":
    import trackhub
    log = trackhub.Writer().log

random.seed(SITE)
np.random.seed(sum(SITE.encode()))
truth = np.random.default_rng(0).normal(size=({_FEATURES}, {_CLASSES}))
outage, steps = os.environ["TRACKHUB_TEST_OUTAGE"], int(os.environ["TRACKHUB_TEST_STEPS"])
durations = array.array("d")


def gradient_step(weights, step):
    x = np.random.normal(size=({_BATCH}, {_FEATURES}))
    x[:, random.randrange({_FEATURES})] = 0.0
    scores = x @ weights
    scores = np.exp(scores - scores.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    labels = (x @ truth).argmax(axis=1)
    loss = -np.log(scores[np.arange({_BATCH}), labels] + 1e-12).mean()
    scores[np.arange({_BATCH}), labels] -= 1.0
    log({{"train/loss": float(loss)}}, step)
    return weights - 0.1 / {_BATCH} * (x.T @ scores)


while flare.is_running():
    received = flare.receive()
    if received is None:
        break
    n = received.current_round
    ((name, weights),) = received.params.items()
    for i in range(steps):
        if SITE == "site-1" and n == 0 and i == steps // 3:
            open(outage, "w").close()
        if SITE == "site-1" and n == 1 and i == steps // 3:
            os.remove(outage)
        before = time.perf_counter()
        weights = gradient_step(weights, steps * n + i)
        durations.append(time.perf_counter() - before)
    flare.send(flare.FLModel(params={{name: weights}}, params_type="FULL"))
with open(os.path.join(OUT, SITE + ".steps"), "wb") as file:
    durations.tofile(file)
"""

_RECEIVER = """
from trackhub.flare.flare_internals import reference_package
from trackhub.flare.receiver_widget import TrackhubReceiver
from trackhub.flare.sender_widget import TrackhubSender
from tests.faults.bad_channel import BadChannelSender
limits = {limits}
reference_package(job, "trackhub")
reference_package(job, "tests")
job.to_server(TrackhubReceiver({{"jsonl": {{}}}}, limits=limits, state_dir={state_dir!r}), id="trackhub_receiver")
recipe._add_to_client_apps({sender}, id="trackhub_sender")
"""
_LIMITS = {"deadline_s": 2, "sites_s": 4, "barrier_s": 1, "request_s": 1, "silence_s": 3, "keepalive_s": 1}


@dataclass(frozen=True)
class Fault:
    """A fault of a job.

    Attributes:
        name: the fault in a few words.
        backends: faulty backends on the server, with their options. A healthy ``jsonl`` always runs beside them. The
            text ``{outage}`` stands for a file that exists during an outage: from a third of the first round to a third
            of the second.
        servers: backends that talk to a server, with the mode of `tests.faults.failing_server`. None for a server that
            does not run.
        sender: source of the sender that clients get in place of trackhub's own.
        receiver_folder: where the receiver keeps its journal.
    """

    name: str
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    servers: Mapping[str, str | None] = field(default_factory=dict)
    sender: str = ""
    receiver_folder: str | None = None


NONE = Fault("no tracking")
HEALTHY = Fault("no fault")
BACKEND_FAULTS = [
    Fault("down at the start and later", servers={"http_late": None}),
    Fault("down in the middle", {"idempotent": {"down_while": "{outage}"}}),
    Fault("429 with Retry-After", servers={"http_busy": "busy 2"}),
    Fault("500 after applying", servers={"http_fails": "fail 2"}),
    Fault("calls that hang", servers={"http_hangs": "hang 3"}),
    Fault("hangs for good", {"hangs": {"hang_while": "/"}}),
    Fault("one record a second", {"slow": {"pause_s": 1, "max_batch": 1}}),
    Fault("rejects every seventh record", servers={"http_rejects": "reject 7"}),
    Fault("dies for good", {"dies": {"dies_at": 2}}),
    Fault("refuses everything from the second write on", {"gone": {"dies_at": 2, "permanent": True}}),
]
RECEIVER_FAULTS = [
    Fault("never answers", sender="BadChannelSender(silent_from=1, silent_s=3600, limits=limits)"),
    Fault("30 % of the acknowledgements lost", sender="BadChannelSender(ack_loss=0.3, limits=limits)"),
    Fault("silent for 4 s", sender="BadChannelSender(silent_from=4, silent_s=4, limits=limits)"),
    Fault("no folder that it can write to", receiver_folder="/dev/null/x"),
]


def all_at_once(faults: list[Fault]) -> Fault:
    """Return one fault with the backends of all these faults."""
    backends = {name: options for fault in faults for name, options in fault.backends.items()}
    return Fault("all at once", backends, {name: mode for fault in faults for name, mode in fault.servers.items()})


def train(folder: Path, fault: Fault, steps: int = STEPS) -> JobResult:
    """Run the job under a fault and return what it left. Blocks until the job ends.

    Args:
        folder: where the job is written and run.
        fault: what goes wrong; ``NONE`` runs the job without tracking.
        steps: training steps of each site in each round.
    """
    folder.mkdir(parents=True, exist_ok=True)
    backends = {name: {k: _filled(v, folder) for k, v in given.items()} for name, given in fault.backends.items()}
    with _servers(folder, fault.servers) as urls:
        server = {"jsonl": {}, **backends, **{name: {"url": url} for name, url in urls.items()}}
        tracking: dict[str, Any] | None = {"server": server, "limits": _LIMITS}
        more = ""
        if fault is NONE:
            tracking = None
        elif fault.sender or fault.receiver_folder:
            tracking = None
            sender = fault.sender or "TrackhubSender(limits=limits)"
            more = _RECEIVER.format(limits=_LIMITS, state_dir=fault.receiver_folder, sender=sender)
        env = _environment(folder) | {
            "TRACKHUB_TEST_OUTAGE": str(folder / "outage"),
            "TRACKHUB_TEST_STEPS": str(steps),
            "TRACKHUB_TEST_TRACKED": "no" if fault is NONE else "yes",
        }
        first = [[0.0] * _CLASSES] * _FEATURES
        job = Job(folder / "job", _TRAINER, tracking, rounds=ROUNDS, more=more, env=env, model=first)
        return job.run()


def model(result: JobResult) -> bytes:
    """Return the final global model, bit by bit."""
    trained = np.load(result.run_dir("server") / "models" / "server.npy")
    assert trained.shape == (_FEATURES, _CLASSES)
    assert np.any(trained != 0.0)
    return bytes(trained.tobytes())


def steps_s(result: JobResult) -> list[float]:
    """Return the seconds that each training step of all sites and rounds took, its log call included."""
    steps = array.array("d")
    for path in sorted(result.out.glob("*.steps")):
        steps.frombytes(path.read_bytes())
    return list(steps)


def _filled(value: Any, folder: Path) -> Any:
    return value.format(outage=folder / "outage") if isinstance(value, str) else value


def _environment(folder: Path) -> dict[str, str]:
    from tests.faults.job_processes import BACKENDS
    from tests.faults.process import ROOT

    points = {name: f"tests.faults.faulty_backends:{cls}" for name, cls in BACKENDS.items()}
    path = install_plugin(folder / "plugins", "trackhub-faults", points, {})["PYTHONPATH"]
    return {
        "PYTHONPATH": os.pathsep.join([path, str(ROOT)]),
        # Two sites train on two cores. With more threads they would compete for the cores, and the steps would vary.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


@contextlib.contextmanager
def _servers(folder: Path, servers: Mapping[str, str | None]) -> Iterator[dict[str, str]]:
    """Run the servers that faulty backends talk to, and yield their addresses."""
    with contextlib.ExitStack() as stack:
        urls = {}
        for name, mode in servers.items():
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            urls[name] = f"http://127.0.0.1:{port}"
            if mode is None:
                continue
            home = folder / f"tracking-server-{name}"
            home.mkdir()
            (home / "mode").write_text(mode)
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.failing_server", str(port), str(home)], stdout=subprocess.PIPE
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            assert json.loads(process.stdout.readline()) == "ready"
        yield urls
