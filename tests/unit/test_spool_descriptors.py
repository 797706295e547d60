# SPDX-License-Identifier: Apache-2.0
"""A script that closes all descriptors, as daemons do: no record is lost in silence, and no other file is written."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import new_spool, read_spool, settle_all, values
from trackhub.process_lock import ProcessLock
from trackhub.records import Metrics
from trackhub.spool.reading import SpoolReader

_BEGIN = """
import gc, os, resource, signal, sys, time
from pathlib import Path
from trackhub.spool.round_file import RoundFile
from trackhub.writer.writer import Writer

spool, mine = Path(sys.argv[1]), Path(sys.argv[2])
signal.alarm(60)  # a script that hangs is ended, and seen


def take_all(below):
    '''Open files of this script's own until all numbers below this one are taken.'''
    taken = []
    while True:
        file = open(mine / str(len(taken)), "wb")
        taken.append(file)
        if file.fileno() >= below - 1:
            return taken


def leave():
    '''Write to the files, which are all still open, and close them. An error ends the script.'''
    for file in taken:
        os.fstat(file.fileno())
        file.write(b"mine")
        file.close()
"""


def _run(folder: Path, code: str) -> tuple[str, list[float]]:
    """Run this script. Return what it logs as warnings, and the values in the spool. Its own files must be intact."""
    spool, mine = new_spool(folder / "spool"), folder / "mine"
    mine.mkdir()
    script = folder / "script.py"
    script.write_text(_BEGIN + textwrap.dedent(code))
    done = subprocess.run(
        [sys.executable, str(script), str(spool), str(mine)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert {path.read_bytes() for path in mine.iterdir()} <= {b"mine"}
    found = [record for records in read_spool(spool).values() for record in records]
    return done.stderr, values([record for record in found if isinstance(record.payload, Metrics)])


@pytest.mark.parametrize("soft_limit", [1024, 60])
def test_a_script_that_closes_all_descriptors_loses_nothing(tmp_path: Path, soft_limit: int) -> None:
    """Its own files then get the numbers that trackhub's had."""
    warnings, found = _run(
        tmp_path,
        f"""
        resource.setrlimit(resource.RLIMIT_NOFILE, ({soft_limit}, {soft_limit}))
        writer = Writer(spool)
        for i in range(1000):
            writer.log({{"a": i}})
        os.closerange(3, {soft_limit})
        taken = take_all(40)
        for i in range(1000, 2000):
            writer.log({{"a": i}})
        writer.close()
        del writer
        gc.collect()
        leave()
        """,
    )

    assert sorted(found) == list(range(2000))
    assert warnings.count("closed descriptors of trackhub's files") == 1
    reader = SpoolReader(tmp_path / "spool", "server")
    assert settle_all(reader, final=True) == 2000
    assert [(count.logged, count.acked, count.dropped) for count in reader.counts().values()] == [(1000, 1000, {})] * 2


def test_closing_the_usual_range_of_descriptors_changes_nothing(tmp_path: Path) -> None:
    warnings, found = _run(
        tmp_path,
        """
        writer = Writer(spool)
        writer.log({"a": 0})
        os.closerange(3, 256)
        taken = take_all(14)
        writer.log({"a": 1})
        writer.close()
        del writer
        leave()
        """,
    )

    assert (found, warnings) == ([0, 1], "")
    assert len(read_spool(tmp_path / "spool")) == 1


def test_a_script_that_ends_with_its_own_files_in_place_of_ours_keeps_them_whole(tmp_path: Path) -> None:
    """It closes neither. Python flushes the files when the interpreter ends, after trackhub's modules are gone."""
    (tmp_path / "late.py").touch()
    _, found = _run(
        tmp_path,
        """
        writer, rounds = Writer(spool), RoundFile(spool, sets=True)
        writer.log({"a": 0})
        os.closerange(3, 1024)
        sys.path.insert(0, str(mine.parent))
        import late  # a module that the interpreter clears after trackhub's, since it was imported later
        late.taken = take_all(14)
        for file in late.taken:
            file.write(b"mine")
        writer.log({"a": 1})
        """,
    )

    assert sorted(found) == [0, 1]
    assert {path.read_bytes() for path in (tmp_path / "mine").iterdir()} == {b"mine"}


def test_a_child_that_closes_all_descriptors_has_streams_of_its_own(tmp_path: Path) -> None:
    warnings, found = _run(
        tmp_path,
        """
        writer = Writer(spool)
        writer.log({"a": 0})
        if (child := os.fork()) == 0:
            os.closerange(3, 1024)
            writer.log({"a": 1})
            os.closerange(3, 1024)
            taken = take_all(14)
            writer.log({"a": 2})
            leave()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        writer.log({"a": 3})
        """,
    )

    assert sorted(found) == [0, 1, 2, 3]
    assert len(read_spool(tmp_path / "spool")) == 3
    assert warnings.count("closed descriptors of trackhub's files") == 1


def test_an_image_after_all_descriptors_were_closed_belongs_to_a_new_stream(tmp_path: Path) -> None:
    _run(
        tmp_path,
        """
        import numpy as np
        writer, image = Writer(spool), np.zeros((4, 4, 3), np.uint8)
        writer.log_image("i", image)
        os.closerange(3, 1024)
        taken = take_all(14)
        writer.log_image("i", image)
        leave()
        """,
    )

    spool = tmp_path / "spool"
    streams = read_spool(spool)
    assert [len(records) for records in streams.values()] == [1, 1]
    assert {path.stem.partition("-")[0] for path in spool.glob("*.blob")} == set(streams)


def test_a_lock_is_not_given_back_through_the_descriptor_of_another_file(tmp_path: Path) -> None:
    lock = ProcessLock.open(tmp_path / "lock")
    number = lock._file.number
    os.close(number)
    with (tmp_path / "mine").open("wb") as mine:
        os.dup2(mine.fileno(), number)
        assert not lock.is_held()
        lock.release()
        assert os.fstat(number).st_ino == os.fstat(mine.fileno()).st_ino
        os.close(number)
