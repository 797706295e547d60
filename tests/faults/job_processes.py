# SPDX-License-Identifier: Apache-2.0
"""A job of real processes without FLARE, and the checks of what it left.

The processes are trainers, senders, a receiver, tracking servers and ``trackhub replay``. A test starts them, kills
or starves some of them, and ends the job. `JobProcesses` then checks the equations of docs/delivery.md, with counts by
`tests.faults.independent_readers`. ``trackhub replay`` delivers the rest, and the backends must hold exactly what the
trainers noted.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import urllib.request
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tests.faults.crowd_process import CrowdPlan
from tests.faults.independent_readers import (
    ReceiverCount,
    count_receiver,
    count_site,
    read_store,
    read_tensorboard,
    read_wandb,
    read_wandb_offline,
)
from tests.faults.process import ROOT, Proc, environments
from tests.faults.receiver_process import ReceiverPlan
from tests.faults.sender_process import SenderPlan
from tests.faults.trainer_calls import Notes, Seen, expected, files_last
from tests.faults.trainer_process import TrainerPlan
from trackhub.cli.status import journal_status, spool_status
from trackhub.delivery.journal.find_journals_and_spools import find
from trackhub.spool.announce_spool import SPOOL_ENV, spool_env
from trackhub.spool.layout import SpoolInfo, create_spool

__all__ = ["BACKENDS", "LIMITS", "JobProcesses"]

LIMITS: dict[str, float | str] = {
    "batch_records": 50,
    "batch_bytes": 16384,
    "barrier_s": 1,
    "sites_s": 60,
    "deadline_s": 60,
    "keepalive_s": 0.2,
    "silence_s": 4,
    "flush_s": 0.05,
    "poll_s": 0.01,
    "linger_s": 0,
    "request_s": 2,
    "preflight_s": 1,
}
"""Small batches and short waits: so a short run has many moments at which a process can die. The limits of the end are
long, since a machine with other load is slow; only a test of such a limit sets a short one."""

JOB = "job-1"
Lost = Mapping[str, Mapping[str, int]]
_MARK = "TRACKHUB_FAULTS_JOB"
BACKENDS = {
    "idempotent": "Idempotent",
    "resumable": "Resumable",
    "rebuild": "Rebuild",
    "at_least_once": "AtLeastOnce",
    "buffered": "Buffered",
    **dict.fromkeys(["hangs", "slow", "dies", "gone"], "Idempotent"),
    **dict.fromkeys(
        ["http_late", "http_restarted", "http_outage", "http_busy", "http_fails", "http_hangs", "http_rejects"], "Http"
    ),
}


@dataclass
class JobProcesses:
    """One job and its processes.

    Attributes:
        folder: the job's files: ``<site>/trackhub/spool``, and ``server/`` as the receiver's run folder.
        backends: the receiver's backends, with their options.
        limits: the limits of senders and receiver.
        state: where the receiver keeps its journal; by default ``server/trackhub``.
        spool_bytes: the size of each site's spool.
        segment_bytes: the size of a segment; 0 for the product's own.
        in_doubt: how many calls may have been under way when a trainer was killed: one for each kill.
        counted: records that reached no backend and were counted with a reason.
        files: whether some log calls log artifacts.
        has_planted_bug: what it loses is no loss of the product.
        procs: all processes but tracking servers.
        servers: the tracking servers.
        writers: the name of each writer, and its site.
        mark: is in the environment of all processes, to find those that are left.
    """

    folder: Path
    backends: dict[str, dict[str, Any]]
    limits: dict[str, float | str] = field(default_factory=lambda: dict(LIMITS))
    state: Path | None = None
    spool_bytes: int = 1 << 30
    segment_bytes: int = 0
    in_doubt: int = 0
    counted: int = 0
    files: bool = False
    has_planted_bug: bool = False
    procs: list[Proc] = field(default_factory=list)
    servers: list[Proc] = field(default_factory=list)
    writers: dict[str, str] = field(default_factory=dict)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.socket = Path(f"/tmp/trackhub-{self.mark[:12]}")
        plugins = self.folder / "plugins"
        info = plugins / "trackhub_faults-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trackhub-faults\nVersion: 1.0\n")
        lines = [f"{name} = tests.faults.faulty_backends:{cls}" for name, cls in BACKENDS.items()]
        (info / "entry_points.txt").write_text("\n".join(["[trackhub.backends]", *lines, ""]))
        path = os.pathsep.join([str(ROOT), str(plugins)])
        self.env = {**os.environ, "PYTHONPATH": path, _MARK: self.mark, "PYTHONWARNINGS": "default"}

    @property
    def journal(self) -> Path:
        return (self.state or self.folder / "server" / "trackhub") / "trackhub.db"

    def spool(self, site: str = "site-1") -> Path:
        return self.folder / site / "trackhub" / "spool"

    def start(self, module: str, plan: msgspec.Struct, env: Mapping[str, str] | None = None) -> Proc:
        """Start a module of the suite as a process, with a plan."""
        number = len(self.procs)
        path = self.folder / f"plan-{number}.json"
        path.write_bytes(msgspec.json.encode(plan))
        log = self.folder / f"{module}-{number}.log"
        proc = Proc(["-m", f"tests.faults.{module}", str(path)], {**self.env, **(env or {})}, log)
        self.procs.append(proc)
        return proc

    def create_spool(self, site: str = "site-1") -> bool:
        """Create a site's spool, if it is not there. Return whether that was possible."""
        return create_spool(self.spool(site), SpoolInfo(site, JOB, ("server",), self.spool_bytes))

    def trainer(
        self, name: str = "a", site: str = "site-1", *, calls: int = 3000, announced: bool = False, **plan: Any
    ) -> Proc:
        """Start a training process.

        Args:
            name: the writer's name; must be new in this job.
            site: whose spool it logs to.
            calls: how many log calls it makes.
            announced: it finds its spool by the environment variable.
            plan: further fields of `TrainerPlan`.
        """
        if not (self.spool(site) / "spool.json").exists():
            self.create_spool(site)
        Notes(self.folder / name, calls)
        self.writers[name] = site
        for ending, at in (("child", "fork_at"), ("spawned", "spawn_at")):
            if plan.get(at, -1) >= 0:
                Notes(self.folder / f"{name}-{ending}", calls)
                self.writers[f"{name}-{ending}"] = site
        spool = "" if announced else str(self.spool(site))
        given = TrainerPlan(
            spool=spool, notes=str(self.folder), name=name, calls=calls, files=self.files,
            segment_bytes=self.segment_bytes, **plan,
        )  # fmt: skip
        return self.start("trainer_process", given, {SPOOL_ENV: spool_env(self.spool(site), site, JOB)})

    def crowd(self, size: int, *, calls: int, at_once: int = 4) -> Proc:
        """Start a process that forks many trainers, each of which logs a little and ends without closing its writer.

        Args:
            size: how many trainers.
            calls: how many log calls each makes.
            at_once: how many of them live at the same time.
        """
        self.create_spool()
        names = [f"c{number:04}" for number in range(len(self.writers), len(self.writers) + size)]
        for name in names:
            Notes(self.folder / name, calls)
            self.writers[name] = "site-1"
        plan = CrowdPlan(
            spool=str(self.spool()), notes=str(self.folder), names=names, calls=calls, at_once=at_once, files=self.files
        )
        return self.start("crowd_process", plan)

    def sender(self, site: str = "site-1", **plan: Any) -> Proc:
        """Start a site's sender and wait until it runs. ``plan`` has further fields of `SenderPlan`."""
        given = SenderPlan(
            spool=str(self.spool(site)), site=site, job=JOB, socket=str(self.socket), limits=self.limits,
            spool_bytes=self.spool_bytes, **plan,
        )  # fmt: skip
        proc = self.start("sender_process", given)
        assert proc.answer() == "ready"
        return proc

    def receiver(self, **plan: Any) -> Proc:
        """Start the receiver and wait until it listens, or dies as planned: that may be before it listens.

        ``plan`` has further fields of `ReceiverPlan`.
        """
        given = ReceiverPlan(
            folder=str(self.journal.parent), workdir=str(self.folder / "server"), job=JOB, socket=str(self.socket),
            backends=self.backends, sites=self.sites(), limits=self.limits, **plan,
        )  # fmt: skip
        proc = self.start("receiver_process", given)
        assert proc.is_ready() or given.kill_at_commit, f"ended before it listened; log: {proc.log[-3000:]}"
        return proc

    def sites(self) -> list[str]:
        return sorted(set(self.writers.values())) or ["site-1"]

    def replay(self, *arguments: str, path: Path | None = None) -> Proc:
        """Start ``trackhub replay``, by default on the job's folder."""
        log = self.folder / f"replay-{len(self.procs)}.log"
        command = ["-m", "trackhub.cli", "replay", str(path or self.folder), *arguments]
        limits = {f"TRACKHUB_{name.upper()}": str(value) for name, value in self.limits.items()}
        proc = Proc(command, {**self.env, **limits}, log)
        self.procs.append(proc)
        return proc

    def tracking_server(self, backend: str, mode: str = "ok") -> Proc:
        """Start the tracking server of a backend. A second call starts it again at the same address."""
        folder = self.folder / f"tracking-server-{backend}"
        folder.mkdir(exist_ok=True)
        (folder / "mode").write_text(mode)
        port = self.backends[backend]["url"].rpartition(":")[2]
        log = self.folder / f"tracking-server-{len(self.servers)}.log"
        proc = Proc(["-m", "tests.faults.failing_server", port, str(folder)], self.env, log)
        self.servers.append(proc)
        assert proc.answer() == "ready"
        return proc

    def wandb_server(self) -> dict[str, Any]:
        """Start the emulator of a W&B server. Return options of the backend ``wandb`` that make it write there."""
        home = self.folder / "home"
        home.mkdir()
        self.env.update(HOME=str(home), NETRC=str(home / "netrc"), WANDB_ERROR_REPORTING="false")
        proc = Proc(["-m", "tests.support.wandb_emulator"], self.env, self.folder / "wandb-server.log")
        self.servers.append(proc)
        about = proc.answer()
        self.env["WANDB_API_KEY"] = about["key"]
        return {"mode": "online", "base_url": about["url"], "upload_interval_s": 1.0}

    def wandb_state(self) -> dict[str, Any]:
        """Return what the emulator of a W&B server holds."""
        with urllib.request.urlopen(f"{self.backends['wandb']['base_url']}/_emulator/state") as reply:
            state: dict[str, Any] = json.load(reply)
            return state

    def go(self, *names: str) -> None:
        """Let trainers go on that wait, or will wait, at ``wait_at``."""
        for name in names:
            (self.folder / f"{name}.go").touch()

    def count(self, name: str = "a") -> int:
        """Return how many calls of a writer have returned."""
        return Notes(self.folder / name).count()

    def end(
        self,
        sender: Proc | None = None,
        receiver: Proc | None = None,
        *,
        status: str = "finished",
        sites_s: float | None = None,
    ) -> dict[str, Any]:
        """End the job in order: the sender sends the rest, and the receiver waits for it and delivers.

        Args:
            sender: the sender to end, if any.
            receiver: the receiver to end, if any.
            status: how the job ended.
            sites_s: how long the sender tries; by default as long as the job's limit, and 5 s without a receiver.

        Returns:
            The receiver's answer.
        """
        if sites_s is None:
            sites_s = 5 if receiver is None else float(self.limits["sites_s"])
        if receiver is not None:
            receiver.tell(f"finish {status}")
        if sender is not None:
            sender.ask(f"close {sites_s}")
            assert sender.wait() == 0, sender.log
        answer: dict[str, Any] = {}
        if receiver is not None:
            answer = receiver.answer()
            assert receiver.wait() == 0, receiver.log
            self.check_cap(answer["took_s"])
        return answer

    def check_cap(self, took_s: float) -> None:
        """Check that the end of a receiver took no longer than its limits, and a second for each backend that hangs.

        It may wait for files that still arrive. Only a test that limits this wait has such files at the end.
        """
        sites_s = max(float(self.limits["sites_s"]), float(self.limits.get("files_s", 0)))
        caps = sites_s + float(self.limits["deadline_s"]) + len(self.backends)
        assert took_s < caps + 5.0, f"the receiver took {took_s:.1f} s to end"

    def check_equations(self) -> dict[str, ReceiverCount]:
        """Check the equations at the sites, at the receiver and in each lane, with independent counts."""
        receiver = count_receiver(self.journal) if self.journal.exists() else {}
        doubt = self.in_doubt
        for site in self.sites():
            if not self.spool(site).exists():
                continue
            noted = sum(self.count(name) for name, where in self.writers.items() if where == site)
            found = count_site(self.spool(site))
            assert noted <= found.logged <= noted + doubt, (noted, found)
            gone = found.withheld + found.dropped.total() + found.refused.total()
            assert found.logged == gone + found.acked + found.spooled, found
            if site in receiver:
                assert receiver[site].missing == 0
                # At most one batch of each stream is journaled and not acknowledged.
                in_flight = int(self.limits["batch_records"]) * found.streams
                assert found.acked <= receiver[site].journaled <= found.acked + in_flight, (found, receiver)
            else:
                assert found.acked == 0
        for site, here in receiver.items():
            assert here.received == here.duplicates + here.journaled, here
            for name, lane in here.lanes.items():
                pending = here.journaled - lane.confirmed - sum(lane.rejected.values())
                assert pending >= 0, (name, here)
                if name in self.backends:
                    held = len(set(self.held(name, site)))
                    assert lane.confirmed <= held <= here.journaled, (name, lane, held, here)
        return receiver

    def check_status(self) -> dict[str, Any]:
        """Check that ``trackhub status`` says the same as the independent counts, and return what it says."""
        found_here = find(self.folder)
        said: dict[str, Any] = {
            "journals": [journal_status(path) for path in found_here.journals],
            "spools": [spool_status(path) for path in found_here.spools],
        }
        for spool in said["spools"]:
            found = count_site(Path(spool["path"]))
            receiver = spool["receivers"]["server"]
            assert (receiver["logged"], receiver["acked"], receiver["spooled"]) == (
                found.logged,
                found.acked,
                found.spooled,
            )
            assert (receiver["dropped"], receiver["refused"]) == (dict(found.dropped), dict(found.refused))
        for journal in said["journals"]:
            assert journal["balanced"]
            for site, here in count_receiver(Path(journal["path"])).items():
                stated = journal["sites"][site]
                assert (stated["received"], stated["journaled"]) == (here.received, here.journaled)
                for lane in journal["lanes"].values():
                    run = lane[site]
                    assert here.journaled == run["confirmed"] + sum(run["rejected"].values()) + run["pending"]
        return said

    def held(self, backend: str, site: str = "site-1") -> list[Seen]:
        """Return the records that a backend holds of a site's run."""
        options = self.backends[backend]
        work = self.folder / "server" / backend
        if backend == "tensorboard":
            return read_tensorboard(work / JOB / site) if (work / JOB / site).exists() else []
        if backend == "wandb":
            return (
                read_wandb_offline(work, site) if options["mode"] == "offline" else read_wandb(self.wandb_state(), site)
            )
        if backend == "jsonl":
            return read_store(Path(options.get("path") or work) / JOB / f"{site}.jsonl")
        if backend.startswith("http_"):
            return read_store(self.folder / f"tracking-server-{backend}" / f"{site}.jsonl")
        return read_store(Path(options.get("path") or work) / f"{JOB}-{site}.jsonl")

    def truth(self, name: str, calls: int, backend: str = "jsonl") -> list[Seen]:
        """Return the records of a writer's first calls that this backend can hold."""
        return [expected(name, i, files=self.files) for i in range(calls)]

    def check_delivered(self, *, lost: Lost | None = None) -> None:
        """Check that each backend holds exactly what each trainer noted, and nothing twice.

        Each writer's records without files are in order, and so are its files.

        A call that was under way when its trainer was killed may be there or not.

        Args:
            lost: backend to writer to the number of its records that are missing for a counted reason. ``*`` stands
                for all backends.
        """
        self.counted = sum(sum(writers.values()) for writers in (lost or {}).values())
        for backend in self.backends:
            for site in self.sites():
                names = [name for name, where in self.writers.items() if where == site]
                found = self.held(backend, site)
                assert {seen.key.partition("/")[0] for seen in found} <= set(names)
                for name in names:
                    mine = [seen for seen in found if seen.key.startswith(f"{name}/")]
                    missing = (lost or {}).get(backend, (lost or {}).get("*", {}))
                    self._check_writer(backend, site, name, mine, missing.get(name, 0))

    def _check_writer(self, backend: str, site: str, name: str, mine: list[Seen], lost: int) -> None:
        noted = self.count(name)
        truth = files_last(self.truth(name, noted + self.in_doubt, backend))
        mine = files_last(mine)
        if backend == "tensorboard":  # its reader gives one key after the other
            truth, mine = (sorted(part, key=lambda seen: (seen.step or 0, seen.key)) for part in (truth, mine))
        if backend == "at_least_once":
            twice = len(mine) - len(set(mine))
            counted = count_receiver(self.journal)[site].lanes[backend].possible_duplicates
            assert twice <= counted, f"{backend}: {twice} records are there twice, {counted} were counted"
            mine = list(dict.fromkeys(mine))
        if lost:
            assert [seen for seen in truth[: len(truth)] if seen in set(mine)] == mine, f"{backend}: order of {name}"
            assert len(mine) == noted - lost, (
                f"{backend}: {name} has {len(mine)} of {noted} records, {lost} counted as lost"
            )
            return
        must = len(self.truth(name, noted, backend))
        assert len(mine) >= must, f"{backend}: {must - len(mine)} records of {name} are lost without a count"
        made = set(self.truth(name, noted + len(mine) - must, backend))  # the calls in doubt may have been made or not
        truth = [seen for seen in truth if seen in made]
        assert mine == truth, f"{backend}: {name} differs at {_first_difference(mine, truth)}"

    def check_all_delivered(self, *, lost: Lost | None = None) -> None:
        """Check that nothing is left anywhere, and that the backends hold exactly what was logged."""
        self.check_equations()
        said = self.check_status()
        for spool in said["spools"]:
            assert spool["receivers"]["server"]["spooled"] == 0, spool
        for journal in said["journals"]:
            for name in self.backends:
                assert all(run["pending"] == 0 for run in journal["lanes"].get(name, {}).values()), journal
        self.check_delivered(lost=lost)

    def replay_all(self, *arguments: str, lost: Lost | None = None) -> None:
        """Deliver what is left with ``trackhub replay``, and check that the backends hold exactly what was logged."""
        replay = self.replay(*arguments)
        assert replay.wait() == 0, replay.log
        self.check_all_delivered(lost=lost)

    def flags(self, **changed: Mapping[str, Any]) -> list[str]:
        """Return command-line flags that name all backends, with these options."""
        flags = [flag for name in self.backends for flag in ("--backend", name)]
        for name, options in changed.items():
            for key, value in options.items():
                flags += ["--option", f"{name}.{key}={value}"]
        return flags

    def close(self) -> None:
        """Kill what a failed test left running, also the children of trainers: they hold the pipes of their parents."""
        for pid in self.running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for proc in (*self.procs, *self.servers):
            proc.close()
        self.socket.unlink(missing_ok=True)

    def check_nothing_stays(self) -> None:
        """Check that only tracking servers still run, and that no lock is held."""
        for server in self.servers:
            server.kill()
        for proc in self.procs:
            assert not proc.is_alive(), f"still running: {proc.process.args!r}; log: {proc.log[-2000:]}"
        left = self.running()
        assert left == [], "the job's own processes started these, and they still run"
        for lock in self.folder.rglob("*.lock"):
            with lock.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def running(self) -> list[int]:
        """Return the ids of all processes of the job, also of those that its own processes started."""
        mark = f"{_MARK}={self.mark}".encode()
        return [pid for pid, env in environments() if mark in env]

    def totals(self) -> Counter[str]:
        """Return this job's part of the suite's figures."""
        killed = sum(proc.process.returncode == -signal.SIGKILL for proc in (*self.procs, *self.servers))
        return Counter(
            jobs=1, killed=killed, records=sum(self.count(name) for name in self.writers), counted=self.counted
        )


def _first_difference(mine: list[Seen], truth: list[Seen]) -> str:
    at = next(i for i, (a, b) in enumerate(zip(mine, [*truth, None], strict=False)) if a != b)
    doubled = [seen for seen, n in Counter(mine).items() if n > 1]
    return f"record {at}: {mine[at : at + 3]}, expected {truth[at : at + 3]}; {len(doubled)} are there twice"
