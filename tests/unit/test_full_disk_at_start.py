# SPDX-License-Identifier: Apache-2.0
"""Trouble of the environment when something is opened: a full disk, too many open files. It never stops a job.

Needs root, for small disks. A tmpfs gives a new folder for nothing until its inodes are used up, and an ext4 does not.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import trackhub
from tests.conftest import MakePlugin
from tests.unit.readers_and_bad_backends import (
    WAIT_S,
    allow_inodes,
    assert_balanced,
    batch_of,
    json_lines,
    metric,
    mounted,
    small_disk,
)
from trackhub.delivery import receiver as receiver_module
from trackhub.delivery import retry_receiver_start, wire
from trackhub.delivery.journal.journal import JOURNAL_NAME
from trackhub.delivery.receiver import Receiver
from trackhub.environment_trouble import is_environment_trouble
from trackhub.errors import ConfigError, JournalError, PluginError
from trackhub.job_and_run_info import RunStatus, Side
from trackhub.limits import Limits
from trackhub.preflight import Readiness, check_ready
from trackhub.spool import round_file
from trackhub.spool.round_file import RoundFile

SITE = "site-1"
FAST = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=5)

PLUGIN = """
    import errno, os
    from pathlib import Path
    from trackhub.spi import Backend, BackendRun, Capabilities, ConfirmedBy, ConfigError
    FAULT = Path(os.environ.get("FAULT", "/nowhere"))
    class Run(BackendRun):
        def write(self, batch):
            pass
        def finish(self, status):
            pass
    class Odd(Backend):
        spi = 1
        capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)
        def __init__(self, options, context):
            super().__init__(options, context)
            self._fail("init")
        def preflight(self):
            try:
                self._fail("preflight")
            except OSError as error:
                raise ConfigError(f"cannot be used: {error}") from error
        def open_run(self, info):
            return Run()
        def _fail(self, where):
            if FAULT.exists() and FAULT.read_text().split()[0] == where:
                number = int(FAULT.read_text().split()[1])
                raise OSError(number, os.strerror(number))
"""


class FullDisk(NamedTuple):
    """A folder on a disk on which nothing new can be made. ``filler`` is the file whose removal makes room."""

    runs: Path
    filler: Path | None

    def make_room(self) -> None:
        """Give the disk room."""
        if self.filler is None:
            allow_inodes(self.runs.parent)
        else:
            self.filler.unlink()


@contextmanager
def ext4(tmp_path: Path) -> Iterator[Path]:
    """Mount an ext4 of 16 MB in a file. Skip the test where that is not possible."""
    image, folder = tmp_path / "image", tmp_path / "disk"
    with image.open("wb") as file:
        file.truncate(16 << 20)
    make, mount = ["mkfs.ext4", "-q", "-F", str(image)], ["mount", "-o", "loop", str(image), str(folder)]
    with mounted(folder, make, mount):
        yield folder


@pytest.fixture(autouse=True)
def try_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry_receiver_start, "_TRY_EVERY_S", 0.0)


@pytest.fixture(params=["tmpfs", "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[FullDisk]:
    """Return a disk on which nothing new can be made, and the two folders of a receiver in it, which are there."""
    if request.param == "tmpfs":
        with small_disk(tmp_path / "disk", 4 << 20, inodes=2) as folder:
            (folder / "runs").mkdir()
            yield FullDisk(folder / "runs", None)
    else:
        with ext4(tmp_path) as folder:
            (folder / "runs").mkdir()
            filler = folder / "filler"
            with filler.open("wb", buffering=0) as file:
                while True:
                    try:
                        file.write(bytes(1024))
                    except OSError:
                        break
            yield FullDisk(folder / "runs", filler)


def start(folder: Path, backends: dict[str, dict[str, Any]] | None = None, **options: Any) -> Receiver:
    receiver = Receiver(folder, job="job-1", side=Side.SERVER, backends=backends or {"jsonl": {}}, **options)
    receiver.start()
    return receiver


def ask(receiver: Receiver, request: wire.Request) -> wire.Reply:
    return wire.decode_reply(receiver.handle(SITE, wire.encode(request)))


def test_a_receiver_on_a_full_disk_starts_and_takes_records_once_there_is_room(disk: FullDisk) -> None:
    receiver = start(disk.runs / "job")
    busy = ask(receiver, batch_of([metric(0)]))
    assert isinstance(busy, wire.Busy)
    assert "waiting until it can start" in busy.detail
    receiver.note_status(RunStatus.FINISHED)

    disk.make_room()
    assert ask(receiver, batch_of([metric(seq) for seq in range(5)])) == wire.Accepted()
    ask(receiver, wire.Final(wire.SiteCounts(logged=5, acked=5)))
    report = receiver.finish(RunStatus.FINISHED, deadline_s=WAIT_S)

    assert_balanced(report, {SITE: 5}, {("jsonl", SITE): 5})


def test_a_receiver_that_never_could_start_says_why_at_the_end_and_leaves_no_thread(disk: FullDisk) -> None:
    before = threading.active_count()
    receiver = start(disk.runs / "job")
    assert isinstance(ask(receiver, batch_of([metric(0)])), wire.Busy)

    with pytest.raises(JournalError, match=r"could not start: .*(No space|full)"):
        receiver.finish(RunStatus.FINISHED, deadline_s=1)

    assert isinstance(ask(receiver, batch_of([metric(0)])), wire.Busy)
    assert threading.active_count() == before


def test_a_receiver_whose_journal_stays_locked_says_so_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver_module, "WAIT_S", 0.5)
    start(tmp_path).finish(RunStatus.FINISHED)
    with closing(sqlite3.connect(tmp_path / "trackhub" / JOURNAL_NAME, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        receiver = start(tmp_path)

        with pytest.raises(JournalError, match=r"could not start: .*locked"):
            receiver.finish(RunStatus.FINISHED, deadline_s=1)


def test_a_script_on_a_full_disk_goes_on_and_is_delivered_once_there_is_room(disk: FullDisk) -> None:
    with trackhub.local(["jsonl", "tensorboard"], folder=disk.runs, job="job-1", limits=FAST) as writer:
        writer.log({"a": 1.0}, 0)
        disk.make_room()
        path = writer.folder / "jsonl" / "job-1" / "local.jsonl"
        deadline = time.monotonic() + WAIT_S
        while not path.exists():
            writer.log({"late": 1.0})
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)

    assert writer.report is not None
    at_site = writer.report.sites["local"].at_site
    assert at_site is not None
    assert at_site.logged == at_site.acked + at_site.dropped.get("disk_full", 0)
    for lane in writer.report.lanes.values():
        assert lane["local"].confirmed == at_site.acked > 0


def test_a_full_run_folder_holds_up_neither_the_journal_nor_the_other_backend(disk: FullDisk, tmp_path: Path) -> None:
    backends = {"jsonl": {}, "tensorboard": {"logdir": str(tmp_path / "events")}}
    receiver = start(disk.runs / "job", backends, state_dir=tmp_path / "state")
    assert ask(receiver, batch_of([metric(seq) for seq in range(5)])) == wire.Accepted()
    ask(receiver, wire.Final(wire.SiteCounts(logged=5, acked=5)))
    wait_for(lambda: list(tmp_path.glob("events/job-1/site-1/*")))
    assert not (disk.runs / "job").exists()

    disk.make_room()
    report = receiver.finish(RunStatus.FINISHED, deadline_s=WAIT_S)

    assert_balanced(report, {SITE: 5}, {(name, SITE): 5 for name in backends})
    assert len(json_lines(disk.runs / "job" / "jsonl" / "job-1" / f"{SITE}.jsonl")) == 5


@pytest.mark.parametrize("where", ["init", "preflight"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.EIO])
def test_trouble_of_the_environment_in_a_plugin_stops_nothing_until_it_is_over(
    tmp_path: Path, make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    make_plugin("odd", {"odd": "odd_trouble:Odd"}, {"odd_trouble": PLUGIN})
    fault = tmp_path / "fault"
    fault.write_text(f"{where} {number}")
    monkeypatch.setenv("FAULT", str(fault))
    assert check_ready("odd", {}).word is Readiness.NOT_NOW

    receiver = start(tmp_path / "run", {"odd": {}})
    fault.unlink()
    assert ask(receiver, batch_of([metric(0)])) == wire.Accepted()
    report = receiver.finish(RunStatus.FINISHED, deadline_s=WAIT_S)

    assert report.lanes["odd"][SITE].confirmed == 1


@pytest.mark.parametrize("where", ["init", "preflight"])
@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOTDIR, errno.EROFS])
def test_a_path_that_is_wrong_still_stops_the_job(
    tmp_path: Path, make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch, where: str, number: int
) -> None:
    make_plugin("odd", {"odd": "odd_trouble:Odd"}, {"odd_trouble": PLUGIN})
    (tmp_path / "fault").write_text(f"{where} {number}")
    monkeypatch.setenv("FAULT", str(tmp_path / "fault"))

    with pytest.raises((ConfigError, PluginError)):
        start(tmp_path / "run", {"odd": {}})

    assert check_ready("odd", {}).word is Readiness.NO


def test_a_check_without_a_temporary_folder_says_so_and_stops_nothing(
    tmp_path: Path, make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_plugin("odd", {"odd": "odd_trouble:Odd"}, {"odd_trouble": PLUGIN})
    with small_disk(tmp_path / "full", 1 << 16, inodes=1) as full:
        monkeypatch.setattr(tempfile, "tempdir", str(full))

        ready = check_ready("odd", {})

    assert ready.word is Readiness.NOT_NOW
    assert "temporary folder" in ready.remark


def test_the_trouble_is_found_however_deep_it_lies_and_nothing_else_is_taken_for_it() -> None:
    outer = ConfigError("cannot use the folder")
    outer.__cause__ = JournalError("cannot create the file")
    outer.__cause__.__context__ = OSError(errno.ENOSPC, "full")

    assert is_environment_trouble(outer)
    assert is_environment_trouble(MemoryError())
    assert not is_environment_trouble(sqlite3.DatabaseError("file is not a database"))
    assert not is_environment_trouble(ConfigError("wrong"))


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


OUT_OF_FILES = """
import os, resource, sys, time
from pathlib import Path
import trackhub
folder = Path(sys.argv[1])
trackhub.local(["jsonl"], folder=folder / "warm").close()
held = [os.open(os.devnull, os.O_RDONLY) for _ in range(10)]
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, hard))
writer = trackhub.local(["jsonl"], folder=folder, job="j")
writer.log({"a": 1.0}, 0)
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
deadline = time.monotonic() + 30
while not (folder / "j" / "jsonl" / "j" / "local.jsonl").exists() and time.monotonic() < deadline:
    writer.log({"late": 1.0})
    time.sleep(0.05)
writer.close()
at_site, run = writer.report.sites["local"].at_site, writer.report.lanes["jsonl"]["local"]
assert at_site.logged == at_site.acked + sum(at_site.dropped.values())
assert run.confirmed == at_site.acked > 0
"""


@pytest.mark.long
def test_a_script_without_a_free_descriptor_goes_on_and_is_delivered_once_there_are_some(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OUT_OF_FILES, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "cannot start yet: [Errno 24] Too many open files" in done.stderr


def test_without_room_for_the_round_no_file_of_the_script_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    of_script = []

    def find_no_room(path: Path, data: bytes, mode: int) -> int:
        of_script.append(os.open(tmp_path / "of the script", os.O_RDWR | os.O_CREAT))  # gets the lowest free number
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(round_file, "write_start", find_no_room)

    RoundFile(tmp_path, sets=True)

    assert os.fstat(of_script[0]).st_size == 0
    os.close(of_script[0])
