# SPDX-License-Identifier: Apache-2.0
"""A reader looks at all streams of a spool in one pass, passes over what it cannot read, and retires what has ended."""

from __future__ import annotations

import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.unit.readers_and_bad_backends import STREAM, ModelReceiver, assert_accounted, new_spool, settle_all
from trackhub.records import Text
from trackhub.spool import reading
from trackhub.spool.changed_streams import look
from trackhub.spool.counts import add_up
from trackhub.spool.layout import segment_name
from trackhub.spool.reading import SpoolReader
from trackhub.spool.room import new_part
from trackhub.spool.writing import SpoolWriter
from trackhub.writer.writer import Writer


def write(folder: Path, n: int) -> SpoolWriter:
    spool = SpoolWriter(folder)
    for i in range(n):
        spool.append(Text("k", f"{i}".ljust(20, ".")), i, float(i))
    return spool


def as_user(uid: int, work: Callable[[], object]) -> None:
    """Do this in a child process of another user."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setgid(uid)
            os.setuid(uid)
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="the test becomes other users, and only root can")
def test_what_a_trainer_of_another_user_logs_is_counted_by_its_ledger_and_holds_up_no_other() -> None:
    sender, trainer = 65534, 1001
    with tempfile.TemporaryDirectory() as folder:  # which other users can reach, unlike pytest's own
        spool = Path(folder) / "spool"
        os.chmod(folder, 0o755)
        spool.mkdir()
        os.chown(spool, sender, sender)
        as_user(sender, lambda: new_spool(spool))
        os.chmod(spool, 0o777)
        for user, n in ((trainer, 250), (sender, 100)):
            as_user(user, partial(write, spool, n))

        def read() -> None:
            reader, receiver = SpoolReader(spool, "server"), ModelReceiver()
            reader.begin_pass(final=True)
            while batch := reader.next_batch(1000, 1 << 20):
                receiver.accept(batch)
                reader.settle(batch)
            assert reader.has_problems()
            total = add_up(reader.counts().values())
            assert (total.logged, total.acked, total.unreadable, total.spooled) == (350, 100, 250, 0)
            assert total.is_complete

        as_user(sender, read)


def test_a_stream_whose_ledger_and_records_cannot_be_read_makes_the_count_incomplete(tmp_path: Path) -> None:
    write(new_spool(tmp_path), 5)
    spool = write(tmp_path, 10)
    for name in (segment_name(spool.stream, 0), f"{spool.stream}.ledger"):
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
    reader = SpoolReader(tmp_path, "server")

    assert settle_all(reader) == 5

    total = add_up(reader.counts().values())
    assert (total.logged, total.acked, total.is_complete) == (5, 5, False)


def test_a_ledger_that_had_no_room_makes_the_count_incomplete(tmp_path: Path) -> None:
    """Its writer counts in memory what it drops, and nobody else knows it."""
    (new_spool(tmp_path) / f"{STREAM}.ledger").touch()
    (count,) = SpoolReader(tmp_path, "server").counts().values()
    assert (count.logged, count.is_complete) == (0, False)


def test_a_stream_that_can_be_read_again_is_delivered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    spool = write(new_spool(tmp_path), 10)
    path, aside = tmp_path / segment_name(spool.stream, 0), tmp_path / "aside"
    path.rename(aside)
    path.mkdir()
    reader = SpoolReader(tmp_path, "server")
    for _ in range(3):
        assert settle_all(reader) == 0
        assert reader.has_problems()
    assert caplog.text.count(f"{path}: Is a directory") == 1
    path.rmdir()
    aside.rename(path)
    assert settle_all(reader) == 10
    assert not reader.has_problems()


def test_a_folder_that_cannot_be_read_is_an_error_and_not_an_empty_spool(tmp_path: Path) -> None:
    folder = new_spool(tmp_path / "spool")
    reader = SpoolReader(folder, "server")
    folder.rename(tmp_path / "elsewhere")
    for ask in (reader.begin_pass, reader.ends, reader.counts, lambda: reader.has_bytes(1)):
        with pytest.raises(FileNotFoundError):
            ask()


def test_a_pass_hands_out_what_was_there_when_it_began(tmp_path: Path) -> None:
    spool = write(new_spool(tmp_path), 10)
    reader = SpoolReader(tmp_path, "server")
    reader.begin_pass()
    seen = []
    while batch := reader.next_batch(4, 1 << 20):
        seen.append(batch.records)
        reader.settle(batch)
        spool.append(Text("k", "more"), 0, 0.0)
        write(tmp_path, 1)
    assert seen == [4, 4, 4]  # the last one takes two of the new ones along
    assert settle_all(reader) == 4


def test_many_streams_cost_one_look_at_the_folder_and_not_one_for_each_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_spool(tmp_path)
    for _ in range(30):
        write(tmp_path, 5).close()
    looks = Counter[str]()

    def noted(folder: Path, *args: Any) -> None:
        looks["looks"] += 1
        look(folder, *args)

    monkeypatch.setattr(reading, "look", noted)
    assert settle_all(SpoolReader(tmp_path, "server")) == 150
    assert looks["looks"] == 2


def ended(folder: Path, n: int) -> None:
    """Write a stream whose writer then ends."""
    write(folder, n).close()


def pass_over(reader: SpoolReader) -> None:
    """Make a pass over a spool, as the owner does."""
    reader._ask_at = 0.0  # it asks once a second which writers have ended
    settle_all(reader)
    reader.tidy_up()


def test_streams_that_have_ended_are_retired_and_the_last_ones_keep_their_files(tmp_path: Path) -> None:
    new_spool(tmp_path)
    for _ in range(50):
        ended(tmp_path, 3)
    live = write(tmp_path, 2)
    reader = SpoolReader(tmp_path, "server")
    settle_all(reader)

    pass_over(reader)

    left = {path.name[:32] for path in tmp_path.glob("*.spool")}
    assert live.stream in left
    assert (len(left), reader.retired_streams()) == (17, 34)
    assert len(list(tmp_path.glob("*.ledger"))) == len(list(tmp_path.glob("*.ack"))) == 17
    for again in (reader, SpoolReader(tmp_path, "server")):
        assert_accounted(add_up(again.counts().values()), 152)
        assert add_up(again.counts().values()).acked == 152


def test_the_files_of_an_ended_stream_go_at_once_if_they_take_much_room(tmp_path: Path) -> None:
    new_spool(tmp_path, max_bytes=80_000)
    ended(tmp_path, 100)
    ended(tmp_path, 3)
    reader = SpoolReader(tmp_path, "server")
    settle_all(reader)
    pass_over(reader)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.spool")) < 10_000
    assert_accounted(add_up(reader.counts().values()), 103)


def test_a_stream_stays_while_another_reader_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_KEPT_STREAMS", 0)
    new_spool(tmp_path, "server", "client")
    for _ in range(2):
        ended(tmp_path, 100)
    server, client = SpoolReader(tmp_path, "server"), SpoolReader(tmp_path, "client")
    settle_all(server)
    pass_over(server)
    assert len(list(tmp_path.glob("*.spool"))) == 2
    assert settle_all(client) == 200
    pass_over(client)
    pass_over(server)
    pass_over(client)
    assert list(tmp_path.glob("*.spool")) == []
    assert list(tmp_path.glob("*.ledger")) == []
    for reader in (server, client):
        assert_accounted(add_up(reader.counts().values()), 200)


def test_what_a_crash_left_behind_is_deleted(tmp_path: Path) -> None:
    """A blob whose record is acknowledged, and the part of a blob whose writer was killed."""
    new_spool(tmp_path)
    with Writer(tmp_path) as writer:
        writer.log_artifact(__file__)
    (blob,) = tmp_path.glob("*.blob")
    content = blob.read_bytes()
    settle_all(SpoolReader(tmp_path, "server"))
    assert not blob.exists()
    blob.write_bytes(content)
    part = new_part(tmp_path, blob.name[:32], 5)
    part.touch()

    reader = SpoolReader(tmp_path, "server")
    pass_over(reader)
    pass_over(reader)

    assert not blob.exists()
    assert not part.exists()


def test_a_count_by_the_ledgers_needs_no_look_at_the_records(tmp_path: Path) -> None:
    """So a full spool is counted in the time that is left, whatever is in it."""
    spool = SpoolWriter(new_spool(tmp_path, max_bytes=8000))
    for i in range(300):
        spool.append(Text("k", f"{i}"), i, float(i))
    spool.drop("unconvertible", "a model")
    reader = SpoolReader(tmp_path, "server")
    for n in (0, 1, 2):
        exact = reader.counts()
        assert reader.counts(by_ledger=True) == exact
        assert reader.counts(until=0.0) == exact
        assert_accounted(exact[spool.stream], 301)
        for _ in range(n):
            batch = reader.next_batch(20, 1 << 20)
            assert batch is not None
            reader.settle(batch, {"refused": batch.records} if n == 2 else None)


class Work:
    """Counts the calls of functions, Python's and C's, that this thread makes: the work, whatever a machine's speed."""

    def __init__(self) -> None:
        self.calls = 0

    def __enter__(self) -> Work:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: object, event: str, argument: object) -> None:
        self.calls += event in ("call", "c_call")


@pytest.mark.long
def test_the_work_for_a_short_lived_writer_does_not_grow_with_those_before_it(tmp_path: Path) -> None:
    """Each logs a few records and ends. The reader takes them up as it does while a job runs."""
    new_spool(tmp_path)
    reader = SpoolReader(tmp_path, "server")
    by_hundred, looked_at = [], []
    for _ in range(20):
        with Work() as work:
            for _ in range(100):
                ended(tmp_path, 5)
                settle_all(reader)
                pass_over(reader)
        by_hundred.append(work.calls)
        looked_at.append(len(list(tmp_path.iterdir())))

    assert add_up(reader.counts().values()).acked == 2000 * 5
    assert max(by_hundred[2:]) < 1.5 * by_hundred[1], by_hundred
    assert max(looked_at) < 200, "the files of ended writers stay"
    with Work() as idle:
        assert settle_all(reader) == 0
    assert idle.calls < 500, "a look at an idle spool"
