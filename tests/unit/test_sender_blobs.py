# SPDX-License-Identifier: Apache-2.0
"""A sender delivers images and artifacts, with their bytes, beside the records that have none."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import msgspec
import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, assert_balanced, spool_of
from tests.unit.rigs import SITE, SenderRig
from trackhub.delivery import wire
from trackhub.delivery.channel import ChannelError
from trackhub.spool.layout import blob_file
from trackhub.writer.writer import Writer


def test_images_and_artifacts_arrive_with_their_bytes(rig: SenderRig, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "model.bin").write_bytes(data)
    (tmp_path / "empty").touch()
    lost = [4]

    def after(request: wire.Request) -> None:
        if isinstance(request, wire.Chunk) and lost[0]:
            lost[0] -= 1
            raise ChannelError("the reply to a chunk is lost")

    rig.after = after
    with Writer(rig.spool) as writer:
        writer.log_artifact(tmp_path / "model.bin")
        writer.log({"a": 0}, 0)
        writer.log_artifact(tmp_path / "empty")
    counts = rig.sender().close(WAIT_S)
    report = rig.finish()
    first, second = (line for line in rig.stored() if "file" in line)
    folder = rig.folder / "receiver" / "jsonl" / "job-1"
    assert (folder / first["file"]).read_bytes() == data
    assert [line["values"] for line in rig.stored() if "values" in line] == [{"a": 0}]
    assert (folder / second["file"]).read_bytes() == b""
    assert list(rig.spool.glob("*.blob")) == []
    assert (counts.logged, counts.acked) == (3, 3)
    assert_balanced(report, {SITE: 3}, {("jsonl", SITE): 3})


def spoil(path: Path, how: str) -> None:
    data = path.read_bytes()
    match how:
        case "gone":
            path.unlink()
        case "cut":
            path.write_bytes(data[: len(data) // 2])
        case "empty":
            path.write_bytes(b"")
        case "longer":
            path.write_bytes(data + b"x")
        case "other":
            path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize("how", ["gone", "cut", "empty", "longer", "other"])
@pytest.mark.parametrize("size", [10, (1 << 20) + 5])
def test_a_blob_that_is_damaged_at_the_site_costs_its_own_record_alone(
    rig: SenderRig, tmp_path: Path, how: str, size: int
) -> None:
    with Writer(rig.spool) as writer:
        for i in range(3):
            (tmp_path / "x").write_bytes(bytes([i]) * size)
            writer.log({"a": i}, i)
            writer.log_artifact(tmp_path / "x", f"x{i}")
        files = spool_of(writer).files_stream
    name = f"{files}-1"  # the second artifact
    spoil(blob_file(rig.spool, name), how)
    counts = rig.sender().close(WAIT_S)
    report = rig.finish()

    assert [line["values"]["a"] for line in rig.stored() if "values" in line] == [0, 1, 2]
    assert [line["seq"] for line in rig.stored() if line["stream"] == files] == [0, 2]
    assert (counts.logged, counts.acked, counts.dropped) == (6, 5, {"damaged": 1})
    assert_balanced(report, {SITE: 6}, {("jsonl", SITE): 5})
    assert report.sites[SITE].explained == {"damaged": 1}
    assert list(rig.spool.glob("*.blob")) == []


@pytest.mark.parametrize("position", [-1, -(2**63), 2**63])
def test_a_position_that_no_file_has_costs_no_record(rig: SenderRig, tmp_path: Path, position: int) -> None:
    """A hostile server may reply anything. The site's sender goes on, and its records are delivered later."""
    (tmp_path / "model.bin").write_bytes(b"weights")
    lies = [3]

    def channel(data: bytes, timeout_s: float) -> bytes:
        try:
            is_piece = isinstance(wire.decode_request(data), wire.Chunk)
        except msgspec.DecodeError:
            is_piece = True
        if is_piece and lies[0]:
            lies[0] -= 1
            return wire.encode(wire.Accepted(position))
        return rig.channel(data, timeout_s)

    with Writer(rig.spool) as writer:
        writer.log_artifact(tmp_path / "model.bin")
        writer.log({"a": 0}, 0)
    counts = rig.sender(channel).close(WAIT_S)
    report = rig.finish()

    assert (counts.logged, counts.acked, counts.spooled, counts.complete) == (2, 2, 0, True)
    assert_balanced(report, {SITE: 2}, {("jsonl", SITE): 2})


def test_close_ends_in_time_though_the_receiver_asks_for_a_blob_again_and_again(rig: SenderRig, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    with Writer(rig.spool) as writer:
        writer.log_artifact(tmp_path / "model.bin")

    def forgetful(data: bytes, timeout_s: float) -> bytes:
        request = wire.decode_request(data)
        if isinstance(request, wire.Batch):
            return wire.encode(wire.NeedBlob(blob.name.removesuffix(".blob")))
        return wire.encode(wire.Accepted(request.size if isinstance(request, wire.Chunk) else 0))

    (blob,) = rig.spool.glob("*.blob")
    counts = rig.sender(forgetful).close(0.2)

    assert (counts.logged, counts.acked, counts.spooled) == (1, 0, 1)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("trackhub-sender")] == []
