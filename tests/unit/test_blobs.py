# SPDX-License-Identifier: Apache-2.0
"""A blob at the receiver is whole or not there, whenever an earlier receiver was killed."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit import test_receiver
from trackhub.delivery.blob_store import BlobStore
from trackhub.delivery.wire import Accepted, Chunk

ROOT = Path(__file__).resolve().parents[2]

SITE = "site-1"
NAME = f"{'a' * 32}-7"
DATA = bytes(range(250)) * 40
HALF = len(DATA) // 2


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def chunk(offset: int, end: int = len(DATA), data: bytes = DATA) -> Chunk:
    return Chunk(NAME, len(DATA), hashlib.sha256(DATA).hexdigest(), offset, data[offset:end])


def left_by_a_killed_receiver(store: BlobStore, data: bytes) -> None:
    store.folder(SITE).mkdir(parents=True)
    (store.folder(SITE) / f"{NAME}.part").write_bytes(data)


def assert_whole(store: BlobStore) -> None:
    assert store.has(SITE, NAME)
    store.note_named(SITE, [NAME])
    assert store.has(SITE, NAME)
    assert [(path.name, path.read_bytes()) for path in store.folder(SITE).iterdir()] == [(NAME, DATA)]


def test_a_blob_is_available_once_all_its_pieces_have_arrived(store: BlobStore) -> None:
    assert store.add(SITE, chunk(0, HALF)) == (HALF, True)
    assert not store.has(SITE, NAME)
    assert store.add(SITE, chunk(HALF)) == (len(DATA), True)
    assert_whole(store)
    assert store.add(SITE, chunk(0, HALF)) == (len(DATA), False)
    assert_whole(store)


def test_a_restarted_receiver_continues_a_blob_after_the_last_stored_piece(store: BlobStore) -> None:
    left_by_a_killed_receiver(store, DATA[:HALF])

    assert store.add(SITE, chunk(0, HALF)) == (HALF, False)
    assert store.add(SITE, chunk(HALF)) == (len(DATA), True)
    assert_whole(store)


def test_a_restarted_receiver_completes_a_blob_whose_pieces_are_all_there(store: BlobStore) -> None:
    left_by_a_killed_receiver(store, DATA)

    assert store.add(SITE, chunk(0, HALF)) == (len(DATA), False)
    assert_whole(store)


@pytest.mark.parametrize("left", [DATA[:-1] + b"x", DATA + b"x"], ids=["damaged", "longer"])
def test_a_partial_blob_that_is_damaged_is_received_again_from_its_start(store: BlobStore, left: bytes) -> None:
    left_by_a_killed_receiver(store, left)

    assert store.add(SITE, chunk(0, HALF)) == (0, False)
    assert store.add(SITE, chunk(0, HALF)) == (HALF, True)
    assert store.add(SITE, chunk(HALF)) == (len(DATA), True)
    assert_whole(store)


def test_bytes_that_do_not_match_their_digest_are_not_kept(store: BlobStore) -> None:
    assert store.add(SITE, chunk(0, data=DATA[::-1])) is None
    assert not store.has(SITE, NAME)
    assert list(store.folder(SITE).iterdir()) == []


def test_with_full_durability_a_blob_is_synced_before_it_is_renamed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path / "blobs", sync=True)
    synced: list[str] = []

    def fsync(fd: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    store.add(SITE, chunk(0))

    assert synced == [f"{NAME}.part", SITE, "blobs", tmp_path.name]
    assert_whole(store)
    assert synced[4:] == [SITE]


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.unit.test_receiver import DATA, Rig, chunk

rig = Rig(Path(sys.argv[1])).start()
rig.ask(chunk(0, len(DATA)))  # whole, and its record never came
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("is_record_sent", [False, True], ids=["no record", "record"])
def test_a_file_that_a_killed_receiver_left_without_a_record_is_deleted_at_the_end(
    tmp_path: Path, is_record_sent: bool
) -> None:
    """If its record comes to the next receiver after all, the file is used, and need not be sent again."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=60, cwd=ROOT)

    rig = test_receiver.Rig(tmp_path).start()
    replies = [rig.ask(test_receiver.artifact())] if is_record_sent else []
    rig.finish()

    assert done.returncode == -signal.SIGKILL
    left = [path.name for path in (tmp_path / "trackhub" / "blobs").glob("*/*")]
    assert (left, replies) == (([test_receiver.NAME], [Accepted()]) if is_record_sent else ([], []))
    assert [line["size"] for line in rig.stored() if "size" in line] == [len(test_receiver.DATA)] * is_record_sent
