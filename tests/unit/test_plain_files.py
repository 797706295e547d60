# SPDX-License-Identifier: Apache-2.0
"""trackhub's own files are for their owner alone, and no link or FIFO among them is followed or waited for."""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.readers_and_bad_backends import STREAM, batch_of, metric, new_spool
from trackhub.delivery import Limits, Receiver, RunStatus, Sender, Side, create_spool
from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.journal.journal import Journal
from trackhub.delivery.wire import Chunk, encode
from trackhub.errors import JournalError, RecordError, SpoolError
from trackhub.open_without_links import (
    find_way_out,
    make_folder,
    make_private_folder,
    open_file,
    open_plain,
    read_plain,
)
from trackhub.spool.layout import SpoolInfo
from trackhub.spool.round_file import RoundFile
from trackhub.writer.writer import Writer


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def common_umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_a_receiver_keeps_everything_from_other_users(tmp_path: Path) -> None:
    run = tmp_path / "new" / "run"
    receiver = Receiver(run, job="job", side=Side.LOCAL, backends={"jsonl": {}}, limits=Limits(deadline_s=5))
    receiver.start()
    receiver.handle("site-1", encode(Chunk("0" * 32 + "-0", 1, hashlib.sha256(b"x").hexdigest(), 0, b"x")))
    receiver.handle("site-1", encode(batch_of([metric(0)], STREAM)))
    files_while_open = {path.name: mode(path) for path in (run / "trackhub").iterdir() if path.is_file()}
    receiver.finish(RunStatus.FINISHED)

    assert files_while_open == {"trackhub.db": 0o600, "trackhub.db-wal": 0o600, "trackhub.db-shm": 0o600} | {
        "trackhub.lock": 0o600
    }
    assert {path.name for path in run.rglob("*")} >= {"job.json", "site-1.jsonl", "blobs", "delivery.json"}
    for path in (tmp_path / "new").rglob("*"):
        assert mode(path) == (0o700 if path.is_dir() else 0o600), path


def test_a_spool_keeps_everything_from_other_users(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "a" / "spool")
    with Writer(spool) as writer:
        writer.log({"loss": 1.0})
        writer.log_text("note", "text")

    assert (mode(tmp_path / "a"), mode(spool)) == (0o700, 0o700)
    segments = list(spool.glob("*.spool"))
    assert [mode(segment) for segment in segments] == [0o600]


@pytest.mark.parametrize(("shared", "folder", "file"), [(0o755, 0o755, 0o644), (0o750, 0o750, 0o640)])
def test_in_a_shared_folder_backends_make_shared_files(tmp_path: Path, shared: int, folder: int, file: int) -> None:
    """An operator shares the folder that an option names, such as with those who run TensorBoard."""
    tmp_path.chmod(shared)

    make_folder(tmp_path / "job" / "site")
    os.close(open_file(tmp_path / "job" / "site" / "file", os.O_WRONLY | os.O_CREAT))

    found = [mode(tmp_path / "job"), mode(tmp_path / "job" / "site"), mode(tmp_path / "job" / "site" / "file")]
    assert found == [folder, folder, file]


def test_a_file_that_somebody_shared_stays_shared(tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    file = tmp_path / "site-1.jsonl"
    file.touch()
    file.chmod(0o666)

    os.close(open_file(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND))

    assert mode(file) == 0o666


def test_a_folder_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    """An operator may give a spool to a trainer that runs under another user."""
    tmp_path.chmod(0o755)

    make_private_folder(tmp_path)

    assert mode(tmp_path) == 0o755


def test_a_link_a_fifo_and_a_folder_are_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("secret")
    (tmp_path / "link").symlink_to("file")
    os.mkfifo(tmp_path / "fifo")

    assert read_plain(tmp_path / "file") == b"secret"
    for name in ("link", "fifo", "."):
        with pytest.raises(OSError, match=name):
            os.close(open_plain(tmp_path / name, os.O_RDONLY))
    with pytest.raises(OSError, match="link"):
        os.close(open_plain(tmp_path / "link", os.O_RDWR | os.O_CREAT))


def test_a_linked_spool_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "spool").symlink_to("elsewhere")

    with pytest.raises(SpoolError, match="symbolic link"):
        create_spool(tmp_path / "spool", SpoolInfo("site-1", "job", ("server",)))

    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_linked_round_file_is_not_written(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("a file that is longer than a round")
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "round").symlink_to(victim)

    file = RoundFile(spool, sets=True)
    file.set(7)
    file.close()

    assert victim.read_text() == "a file that is longer than a round"


@pytest.mark.parametrize("name", ["trackhub.db", "trackhub.lock"])
def test_a_linked_journal_is_refused(tmp_path: Path, name: str) -> None:
    victim = tmp_path / "victim"
    (tmp_path / "trackhub").mkdir()
    (tmp_path / "trackhub" / name).symlink_to(victim)

    with pytest.raises(JournalError, match="trackhub"):
        Journal.open(tmp_path / "trackhub" / "trackhub.db", job="job", side="server")

    assert not victim.exists()


def test_a_linked_report_is_not_written_through(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    receiver = Receiver(tmp_path, job="job", side=Side.LOCAL, backends={}, limits=Limits(deadline_s=1))
    receiver.start()
    (tmp_path / "trackhub" / "delivery.json").symlink_to(victim)

    receiver.finish(RunStatus.FINISHED)

    assert victim.read_text() == "untouched"


def test_links_among_the_receiver_s_blobs_are_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("secret")
    store = BlobStore(tmp_path / "blobs")
    name = "0" * 32 + "-1"
    folder = store.folder("site-1")
    folder.mkdir(parents=True)
    (folder / name).symlink_to(victim)
    (folder / f"{name}.part").symlink_to(victim)

    assert not store.has("site-1", name)
    with pytest.raises(OSError, match="part"):
        store.add("site-1", Chunk(name, 4, "0" * 64, 0, b"data"))

    assert victim.read_text() == "secret"


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_what_is_no_segment_neither_hangs_a_sender_nor_holds_up_other_streams(tmp_path: Path, kind: str) -> None:
    spool = new_spool(tmp_path / "spool", "server")
    with Writer(spool) as writer:
        writer.log({"loss": 1.0})
    with Writer(new_spool(tmp_path / "another")) as other:
        other.log({"another/secret": 1.0})
    (victim,) = (tmp_path / "another").glob("*.spool")
    segment = next(spool.glob("*.spool"))
    odd = spool / segment.name.replace(segment.name.split("-")[0], "0" * 32)
    if kind == "fifo":
        os.mkfifo(odd)
    elif kind == "link":
        odd.symlink_to(victim)
    else:
        odd.mkdir()
    receiver = Receiver(tmp_path / "run", job="job-1", side=Side.LOCAL, backends={"jsonl": {}})
    receiver.start()
    sender = Sender(spool, receiver.channel("site-1"), cursor="server", limits=Limits(poll_s=0.01))
    sender.start()

    before = time.monotonic()
    counts = sender.close(30.0)
    report = receiver.finish(RunStatus.FINISHED)

    assert time.monotonic() - before < 20
    assert report.lanes["jsonl"]["site-1"].confirmed == 1
    assert not counts.complete  # nobody knows what the odd stream holds
    stored = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"another/secret" not in stored


@pytest.mark.parametrize("kind", ["fifo", "link", "endless"])
def test_what_is_no_ledger_neither_hangs_a_sender_nor_costs_a_record(tmp_path: Path, kind: str) -> None:
    spool = new_spool(tmp_path / "spool", "server")
    with Writer(spool) as writer:
        writer.log({"loss": 1.0})
    ledger = next(spool.glob("*.ledger"))
    ledger.unlink()
    if kind == "fifo":
        os.mkfifo(ledger)
    elif kind == "link":
        ledger.symlink_to("/dev/zero")
    else:
        with open(ledger, "wb") as file:
            file.truncate(1 << 40)  # it takes no disk, and more than the memory
    receiver = Receiver(tmp_path / "run", job="job-1", side=Side.LOCAL, backends={"jsonl": {}})
    receiver.start()
    sender = Sender(spool, receiver.channel("site-1"), cursor="server", limits=Limits(poll_s=0.01))
    sender.start()

    before = time.monotonic()
    counts = sender.close(30.0)
    report = receiver.finish(RunStatus.FINISHED)

    assert time.monotonic() - before < 20
    assert report.lanes["jsonl"]["site-1"].confirmed == 1
    assert not counts.complete


def test_a_link_to_a_file_beside_it_is_logged_and_one_that_leads_out_is_not(tmp_path: Path) -> None:
    spool = new_spool(tmp_path / "spool")
    folder = tmp_path / "checkpoints"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    (folder / "epoch-3.ckpt").write_text("weights")
    (folder / "deep" / "x.ckpt").write_text("deep weights")
    (folder / "last.ckpt").symlink_to("epoch-3.ckpt")
    (folder / "x.ckpt").symlink_to("deep/x.ckpt")
    (folder / "out.ckpt").symlink_to("../secret")
    (folder / "chain.ckpt").symlink_to("out.ckpt")
    (folder / "deep" / "up.ckpt").symlink_to("../epoch-3.ckpt")
    (tmp_path / "by_link").symlink_to("checkpoints")
    os.mkfifo(folder / "fifo")

    with Writer(spool, strict=True) as writer:
        for good in ("checkpoints/last.ckpt", "checkpoints/x.ckpt", "by_link/epoch-3.ckpt", "by_link/last.ckpt"):
            writer.log_artifact(tmp_path / good)
        for bad in ("out.ckpt", "chain.ckpt", "deep/up.ckpt"):
            with pytest.raises(RecordError, match="leads out of its folder; log the file itself"):
                writer.log_artifact(folder / bad)
        with pytest.raises(RecordError, match="not an ordinary file"):
            writer.log_artifact(folder / "fifo")

    blobs = sorted(path.read_text() for path in spool.glob("*.blob"))
    assert blobs == ["deep weights", "weights", "weights", "weights"]


def test_a_folder_that_is_reached_by_a_link_hides_no_name_elsewhere(tmp_path: Path) -> None:
    """Its names would be found a second time below the run folder, in place of the name that is elsewhere."""
    spool, mine = tmp_path / "job" / "spool", tmp_path / "mine"
    spool.mkdir(parents=True)
    mine.write_text("mine")
    (spool / "round").hardlink_to(mine)
    (tmp_path / "link").symlink_to(tmp_path / "job")

    for folder in (spool, tmp_path / "link" / "spool"):
        assert "is a hard link" in find_way_out(folder, tmp_path / "job")
    assert find_way_out(tmp_path / "link" / "spool", tmp_path) == ""
