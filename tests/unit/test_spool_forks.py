# SPDX-License-Identifier: Apache-2.0
"""A forked child leaves its parent's streams and locks alone, whatever the parent was doing at that moment."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import json_lines, new_spool, read_spool, spool_of, values
from trackhub.process_lock import ProcessLock
from trackhub.records import Metrics
from trackhub.spool.layout import ledger_file
from trackhub.spool.reader_lock import hold_ended_spool
from trackhub.spool.reading import SpoolReader
from trackhub.spool.writer_ledger import WriterState, read_ledger, writer_state
from trackhub.writer.writer import Writer


def in_child(work: Callable[[], object]) -> int:
    """Do this in a forked child, and return its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            signal.alarm(20)  # a child that hangs is ended, and seen
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_child_leaves_all_streams_also_if_one_descriptor_is_closed_already(tmp_path: Path) -> None:
    """Another thread of the parent may be closing a writer at the moment of the fork."""
    writers = [Writer(new_spool(tmp_path)) for _ in range(20)]
    for writer in writers:
        writer.log({"parent": 0})
        os.close(spool_of(writer)._stream._segment.fd)

    def log() -> None:
        for writer in writers:
            writer.log({"child": 1})

    assert in_child(log) == 0
    streams = read_spool(tmp_path)
    assert [values(streams.pop(spool_of(writer).stream)) for writer in writers] == [[0]] * 20
    assert [values(records) for records in streams.values()] == [[1]] * 20


def test_forks_while_other_threads_open_and_close_writers_lose_nothing(tmp_path: Path) -> None:
    kept = Writer(new_spool(tmp_path))
    stop, logged = threading.Event(), Counter[str]()

    def work(name: str) -> None:
        while not stop.is_set():
            with Writer(tmp_path) as writer:
                for _ in range(3):
                    writer.log({name: logged[name]})
                    logged[name] += 1

    def log_thrice() -> None:
        for n in range(3):
            kept.log({"child": n})

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    try:
        codes = [in_child(log_thrice) for _ in range(60)]
    finally:
        stop.set()
        for thread in threads:
            thread.join()

    assert codes == [0] * 60
    found = Counter[str]()
    for records in read_spool(tmp_path).values():
        assert [record.seq for record in records] == list(range(len(records)))
        found.update(key for record in records if isinstance(record.payload, Metrics) for key in record.payload.values)
    assert found == {**logged, "child": 180}
    assert sum(count.logged for count in SpoolReader(tmp_path, "server").counts().values()) == found.total()


def test_a_signal_handler_that_forks_in_a_log_call_disturbs_neither_process(tmp_path: Path) -> None:
    """The child returns from the handler into the call. If that had begun, it belongs to the parent alone."""
    code = """
        import os, signal, sys
        from trackhub.writer.writer import Writer
        writer, parent, forks, armed = Writer(sys.argv[1]), os.getpid(), 0, False

        def handler(signum, frame):
            global forks, armed
            if not armed or os.getpid() != parent:
                return
            armed = False  # no further fork while this one waits for its child
            forks += 1
            pid = os.fork()
            if pid == 0:
                writer.log({"child": forks})
            else:
                os.waitpid(pid, 0)

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001, 0.002)
        i = 0
        while forks < 100:
            armed = True
            writer.log({"main": i})
            armed = False
            if os.getpid() != parent:
                os._exit(0)
            i += 1
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(i)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(new_spool(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

    streams = sorted(read_spool(tmp_path).items(), key=lambda item: len(item[1]))
    (parent, records), children = streams.pop(), [records for _, records in streams]
    assert values(records) == list(range(int(done.stdout)))
    assert read_ledger(ledger_file(tmp_path, parent)).logged == int(done.stdout)
    # A child may also have made a call of its own, if the signal came before the call or after it.
    assert sorted(values(child)[0] for child in children) == list(range(1, 101))
    assert all([record.seq for record in child] in ([0], [0, 1]) for child in children)
    counts = SpoolReader(tmp_path, "server").counts()
    assert sum(count.logged for count in counts.values()) == len(records) + sum(map(len, children))


def test_a_child_that_outlives_its_parent_keeps_neither_streams_nor_locks(tmp_path: Path) -> None:
    spool, read, write = new_spool(tmp_path / "spool"), *os.pipe()
    code = """
        import os, signal, sys
        from pathlib import Path
        from trackhub.process_lock import ProcessLock
        from trackhub.writer.writer import Writer
        writer = Writer(sys.argv[1])
        writer.log({"parent": 0})
        lock = ProcessLock.open(Path(sys.argv[1], "server.lock"))
        if os.fork() == 0:
            os.write(1, b"forked\\n")
            os.read(int(sys.argv[2]), 1)
            os._exit(0)
        signal.pause()
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(spool), str(read)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[read]) as parent:
        os.close(read)
        assert parent.stdout is not None
        assert parent.stdout.readline() == b"forked\n"
        parent.kill()
        parent.wait()
        try:
            (ledger,) = spool.glob("*.ledger")
            assert writer_state(ledger) is WriterState.ENDED
            hold_ended_spool(spool, "server").release()
        finally:
            os.close(write)


def test_a_lock_conflicts_with_itself_and_is_free_again_once_it_is_given_back(tmp_path: Path) -> None:
    lock = ProcessLock.open(tmp_path / "lock")
    assert lock.is_locked
    with pytest.raises(BlockingIOError):
        ProcessLock.open(tmp_path / "lock")
    assert in_child(lock.release) == 0  # which has none, and so gives none back
    with pytest.raises(BlockingIOError):
        ProcessLock.open(tmp_path / "lock")
    lock.release()
    lock.release()
    ProcessLock.open(tmp_path / "lock").release()


def test_on_a_file_system_without_locks_a_lock_only_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(fd: int, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("trackhub.process_lock.fcntl.flock", flock)
    assert not ProcessLock.open(tmp_path / "lock").is_locked
    with Writer(new_spool(tmp_path / "spool")) as writer:
        writer.log({"a": 1.0})
        assert writer_state(ledger_file(tmp_path / "spool", spool_of(writer).stream)) is WriterState.UNKNOWN
    hold_ended_spool(tmp_path / "spool", "server").release()


def test_a_writer_of_another_machine_is_not_taken_for_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared file system its lock may not be seen here."""
    with Writer(new_spool(tmp_path)) as writer:
        writer.log({"a": 1.0})
        ledger = ledger_file(tmp_path, spool_of(writer).stream)
        assert writer_state(ledger) is WriterState.ALIVE
    assert writer_state(ledger) is WriterState.ENDED
    monkeypatch.setattr("trackhub.spool.writer_ledger.this_machine", lambda: 7)
    assert writer_state(ledger) is WriterState.UNKNOWN


def test_writers_that_are_never_closed_leave_no_descriptor_open(tmp_path: Path) -> None:
    """A script may make a writer in each round. The records of all of them are there."""
    new_spool(tmp_path)
    used = len(os.listdir("/proc/self/fd"))
    for i in range(100):
        Writer(tmp_path).log({"a": i})
    assert len(os.listdir("/proc/self/fd")) == used
    assert sorted(value for records in read_spool(tmp_path).values() for value in values(records)) == list(range(100))


def test_a_script_that_ends_without_closing_its_writer_ends_quietly(tmp_path: Path) -> None:
    code = """
        import sys
        from trackhub.writer.writer import Writer
        writer = Writer(sys.argv[1])
        log = writer.log
        for i in range(10):
            log({"a": i})
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(new_spool(tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    (ledger,) = tmp_path.glob("*.ledger")
    assert writer_state(ledger) is WriterState.ENDED


def test_forked_children_of_a_local_run_end_it_neither_early_nor_for_the_next_one(tmp_path: Path) -> None:
    """A worker that outlives a killed script must not keep the journal locked."""
    read, write = os.pipe()
    code = """
        import os, signal, sys, trackhub
        writer = trackhub.local(["jsonl"], folder=sys.argv[1], job="j")
        writer.log({"a": 1.0})
        if os.fork() == 0:
            os.write(1, b"forked\\n")
            os.read(int(sys.argv[2]), 1)
            os._exit(0)
        signal.pause()
    """
    import trackhub

    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path), str(read)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[read]) as script:
        os.close(read)
        assert script.stdout is not None
        assert script.stdout.readline() == b"forked\n"
        script.kill()
        script.wait()
        try:
            with trackhub.local(["jsonl"], folder=tmp_path, job="j", resume=True) as writer:
                writer.log({"a": 2.0})
        finally:
            os.close(write)
    lines = json_lines(writer.folder / "jsonl" / "j" / "local.jsonl")
    assert sorted(str(line["values"]) for line in lines) == ["{'a': 1.0}", "{'a': 2.0}"]


with contextlib.suppress(AttributeError):  # silence Python 3.12's warning of forks in a process with threads
    pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")


@pytest.mark.parametrize("call", ["open", "write"])
def test_a_fork_while_the_first_segment_is_made_leaves_it_to_the_parent(tmp_path: Path, call: str) -> None:
    """A signal handler can fork right after each call of the operating system that makes the segment."""
    code = """
        import os, sys
        import trackhub.spool.segment_writer as segment_writer
        from trackhub.writer.writer import Writer

        class ForkingOs:
            forked = False

            def __getattr__(self, name):
                real = getattr(os, name)
                if name != sys.argv[2]:
                    return real

                def call_and_fork(*args):
                    result = real(*args)
                    if not ForkingOs.forked:
                        ForkingOs.forked = True
                        pid = os.fork()
                        if pid:
                            os.waitpid(pid, 0)
                    return result
                return call_and_fork

        segment_writer.os = ForkingOs()
        writer, parent = Writer(sys.argv[1]), os.getpid()
        writer.log({"main": 0})
        if os.getpid() != parent:
            os._exit(0)
        writer.log({"main": 1})
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(new_spool(tmp_path)), call]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")

    (records,) = read_spool(tmp_path).values()
    assert values(records) == [0, 1]
    assert [record.seq for record in records] == [0, 1]


@pytest.mark.parametrize("call", ["write_start", "MappedFile", "ProcessLock"])
def test_a_child_forked_while_a_ledger_is_opened_does_not_hold_its_lock(tmp_path: Path, call: str) -> None:
    """Otherwise, a worker that outlives its parent would make the parent's stream look alive for ever."""
    code = """
        import os, signal, sys, threading
        import trackhub.spool.writer_ledger as writer_ledger
        from trackhub.writer.writer import Writer

        forked = threading.Event()

        def fork():
            if os.fork() == 0:
                os.write(1, b"forked\\n")
                os.read(int(sys.argv[3]), 1)
                os._exit(0)
            forked.set()

        def call_and_fork(*args):
            result = real(*args)
            thread.start()
            forked.wait(0.5)  # if no fork may come here, it comes afterwards
            return result

        thread = threading.Thread(target=fork)
        real = getattr(writer_ledger, sys.argv[2])
        setattr(writer_ledger, sys.argv[2], call_and_fork)
        writer = Writer(sys.argv[1])
        writer.log({"a": 1.0})
        os.write(1, b"logged\\n")
        signal.pause()
    """
    spool = new_spool(tmp_path)
    read, write = os.pipe()
    command = [sys.executable, "-c", textwrap.dedent(code), str(spool), call, str(read)]
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[read]) as script:
            assert script.stdout is not None
            lines = {script.stdout.readline(), script.stdout.readline()}
            script.kill()
            script.wait()
            assert lines == {b"forked\n", b"logged\n"}
            (stream,) = read_spool(tmp_path)
            assert writer_state(ledger_file(spool, stream)) is WriterState.ENDED
    finally:
        os.close(read)
        os.close(write)


def test_threads_that_fork_at_once_each_get_back_the_signals_that_they_had_blocked() -> None:
    code = """
        import os, signal, sys, threading
        import trackhub.writer

        def fork_often(mask):
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for _ in range(700):
                if not (child := os.fork()):
                    os._exit(0)
                os.waitpid(child, 0)
                if (now := signal.pthread_sigmask(signal.SIG_BLOCK, ())) != mask:
                    wrong.append((mask, now))
                    return

        sys.setswitchinterval(1e-6)
        wrong = []
        masks = {signal.SIGUSR1}, {signal.SIGTERM}, set()
        threads = [threading.Thread(target=fork_often, args=(mask,)) for mask in masks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        print(wrong)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, timeout=120
    )

    assert done.stdout == "[]\n"
