# SPDX-License-Identifier: Apache-2.0
"""Signal handlers may log, raise and close in the middle of a log call."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path
from typing import cast

import pytest

from tests.unit.readers_and_bad_backends import assert_accounted, new_spool, read_spool, settle_all, values
from trackhub.records import Metrics
from trackhub.spool.reading import SpoolReader

HANDLER = """
    import signal, sys
    from trackhub.writer.writer import Writer
    writer = Writer(sys.argv[1])
    count = 0
    armed = False
    class Interrupted(Exception):
        pass
    def handler(signum, frame):
        global count
        if armed:
            count += 1
            act(count)
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
"""


def run(code: str, folder: Path) -> list[int]:
    code = textwrap.dedent(HANDLER) + textwrap.dedent(code) + "\nsignal.setitimer(signal.ITIMER_REAL, 0)"
    command = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return [int(word) for word in done.stdout.split()]


def test_a_signal_handler_may_log(tmp_path: Path) -> None:
    """A handler runs between two steps of whatever the main thread does, also in the middle of a log call."""
    code = """
        def act(n):
            writer.log({"handler": n})
        armed = True
        i = 0
        while count < 1000:
            writer.log({"main": i})
            i += 1
        armed = False
        print(i, count)
    """
    main, handled = run(code, new_spool(tmp_path))

    (records,) = read_spool(tmp_path).values()
    assert [r.seq for r in records] == list(range(main + handled))
    found = [next(iter(cast("Metrics", r.payload).values.items())) for r in records]
    assert [v for k, v in found if k == "main"] == list(range(main))
    assert sorted(v for k, v in found if k == "handler") == list(range(1, handled + 1))


@pytest.mark.parametrize("error", ["Interrupted", "KeyboardInterrupt", "TimeoutError"])
def test_a_signal_handler_may_raise_in_the_middle_of_a_log_call(tmp_path: Path, error: str) -> None:
    """Such as Ctrl-C: the call may or may not have logged, but no number is used twice and the rest goes on."""
    code = f"""
        def act(n):
            global armed
            armed = False
            raise {error}
        i, returned = 0, []
        while count < 500:
            try:
                armed = True
                writer.log({{"main": i}})
                armed = False
            except {error}:
                pass
            else:
                returned.append(i)
            i += 1
        print(i, *returned)
    """
    attempted, *returned = run(code, new_spool(tmp_path, max_bytes=1 << 30))

    (records,) = read_spool(tmp_path).values()
    found = values(records)
    assert len(returned) < attempted
    assert set(returned) <= set(found)
    assert found == sorted(set(found))
    assert [r.seq for r in records] == list(range(len(records)))
    reader = SpoolReader(tmp_path, "server")
    assert settle_all(reader, final=True) == len(records)
    (count,) = reader.counts().values()
    assert_accounted(count, len(records))
    assert count.dropped == {}


def test_a_signal_handler_may_close_the_writer(tmp_path: Path) -> None:
    code = """
        writer = Writer(sys.argv[1], strict=True)
        def act(n):
            writer.close()
        writer.log({"main": 0})  # a writer that never logged leaves no stream
        i = 1
        armed = True
        try:
            while True:
                writer.log({"main": i})
                i += 1
        except Exception as e:
            assert type(e).__name__ == "SpoolError", e
        print(i)
    """
    (logged,) = run(code, new_spool(tmp_path))
    (records,) = read_spool(tmp_path).values()
    assert values(records) == list(range(logged))
