# SPDX-License-Identifier: Apache-2.0
"""What a log call left in the spool survives forks, kills and full disks, and what did not fit is counted."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import (
    assert_accounted,
    new_spool,
    read_spool,
    settle_all,
    small_disk,
    spool_of,
    values,
)
from trackhub.errors import SpoolError
from trackhub.records import Gap, Metrics, Payload, Text
from trackhub.spool.layout import SpoolInfo, create_spool, create_spool_anywhere, read_spool_info
from trackhub.spool.reading import SpoolReader
from trackhub.spool.writer_ledger import read_ledger
from trackhub.spool.writing import NewBlob, SpoolWriter
from trackhub.writer.writer import Writer


def text(size: int) -> Payload:
    return Text("key", "x" * size)


def new_blob(size: int, write: Callable[[Path], None]) -> NewBlob:
    return NewBlob("blob", size, write, lambda name: Text("blob", name))


def test_a_spool_belongs_to_one_site_and_job(tmp_path: Path) -> None:
    create_spool(tmp_path, SpoolInfo("a", "j", ("server",)))
    create_spool(tmp_path, SpoolInfo("a", "j", ("server", "client")))
    assert read_spool_info(tmp_path).cursors == ("server", "client")
    for other in (SpoolInfo("b", "j", ("server",)), SpoolInfo("a", "k", ("server",))):
        with pytest.raises(SpoolError, match="own folder"):
            create_spool(tmp_path, other)


def test_a_spool_that_cannot_be_created_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SpoolError, match="file/spool"):
        create_spool(tmp_path / "file" / "spool", SpoolInfo("a", "j", ("server",)))


def test_a_spool_that_has_no_room_is_created_on_another_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    info = SpoolInfo("site-1", "job-1", ("server",))
    with small_disk(tmp_path / "disk", 64 << 10) as disk, small_disk(tmp_path / "temporary", 64 << 10) as temporary:
        monkeypatch.setattr(tempfile, "tempdir", str(temporary))
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(bytes(1 << 20))

        elsewhere = create_spool_anywhere(disk / "spool", info)

        assert elsewhere.parent == temporary
        assert read_spool_info(elsewhere) == info
        assert f"is in {elsewhere} instead" in caplog.text
        with pytest.raises(OSError, match="No space"):
            (temporary / "filler").write_bytes(bytes(1 << 20))
        assert create_spool_anywhere(disk / "spool", info) == disk / "spool"  # where it is expected now
        assert SpoolWriter(disk / "spool").info == info


def test_a_folder_of_another_job_is_never_used_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new_spool(tmp_path / "spool")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    elsewhere = create_spool_anywhere(tmp_path / "spool", SpoolInfo("site-1", "job-2", ("server",)))
    assert elsewhere.parent == tmp_path / "temporary"
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(SpoolError, match="own folder"):
        create_spool_anywhere(tmp_path / "spool", SpoolInfo("site-1", "job-2", ("server",)))


def test_a_forked_child_writes_a_stream_of_its_own(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path))
    for i in range(10):
        writer.log({"parent": i})
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            for i in range(20):
                writer.log({"child": 100 + i})
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for i in range(10, 15):
        writer.log({"parent": i})

    streams = read_spool(tmp_path)
    parent = streams.pop(spool_of(writer).stream)
    (child,) = streams.values()
    assert values(parent) == list(range(15))
    assert values(child) == list(range(100, 120))
    assert [r.seq for r in child] == list(range(20))
    counts = SpoolReader(tmp_path, "server").counts()
    assert sorted(c.logged for c in counts.values()) == [15, 20]


def test_a_fork_while_other_threads_log_neither_hangs_nor_loses(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path))
    stop = threading.Event()
    counts = Counter[str]()

    def work(name: str) -> None:
        while not stop.is_set():
            writer.log({name: counts[name]})
            counts[name] += 1

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    children = []
    for _ in range(20):
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that hangs is ended, and seen
            writer.log({"child": 1.0})
            os._exit(0)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    stop.set()
    for thread in threads:
        thread.join()

    assert codes == [0] * 20
    streams = read_spool(tmp_path)
    own = streams.pop(spool_of(writer).stream)
    assert [r.seq for r in own] == list(range(counts["a"] + counts["b"]))
    assert [[r.seq for r in records] for records in streams.values()] == [[0]] * 20


@pytest.mark.parametrize("after", [50, 3000])
def test_every_log_call_that_returned_before_sigkill_is_there(tmp_path: Path, after: int) -> None:
    new_spool(tmp_path, max_bytes=1 << 20)  # small segments, so that it dies among several
    code = """
        import os, sys
        from trackhub.writer.writer import Writer
        writer = Writer(sys.argv[1])
        i = 0
        while True:
            writer.log({"i": i}, i)
            os.write(1, b"%d\\n" % i)
            i += 1
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(after)]
        process.kill()
        lines += process.stdout.readlines()
    returned = sum(line.endswith(b"\n") for line in lines)

    (records,) = read_spool(tmp_path).values()

    assert values(records)[:returned] == list(range(returned))
    assert returned <= len(records) <= returned + 1
    reader = SpoolReader(tmp_path, "server")
    assert settle_all(reader, final=True) == len(records)
    (count,) = reader.counts().values()
    assert_accounted(count, len(records))


def test_a_full_spool_drops_the_newest_counts_them_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    now = 0.0
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=64 << 10), clock=lambda: now)
    for _ in range(200):
        spool.append(text(1000), None, 1.0)
    kept = len(read_spool(tmp_path)[spool.stream])
    size = sum(f.stat().st_size for f in tmp_path.iterdir())
    reader = SpoolReader(tmp_path, "server")

    assert 0 < kept < 64
    assert size <= 64 << 10
    (before,) = reader.counts().values()
    assert_accounted(before, 200)
    assert before.dropped == {"spool_full": 200 - kept}
    assert settle_all(reader) == kept
    now += 10
    spool.append(text(1000), None, 2.0)
    assert settle_all(reader) == 1
    (after,) = reader.counts().values()
    assert_accounted(after, 201)
    assert (after.acked, after.dropped) == (kept + 1, {"spool_full": 200 - kept})
    spool.close()


def test_a_full_spool_makes_no_files(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=1 << 20))
    for _ in range(20):
        spool.append(text(200 << 10), None, 1.0)  # larger than a segment
    files = len(list(tmp_path.iterdir()))
    for _ in range(200):
        spool.append(text(200 << 10), None, 1.0)
    assert len(list(tmp_path.iterdir())) == files
    spool.close()


def test_a_small_record_still_fits_where_a_large_one_does_not(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=1 << 20))
    for _ in range(8):
        spool.append(text(200 << 10), None, 1.0)
    spool.append(text(10), None, 1.0)
    records = read_spool(tmp_path)[spool.stream]
    assert isinstance(records[-1].payload, Text)
    assert len(records[-1].payload.text) == 10
    assert Gap in {type(r.payload) for r in records}
    spool.close()


def test_the_warning_about_drops_comes_once_a_minute(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=4096), clock=lambda: now)
    for _ in range(100):
        spool.append(text(3000), None, 1.0)
        now += 0.1
    assert caplog.text.count("spool_full") == 1
    now += 60
    spool.append(text(3000), None, 1.0)
    assert caplog.text.count("spool_full") == 2
    spool.close()


def test_segments_are_rotated_in_order_and_deleted_once_acknowledged(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=80_000))
    for i in range(60):
        spool.append(Metrics({"k" * 900: float(i)}), i, 1.0)
    segments = sorted(tmp_path.glob("*.spool"))
    assert len(segments) > 4
    assert values(read_spool(tmp_path)[spool.stream]) == list(range(60))
    reader = SpoolReader(tmp_path, "server")

    assert settle_all(reader) == 60
    assert sorted(tmp_path.glob("*.spool")) == segments[-1:]
    spool.append(Metrics({"after": 60.0}), 60, 1.0)
    assert settle_all(reader) == 1
    spool.close()


def test_a_segment_stays_until_every_reader_is_past_it(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path, "server", "client", max_bytes=80_000))
    for i in range(60):
        spool.append(Metrics({"k" * 900: float(i)}), i, 1.0)
    segments = sorted(tmp_path.glob("*.spool"))
    server, client = SpoolReader(tmp_path, "server"), SpoolReader(tmp_path, "client")

    assert settle_all(server) == 60
    assert sorted(tmp_path.glob("*.spool")) == segments
    while len(list(tmp_path.glob("*.spool"))) > 1:
        batch = client.next_batch(1, 1 << 20)
        assert batch is not None
        client.settle(batch)
        # What the slower reader still needs is there.
        assert all((tmp_path / s.name).exists() for s in segments[batch.segment :])
    assert settle_all(client) > 0
    for reader in (server, client):
        (count,) = reader.counts().values()
        assert (count.acked, count.spooled) == (60, 0)
    assert spool.acked() == (60, 0)
    spool.close()


def test_a_drop_is_counted_even_if_nothing_else_was_ever_logged(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path))
    spool.drop("unconvertible", "a model")
    (count,) = SpoolReader(tmp_path, "server").counts().values()
    assert_accounted(count, 1)
    assert count.dropped == {"unconvertible": 1}
    spool.append(Metrics({"a": 1.0}), 0, 1.0)
    assert [(r.seq, r.payload) for r in read_spool(tmp_path)[spool.stream]] == [
        (0, Gap(1, "unconvertible")),
        (1, Metrics({"a": 1.0})),
    ]
    spool.close()


def test_a_record_that_is_too_large_for_a_frame_uses_no_number(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path))
    with pytest.raises(ValueError, match="limit"):
        spool.append(text(2 << 20), None, 1.0)
    spool.append(text(1), None, 1.0)
    assert [r.seq for r in read_spool(tmp_path)[spool.stream]] == [0]
    spool.close()


def test_the_descriptor_and_the_folder_may_vanish_and_training_goes_on(tmp_path: Path) -> None:
    folder = new_spool(tmp_path / "spool", max_bytes=8000)
    spool = SpoolWriter(folder)
    spool.append(text(500), None, 1.0)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    for _ in range(20):
        spool.append(text(500), None, 1.0)
    assert spool.next_seq == 21
    spool.close()


@pytest.mark.parametrize("size", [60, 1000, 5000])
def test_a_full_disk_drops_and_counts_and_tracking_goes_on_when_there_is_space(tmp_path: Path, size: int) -> None:
    with small_disk(tmp_path / "disk", 512 << 10) as disk:
        writer = Writer(new_spool(disk / "spool"))
        filler = disk / "filler"
        with filler.open("wb") as file:
            file.write(b"x" * (128 << 10))
        logged = 0
        for _ in range(int((500 << 10) / size)):
            writer.log_text("t", "x" * size)
            logged += 1
        with pytest.raises(OSError, match="No space") as full:  # it is full indeed
            (disk / "probe").write_bytes(b"x" * 16384)
        assert full.value.errno == errno.ENOSPC
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(disk)
            Path(tmp_path / "model").write_bytes(b"m" * (64 << 10))
            writer.log_artifact(tmp_path / "model")
        assert list((disk / "spool").glob("*.blob")) == []
        filler.unlink()
        (disk / "probe").unlink(missing_ok=True)
        for _ in range(5):
            writer.log_text("t", "after")
            logged += 1

        records = read_spool(disk / "spool")[spool_of(writer).stream]
        gaps = [r.payload for r in records if isinstance(r.payload, Gap)]
        kept = len(records) - len(gaps)
        assert kept + sum(g.count for g in gaps) == logged
        assert {g.reason for g in gaps} == {"disk_full"}
        assert [getattr(r.payload, "text", "") for r in records[-5:]] == ["after"] * 5
        reader = SpoolReader(disk / "spool", "server")
        assert settle_all(reader) == kept
        counts = reader.counts()
        assert_accounted(counts[spool_of(writer).stream], logged)
        assert counts[spool_of(writer).stream].dropped == {"disk_full": logged - kept}
        assert_accounted(counts[spool_of(writer).files_stream], 1)
        assert counts[spool_of(writer).files_stream].dropped == {"disk_full": 1}
        writer.close()


def test_drops_are_counted_while_the_disk_is_full_and_nothing_can_be_written(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 256 << 10) as disk:
        writer = Writer(new_spool(disk / "spool"))
        writer.log({"first": 1.0})
        with pytest.raises(OSError, match="No space"), (disk / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 4096)
        for _ in range(1000):
            writer.log_text("t", "x" * 500)

        logged, dropped, *_ = read_ledger(disk / "spool" / f"{spool_of(writer).stream}.ledger")
        assert logged == 1001
        assert dropped["disk_full"] > 990
        (count,) = SpoolReader(disk / "spool", "server").counts().values()
        assert_accounted(count, 1001)
        writer.close()


def test_a_write_that_the_system_refuses_for_another_reason_is_counted_as_such(tmp_path: Path) -> None:
    """A limit on the size of files gives short writes, then EFBIG."""
    new_spool(tmp_path)
    code = """
        import resource, signal, sys
        from trackhub.writer.writer import Writer
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        writer = Writer(sys.argv[1])
        for i in range(100):
            writer.log_text("t", "x" * 300, i)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        writer.log_text("t", "after", 100)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(tmp_path)], check=True, timeout=60)

    (records,) = read_spool(tmp_path).values()
    reader = SpoolReader(tmp_path, "server")
    kept = settle_all(reader, final=True)
    (count,) = reader.counts().values()
    assert 10 < kept < 40
    assert_accounted(count, 101)
    assert sum(count.dropped.values()) == 101 - kept
    assert set(count.dropped) <= {"io_error", "disk_full"}
    assert getattr(records[-1].payload, "text", "") == "after"


@pytest.mark.parametrize("max_bytes", [20_000, 1 << 30])
def test_a_process_without_free_descriptors_goes_on(tmp_path: Path, max_bytes: int) -> None:
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=max_bytes))
    spool.append(text(100), None, 1.0)
    segment = spool._stream._segment
    segment.limit = segment.offset  # it must look at the folder, for which it needs a descriptor
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/proc/self/fd"))
    held: list[int] = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 5, hard))
        with pytest.raises(OSError, match="Too many open files"):
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        for _ in range(10):
            spool.append(text(1000), None, 1.0)
    finally:
        for fd in held:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    spool.append(text(1), None, 1.0)
    records = read_spool(tmp_path)[spool.stream]
    assert records[-1].seq == 11
    (count,) = SpoolReader(tmp_path, "server").counts().values()
    assert_accounted(count, 12)
    spool.close()


def test_other_threads_log_while_a_large_file_is_copied(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path))
    copying, go_on = threading.Event(), threading.Event()

    def source(path: Path) -> None:
        path.write_bytes(b"x")
        copying.set()
        assert go_on.wait(20)

    blob = threading.Thread(target=spool.append_blob, args=(new_blob(1, source), None, 1.0), daemon=True)
    blob.start()
    assert copying.wait(20)
    spool.append(Metrics({"a": 1.0}), 0, 2.0)
    go_on.set()
    blob.join(20)

    streams = read_spool(tmp_path)
    assert [record.payload for record in streams[spool.stream]] == [Metrics({"a": 1.0})]
    assert [record.payload for record in streams[spool.files_stream]] == [Text("blob", f"{spool.files_stream}-0")]
    assert (tmp_path / f"{spool.files_stream}-0.blob").read_bytes() == b"x"
    assert list(tmp_path.glob("*.part")) == []
    spool.close()


def test_a_log_handler_that_logs_to_the_run_does_not_wait_for_a_dropped_record(tmp_path: Path) -> None:
    """One thread drops a record and warns; another one is in the handler already, and logs to the same spool."""
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=4096))
    in_handler, dropping = threading.Event(), threading.Event()

    class ToSpool(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            in_handler.set()
            dropping.wait(1)  # then the other one waits for this handler, or has gone past
            spool.append(Metrics({"lines": 1.0}), None, 1.0)

        def acquire(self) -> None:
            if in_handler.is_set():
                dropping.set()
            super().acquire()

    handler, logger = ToSpool(), logging.getLogger("trackhub.spool.writing")
    logger.addHandler(handler)
    try:
        line = threading.Thread(target=logger.error, args=("a line",), daemon=True)
        line.start()
        assert in_handler.wait(20)
        drop = threading.Thread(target=spool.append, args=(text(5000), None, 1.0), daemon=True)
        drop.start()
        for thread in (line, drop):
            thread.join(20)
            assert not thread.is_alive()
    finally:
        logger.removeHandler(handler)
    spool.close()


def test_a_file_may_take_all_the_room_that_a_spool_has(tmp_path: Path) -> None:
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=8 << 20))

    spool.append_blob(new_blob(7 << 20, Path.touch), None, 1.0)
    spool.append_blob(new_blob(9 << 20, Path.touch), None, 1.0)
    spool.close()

    (count,) = SpoolReader(tmp_path, "server").counts().values()
    assert (count.logged, count.dropped) == (2, {"spool_full": 1})
