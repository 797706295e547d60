# SPDX-License-Identifier: Apache-2.0
"""A driver that breaks a running job at random: which fault comes when is drawn from a seed.

`tests.faults.test_random` runs it. It starts a job of two sites through `tests.faults.job_processes`, breaks it, ends
it, replays what is left, and hands it to `tests.faults.oracle`. The seed decides the faults and their order. The exact
moments depend on the machine, so run a failed seed a few times.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from tests.faults.clock import Clock
from tests.faults.independent_readers import count_receiver
from tests.faults.job_processes import JobProcesses
from tests.faults.oracle import check_model
from tests.faults.process import Proc, wait_for

__all__ = ["SITES", "RandomFaults", "SmallDisk"]

SITES = ("site-1", "site-2")
_CAPACITY = 20_000
"""More calls than a slow trainer makes before the driver ends it."""
_MOST_TRAINERS = 8
_FLUSHING = {"rebuild", "buffered", "wandb"}
"""The backends that confirm by ``flush``."""
_BATCH_RECORDS = (2, 7, 50)
"""Small batches end at all places of a segment, large ones have more records on their way."""
_SEGMENT_BYTES = (20_000, 100_000)
"""A few hundred calls, or a few thousand: so a stream has several segments."""
_WRITER_LOOKS_AGAIN_S = 0.6
"""After this time, a writer looks for room on its disk again."""
_PATIENCE_S = 180.0


class SmallDisk(Protocol):
    """A disk of the fixture ``make_disk``."""

    def fill(self) -> Path: ...


_OWN_JOURNAL = ("--trust-journal",)
"""The driver made the journal itself. Otherwise a replay refuses the address of the W&B emulator, which is in it."""


class RandomFaults:
    """Breaks one job.

    Attributes:
        job: the job.
        seed: decides all faults.
        story: what was done, in order, for whoever looks at a failed seed.
        may_drop: whether a disk of a site was full, so that sites may have dropped records.
        doubtful: the writers that were killed. Their last call may be recorded or not.
    """

    def __init__(self, job: JobProcesses, seed: int, disks: dict[str, SmallDisk]) -> None:
        """Prepare the job.

        Args:
            job: has not started yet.
            seed: decides all faults.
            disks: a small disk under each site's spool, by the site's name, and one named ``server`` under the journal.
                Without them, no disk is filled.
        """
        self.job = job
        self.story: list[str] = []
        self.may_drop = False
        self.doubtful: set[str] = set()
        self._chance = random.Random(seed)
        self.seed = seed
        job.limits["batch_records"] = self._chance.choice(_BATCH_RECORDS)
        job.segment_bytes = self._chance.choice(_SEGMENT_BYTES)
        self._disks = disks
        # A segment has room for about 6,000 calls. W&B's SDK takes some hundred records a second, and fewer under load.
        self._most_calls, self._pause_s = (1000, 1.0) if "wandb" in job.backends else (8000, 0.2)
        self._clock = Clock(job.folder / "clock")
        self._clock.install(job.folder / "plugins")
        self._stop = job.folder / "stop"
        self._open: dict[str, Callable[[], None]] = {}
        self._receiver: Proc | None = None
        self._senders: dict[str, Proc | None] = dict.fromkeys(SITES)
        self._trainers: dict[str, Proc] = {}
        self._started = 0
        kills = [self._kill_trainer, self._kill_trainer, self._kill_sender, self._kill_receiver, self._kill_receiver]
        others = [self._lock_journal, self._hide_file, self._hide_file, self._stall, self._replay_early]
        self._faults: list[Callable[[], None]] = [*kills, *others, self._move_clock, self._move_clock]
        if self._down.name:
            self._faults += [self._take_store_down, *[self._kill_receiver_without_store] * 2]
        self._faults += [partial(self._fill, place) for place in disks]

    @property
    def _down(self) -> Path:
        """The file that takes the suite's own store down; an empty path if the job has none."""
        given = (options["down_while"] for options in self.job.backends.values() if "down_while" in options)
        return Path(next(given, ""))

    def run(self, faults: int) -> None:
        """Start the job, break it so many times, end it, replay it, and check everything.

        Args:
            faults: how many faults.

        Raises:
            AssertionError: a record is lost without a count, is there twice, or is out of order; or a count is wrong.
        """
        try:
            self._start()
            for _ in range(faults):
                self._pause(0.05, 0.4)
                self._chance.choice(self._faults)()
                self._tend()
            self._end_job()
            self._replay()
            check_model(self.job, doubtful=self.doubtful, may_drop=self.may_drop)
        except BaseException as e:
            e.add_note(f"seed {self.seed} of the random faults did this:\n  " + "\n  ".join(self.story))
            raise
        finally:
            self._heal()

    def _tell(self, what: str) -> None:
        self.story.append(what)

    def _pause(self, least_s: float, most_s: float) -> None:
        threading.Event().wait(self._chance.uniform(least_s, most_s))

    # The job's processes.

    def _start(self) -> None:
        for site in SITES:
            self.job.create_spool(site)
            self._start_trainer(site)
        self._tend(at_once=True)

    def _start_trainer(self, site: str) -> None:
        """Start a slow trainer, which may have children and ends with the job, or a fast one, which ends soon."""
        name = f"w{self._started}"
        self._started += 1
        plan: dict[str, Any] = {"calls": _CAPACITY, "pause_s": self._pause_s}
        if self._started > len(SITES) and self._chance.random() < 0.5:
            plan = {"calls": self._chance.randrange(300, self._most_calls), "pause_s": 0.005}
        else:
            for way in ("fork_at", "spawn_at"):
                if self._chance.random() < 0.4:
                    plan[way] = self._chance.randrange(20, 200)
        self._trainers[name] = self.job.trainer(name, site, until=str(self._stop), **plan)
        self._tell(f"started trainer {name} at {site}, {plan}")

    def _tend(self, *, at_once: bool = False) -> None:
        """End some of the open faults, and start some of the processes again that died."""
        for name in list(self._open):
            if self._chance.random() < 0.5:
                self._close(name)
        for site, sender in self._senders.items():
            if (sender is None or not sender.is_alive()) and (at_once or self._chance.random() < 0.6):
                self._start_sender(site)
        if (self._receiver is None or not self._receiver.is_alive()) and (at_once or self._chance.random() < 0.6):
            self._start_receiver()

    def _start_sender(self, site: str) -> None:
        chance = self._chance
        channel = {
            "ack_loss": chance.choice([0.0, 0.3]), "request_loss": chance.choice([0.0, 0.1]),
            "again": chance.choice([0.0, 0.2]), "delay_s": chance.choice([0.0, 0.01]), "seed": chance.randrange(1000),
        }  # fmt: skip
        self._senders[site] = self.job.sender(site, **channel)
        self._tell(f"started the sender of {site}, {channel}")

    def _start_receiver(self) -> None:
        """Start the receiver. It may fail while its disk is full or its journal is locked, and then comes later."""
        plan: dict[str, Any] = {}
        way = self._chance.random()
        if way < 0.25:
            plan = {"kill_at_commit": self._chance.randrange(4, 60), "kill_after_us": self._chance.uniform(0, 300)}
        elif way < 0.6:  # a backend has done its work, and the lane does not know it; or it has not begun
            backend = self._chance.choice(list(self.job.backends))
            method = self._chance.choice(["write", "flush"]) if backend in _FLUSHING else "write"
            plan = {
                "kill_at_write": (backend, method, self._chance.randrange(1, 16)),
                "kill_before_work": self._chance.random() < 0.5,
            }
        try:
            self._receiver = self.job.receiver(**plan)
        except AssertionError:
            self._receiver = None
            failed = self.job.procs[-1]
            excused = {"lock", "server"} & self._open.keys() or failed.wait() == -signal.SIGKILL
            assert excused, failed.log
            self._tell(f"the receiver could not start: {(failed.log.strip().splitlines() or ['killed'])[-1]}")
        else:
            self._tell(f"started the receiver {plan or ''}")

    # The faults.

    def _kill_trainer(self) -> None:
        """Kill a trainer, or a child of one. Others of its kind, and its children, go on."""
        alive = [name for name in self.job.writers if self._pid(name) and not self._is_without_ledger(name)]
        if not alive:
            return
        name = self._chance.choice(alive)
        if pid := self._pid(name):
            os.kill(pid, signal.SIGKILL)
            self.doubtful.add(name)
            self.job.in_doubt += 1
            self._tell(f"killed trainer {name} after {self.job.count(name)} calls")
        if len(self._trainers) < _MOST_TRAINERS:
            self._start_trainer(self._chance.choice([site for site in SITES if site not in self._open] or [*SITES]))

    def _is_without_ledger(self, name: str) -> bool:
        """Return whether a process may hold counts in its memory only. Nobody can know them after its death."""
        return self.job.writers[name] in self._open or self.job.count(name) < 20

    def _pid(self, name: str) -> int:
        """Return the process id of a writer; 0 if it has not started or has ended."""
        path = self.job.folder / f"{name}.pid"
        text = path.read_text() if path.exists() else ""
        return int(text) if text and int(text) in self.job.running() else 0

    def _kill_sender(self) -> None:
        site = self._chance.choice(SITES)
        if (sender := self._senders[site]) is not None:
            sender.kill()
            self._tell(f"killed the sender of {site}")

    def _kill_receiver(self) -> None:
        if self._receiver is not None:
            self._receiver.kill()
            self._tell("killed the receiver")

    def _fill(self, place: str) -> None:
        if place not in self._open:
            if place in SITES:
                self.may_drop = True
                wait_for(lambda: self._trainers_have_begun(place), f"the trainers of {place} to have a ledger")
            filler = self._disks[place].fill()
            self._opened(place, filler.unlink, f"filled the disk of {place}")

    def _trainers_have_begun(self, site: str) -> bool:
        mine = [name for name in self._trainers if self.job.writers[name] == site]
        return all(self.job.count(name) > 0 or not self._trainers[name].is_alive() for name in mine)

    def _lock_journal(self) -> None:
        if "lock" in self._open or not self.job.journal.exists():
            return
        other = sqlite3.connect(self.job.journal, isolation_level=None, timeout=5)
        try:
            other.execute("BEGIN EXCLUSIVE")
        except sqlite3.OperationalError as e:  # such as while its disk is full
            other.close()
            self._tell(f"could not lock the journal: {e}")
            return

        def free() -> None:
            other.execute("ROLLBACK")
            other.close()

        self._opened("lock", free, "locked the journal")

    def _move_clock(self) -> None:
        offset_s = self._chance.choice([-86400.0, -3600.0, -0.5, 0.0, 0.5, 3600.0])
        self._clock.set(offset_s)
        self._tell(f"moved the clock to {offset_s:+g} s")

    def _hide_file(self) -> None:
        """Put a folder in the place of a segment or a blob, so that to read it fails. Root may read every file."""
        site = self._chance.choice(SITES)
        paths = [p for p in sorted(self.job.spool(site).rglob("*")) if p.suffix == ".spool" or p.parent.name == "blobs"]
        if "hidden" in self._open or not paths:
            return
        path = self._chance.choice(paths)
        aside = path.with_name(path.name + ".aside")
        try:
            path.rename(aside)
        except FileNotFoundError:  # the sender has just deleted it
            return
        path.mkdir()

        def show() -> None:
            path.rmdir()
            aside.rename(path)

        self._opened("hidden", show, f"made {site}'s {path.name} unreadable")

    def _take_store_down(self) -> None:
        self._down.touch()
        self._opened("store", lambda: self._down.unlink(missing_ok=True), "took the store down")

    def _kill_receiver_without_store(self) -> None:
        """Kill the receiver while its lane has records that the store did not take."""
        if "store" not in self._open:
            self._take_store_down()
        self._pause(0.3, 0.6)
        self._kill_receiver()

    def _stall(self) -> None:
        procs = [proc for proc in (self._receiver, *self._senders.values()) if proc is not None and proc.is_alive()]
        if procs:
            proc = self._chance.choice(procs)
            proc.process.send_signal(signal.SIGSTOP)
            self._pause(0.1, 1.0)
            proc.process.send_signal(signal.SIGCONT)
            self._tell(f"stopped process {self.job.procs.index(proc)} for a while")

    def _replay_early(self) -> None:
        """Replay the running job. The receiver has the journal, so the replay must not touch it."""
        receiver = self._receiver
        if receiver is None or not receiver.is_alive() or not self._all_send():
            return
        replay = self.job.replay(*_OWN_JOURNAL)
        wait_for(lambda: not (replay.is_alive() and receiver.is_alive()), "the replay of a running job to end")
        if not receiver.is_alive():  # by its own plan. The replay has the journal now, and may wait for a store
            replay.kill()
            self._tell("the receiver died under a replay, which was killed as well")
            return
        status = replay.wait()
        self._tell(f"replayed while the job ran: status {status}")
        if self._all_send():
            assert status == 1, replay.log

    def _all_send(self) -> bool:
        return all(sender is not None and sender.is_alive() for sender in self._senders.values())

    def _opened(self, name: str, close: Callable[[], None], what: str) -> None:
        self._open[name] = close
        self._tell(what)

    def _close(self, name: str) -> None:
        self._open.pop(name)()
        self._tell(f"ended the fault: {name}")

    def _heal(self) -> None:
        for name in list(self._open):
            self._close(name)

    # The end.

    def _end_job(self) -> None:
        """End the trainers, then senders and receiver, some of them by a kill, and check all sums."""
        for name in {"hidden", *SITES} & self._open.keys():
            self._close(name)
        self._tend(at_once=True)
        self._end_trainers()
        receiver, senders = self._receiver, [s for s in self._senders.values() if s is not None]
        ending = [proc for proc in (receiver, *senders) if proc is not None]
        for proc in ending:
            with contextlib.suppress(BrokenPipeError):
                proc.tell("finish finished" if proc is receiver else "close 3")
        if self._chance.random() < 0.4:
            victim = self._chance.choice(ending)
            self._pause(0.0, 0.5)
            victim.kill()
            self._tell(f"killed process {self.job.procs.index(victim)} at the end")
        for proc in ending:
            # A receiver cannot start on a full disk or beside a lock, which a job survives: the replay delivers.
            kept_out = bool({"server", "lock"} & self._open.keys()) and "cannot start yet" in proc.log
            could_not_start = (1,) if proc is receiver and kept_out else ()
            assert proc.wait(_PATIENCE_S) in (0, -signal.SIGKILL, *could_not_start), proc.log
        if receiver is not None and receiver.wait() == 0:
            self.job.check_cap(receiver.answer()["took_s"])
        self._heal()
        self._wait_for_helpers()
        self.job.check_equations()

    def _end_trainers(self) -> None:
        looked = time.monotonic()
        wait_for(lambda: time.monotonic() > looked + _WRITER_LOOKS_AGAIN_S, "writers to look for room again")
        self._stop.touch()
        for name, trainer in self._trainers.items():
            killed = name in self.doubtful
            assert trainer.wait() == (-signal.SIGKILL if killed else 0), trainer.log
        wait_for(lambda: not any(self._pid(name) for name in self.job.writers), "the trainers' children to end")
        self._tell("all trainers ended")

    def _wait_for_helpers(self) -> None:
        """Wait for what killed processes leave for a moment, such as the service of W&B's SDK."""
        servers = {server.process.pid for server in self.job.servers}
        wait_for(lambda: set(self.job.running()) <= servers, "the helpers of killed processes to end")

    def _replay(self) -> None:
        """Replay the job, and kill some of the replays."""
        for _ in range(self._chance.randrange(3)):
            replay = self.job.replay(*_OWN_JOURNAL)
            self._pause(0.3, 2.0)
            replay.kill()
            self._tell(f"killed a replay: status {replay.wait()}")
            self._wait_for_helpers()
            self.job.check_equations()
        if not self.job.journal.exists() or not count_receiver(self.job.journal):
            self._tell("no record reached the receiver before the replay")
        replay = self.job.replay(*_OWN_JOURNAL)
        assert replay.wait(_PATIENCE_S) == 0, replay.log
        self._tell("the last replay ended")
        self._wait_for_helpers()
