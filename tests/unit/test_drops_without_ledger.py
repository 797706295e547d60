# SPDX-License-Identifier: Apache-2.0
"""Drops of a writer whose ledger cannot be made: the process stores them later, or the counts say that some lack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from tests.unit.local_runs import open_local, report_of
from tests.unit.readers_and_bad_backends import allow_inodes, assert_accounted, new_spool, small_disk
from trackhub.delivery.report import Counted
from trackhub.spool.counts import NO_STREAM, StreamCount, add_up
from trackhub.spool.process_drops import process_drops
from trackhub.spool.reading import SpoolReader
from trackhub.spool.uncounted_mark import Mark, has_marks, make_marks
from trackhub.writer.writer import Writer

NO_DESCRIPTORS = """
    import os, resource, sys
    from pathlib import Path
    from tests.unit.local_runs import open_local
    from trackhub.spool.reading import SpoolReader
    from trackhub.spool.uncounted_mark import has_marks
    from trackhub.writer.writer import Writer
    held = []
    def use_up():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            while True:
                held.append(os.open("/dev/null", os.O_RDONLY))
        except OSError:
            pass
    def free():
        while held:
            os.close(held.pop())
"""


def run(code: str, *arguments: object) -> str:
    """Run a script that can use up its descriptors, and return what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(NO_DESCRIPTORS) + textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def count_all(spool: Path) -> StreamCount:
    return add_up(SpoolReader(spool, "server").counts().values())


CLOSED = "with Writer() as other: log(other)"
LEFT_OPEN = "kept.append(Writer()); log(kept[-1])"


@pytest.mark.parametrize("use", [CLOSED, LEFT_OPEN], ids=["closed", "left open"])
def test_what_short_writers_drop_without_descriptors_is_counted_in_the_end(tmp_path: Path, use: str) -> None:
    code = f"""
        def log(writer):
            for i in range(5):
                writer.log({{"a": 1.0}})
        kept = []
        run = open_local(Path(sys.argv[1]))
        run.log({{"a": 1.0}})
        use_up()
        for _ in range(10):
            {use}
        free()
        run.close()
        report = run.report
        at_site = report.sites["local"].at_site
        assert report.balanced, report
        assert (at_site.logged, at_site.acked, at_site.dropped) == (51, 1, {{"io_error": 50}}), at_site
        assert report.sites["local"].counted == "final"
    """
    printed = run(code, tmp_path)
    assert printed.count("tracking dropped a record") == 1


def test_what_a_forked_child_drops_without_descriptors_makes_the_counts_incomplete(tmp_path: Path) -> None:
    code = """
        run = open_local(Path(sys.argv[1]))
        run.log({"a": 1.0})
        use_up()
        child = os.fork()
        if child == 0:
            run.log({"a": 1.0})
            os._exit(0)
        os.waitpid(child, 0)
        free()
        run.log({"a": 1.0})
        run.close()
        site = run.report.sites["local"]
        assert (site.counted, site.at_site.logged, run.report.balanced) == ("incomplete", 2, False), site
    """
    run(code, tmp_path)


def test_a_process_stores_its_drops_with_its_next_records(tmp_path: Path) -> None:
    code = """
        import time
        writer, other = Writer(sys.argv[1]), Writer(sys.argv[1])
        writer.log({"a": 1.0})
        use_up()
        other.log({"a": 1.0})
        other.close()
        free()
        assert has_marks(Path(sys.argv[1]))
        deadline = time.monotonic() + 20
        while has_marks(Path(sys.argv[1])):
            writer.log({"a": 1.0})
            assert time.monotonic() < deadline
        os._exit(0)
    """
    run(code, new_spool(tmp_path / "spool"))

    count = count_all(tmp_path / "spool")
    assert (count.dropped, count.is_complete) == ({"io_error": 1}, True)
    assert count.logged == count.spooled + 1


def test_a_process_stores_its_drops_and_left_out_values_when_it_ends(tmp_path: Path) -> None:
    code = """
        writer = Writer(sys.argv[1])
        use_up()
        writer.log({"a": 1.0, "b": "not a number"})
        del writer
        free()
    """
    run(code, new_spool(tmp_path / "spool"))

    count = count_all(tmp_path / "spool")
    assert_accounted(count, 1)
    assert (count.dropped, count.altered, count.is_complete) == ({"io_error": 1}, {"invalid_value": 1}, True)


def test_a_process_that_ends_without_a_descriptor_says_what_is_in_no_count(tmp_path: Path) -> None:
    code = """
        writer = Writer(sys.argv[1])
        use_up()
        for _ in range(7):
            writer.log({"a": 1.0})
        writer.close()
    """
    printed = run(code, new_spool(tmp_path / "spool"))

    assert "this process has dropped 7 records" in printed
    counts = SpoolReader(tmp_path / "spool", "server").counts()
    assert not add_up(counts.values()).is_complete
    assert counts.keys() == {NO_STREAM}


def test_a_killed_process_with_drops_in_no_ledger_makes_the_counts_incomplete(tmp_path: Path) -> None:
    code = """
        writer = Writer(sys.argv[1])
        use_up()
        writer.log({"a": 1.0})
        os.kill(os.getpid(), 9)
    """
    script = textwrap.dedent(NO_DESCRIPTORS) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script, str(new_spool(tmp_path / "spool"))], check=False, timeout=60)

    assert done.returncode == -signal.SIGKILL
    assert not count_all(tmp_path / "spool").is_complete


@pytest.mark.parametrize("has_room_at_the_end", [True, False])
def test_more_writers_than_a_full_disk_has_spares_are_counted_or_missed(
    tmp_path: Path, has_room_at_the_end: bool
) -> None:
    with small_disk(tmp_path / "disk", 8 << 20, inodes=400) as disk:
        run = open_local(disk)
        run.log({"a": 1.0})
        with pytest.raises(OSError, match="No space"):
            for i in range(400):
                (disk / f"filler-{i}").touch()
        for _ in range(30):
            with Writer() as other:
                for _ in range(5):
                    other.log({"a": 1.0})
        if has_room_at_the_end:
            allow_inodes(disk)
        run.close()
        site = report_of(run).sites["local"]

    assert site.at_site is not None
    assert (site.counted is Counted.FINAL) == report_of(run).balanced == has_room_at_the_end
    if has_room_at_the_end:
        assert (site.at_site.logged, site.at_site.dropped) == (151, {"disk_full": 150})


def test_one_process_warns_of_its_drops_once_a_minute_whatever_its_writers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    spool, other_spool = new_spool(tmp_path / "spool", max_bytes=2048), new_spool(tmp_path / "other", max_bytes=2048)
    for _ in range(5):
        with Writer(spool) as writer:
            writer.log_text("t", "x" * 3000)
    assert caplog.text.count("this process has dropped 1 so far") == 1

    with Writer(other_spool) as writer:
        writer.log_text("t", "x" * 3000)
    assert caplog.text.count("this process has dropped 1 so far") == 2
    assert caplog.text.count("tracking dropped a record") == 2


def test_a_mark_is_its_owners_and_one_more_than_there_is_place_for_stays(tmp_path: Path) -> None:
    make_marks(tmp_path)
    parent = Mark(tmp_path)
    parent.set()
    child = parent.in_child()
    child.clear()
    assert has_marks(tmp_path)
    child.set()
    parent.clear()
    assert has_marks(tmp_path)
    child.clear()
    assert not has_marks(tmp_path)

    many = [Mark(tmp_path) for _ in range(65)]
    for mark in many:
        mark.set()
    for mark in many:
        mark.clear()
    assert has_marks(tmp_path)
    make_marks(tmp_path)
    assert has_marks(tmp_path), "a sender that starts again keeps the marks"


def test_what_a_process_knows_of_ended_jobs_does_not_grow(tmp_path: Path) -> None:
    open_before = len(os.listdir("/proc/self/fd"))
    for i in range(20):
        run = open_local(tmp_path, job=f"job-{i}")
        run.log({"a": 1.0})
        run.close()
        del run
    assert len(os.listdir("/proc/self/fd")) <= open_before + 5


@pytest.mark.skipif(os.getuid() != 0, reason="the test becomes another user, and only root can")
def test_a_script_that_changes_its_user_before_its_first_record_has_incomplete_counts() -> None:
    with tempfile.TemporaryDirectory() as folder:  # which other users can reach, unlike pytest's own
        os.chmod(folder, 0o755)
        spool = new_spool(Path(folder) / "spool")
        code = "writer = Writer(sys.argv[1]); os.setgid(65534); os.setuid(65534); writer.log({'a': 1.0})"
        assert "tracking dropped a record (io_error" in run(code, spool)
        assert not count_all(spool).is_complete


def test_drops_for_another_job_in_the_same_folder_are_not_counted_there(tmp_path: Path) -> None:
    spool = new_spool(tmp_path)
    drops = process_drops(spool, SpoolReader(spool, "server").info)
    (spool / "spool.json").rename(tmp_path / "away")
    drops.add("io_error")
    other = (tmp_path / "away").read_text().replace("job-1", "job-2")
    (spool / "spool.json").write_text(other)
    drops.store(at_once=True)
    assert not list(spool.glob("*.ledger"))

    (tmp_path / "away").rename(spool / "spool.json")
    drops.store(at_once=True)
    assert_accounted(count_all(spool), 1)
