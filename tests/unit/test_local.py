# SPDX-License-Identifier: Apache-2.0
"""A script outside FLARE: the same calls, a receiver in the same process, and everything delivered when it closes."""

from __future__ import annotations

import contextlib
import json
import math
import os
import textwrap
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

import trackhub
from tests.conftest import MakePlugin
from tests.unit.local_runs import FAST, lines, open_local, report_of
from tests.unit.readers_and_bad_backends import assert_balanced, small_disk
from trackhub.delivery import retry_receiver_start
from trackhub.delivery.receiver import Receiver
from trackhub.delivery.report import read_report
from trackhub.delivery.report_text import format_report
from trackhub.delivery.sender import Sender
from trackhub.errors import ConfigError, DeliveryError, JournalError, RecordError, UnknownBackendError
from trackhub.limits import Limits
from trackhub.local_tracking import LocalWriter
from trackhub.process_lock import ProcessLock
from trackhub.runnable_commands import runnable
from trackhub.spool.layout import read_spool_info

PLUGIN = """
    import threading
    from trackhub.spi import Backend, BackendRun, Capabilities, ConfirmedBy, Redelivery, TransientError
    class Run(BackendRun):
        def write(self, batch):
            if MODE == "write":
                raise RuntimeError("boom in write")
            if MODE == "hang":
                threading.Event().wait()
        def finish(self, status):
            pass
    class Odd(Backend):
        spi = 1
        capabilities = Capabilities(redelivery=Redelivery.IDEMPOTENT, confirmed_by=ConfirmedBy.WRITE)
        def open_run(self, info):
            if MODE == "open":
                raise RuntimeError("boom in open_run")
            return Run()
"""


def test_records_of_every_kind_are_delivered_when_the_writer_closes(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    before = time.time()
    with open_local(tmp_path) as writer:
        writer.log_params({"lr": 0.1})
        writer.set_tags({"who": "me"})
        for step in range(100):
            writer.log({"loss": 1 / (step + 1), "nan": math.nan}, step)
        writer.log_text("note", "hello")
        writer.log_image("grid", np.zeros((4, 4), np.uint8), 3)
        writer.log_histogram("w", [1.0, 2.0])
        writer.log_table("t", ["a"], [[1]])
        writer.log_artifact(tmp_path / "model.bin")
        assert writer.flush(20)
        assert writer.report is None

    kept = lines(writer)
    files = [line for line in kept if line["kind"] in ("image", "artifact")]  # they travel beside the rest
    found = [line for line in kept if line not in files]
    assert [line["kind"] for line in files] == ["image", "artifact"]
    kinds = [line["kind"] for line in found]
    assert kinds == ["params", "tags", *["metrics"] * 100, "text", "histogram", "table"]
    assert [line["values"] for line in found[2:102]] == [{"loss": 1 / (s + 1), "nan": "NaN"} for s in range(100)]
    assert [line["step"] for line in found[2:102]] == list(range(100))
    for part in (files, found):
        times = [float(str(line["time"])) for line in part]
        assert before <= times[0] <= times[-1] <= time.time()
        assert times == sorted(times)
    report = report_of(writer)
    assert_balanced(report, {"local": 107}, {("jsonl", "local"): 107})
    assert report.lanes["jsonl"]["local"].state == "finished"
    assert read_report(writer.folder / "trackhub" / "delivery.json") == report


def test_close_may_be_called_again_and_nothing_can_be_logged_afterwards(tmp_path: Path) -> None:
    writer = open_local(tmp_path)
    writer.log({"a": 1.0})
    writer.close()
    first = writer.report
    writer.close()
    assert writer.report is first
    writer.log({"a": 1.0})
    assert len(lines(writer)) == 1


def test_a_script_that_fails_ends_its_run_as_failed_and_its_error_is_kept(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), open_local(tmp_path) as writer:
        writer.log({"a": 1.0})
        raise ZeroDivisionError
    path = writer.folder / "jsonl" / writer.folder.name / "local.jsonl"
    assert json.loads(path.read_text().splitlines()[-1])["status"] == "failed"
    assert report_of(writer).lanes["jsonl"]["local"].confirmed == 1


def test_a_bad_value_is_counted_and_the_rest_is_delivered(tmp_path: Path) -> None:
    with open_local(tmp_path) as writer:
        writer.log({"note": None, "loss": 0.1}, 0)
        writer.log({"": 1.0}, 1)
        writer.log("nonsense", -1)  # type: ignore[arg-type]
        writer.log({"loss": 0.2}, 2)
    assert [(line["seq"], line["values"]) for line in lines(writer)] == [(0, {"loss": 0.1}), (3, {"loss": 0.2})]
    report = report_of(writer)
    at_site = report.sites["local"].at_site
    assert at_site is not None
    assert report.balanced
    assert (at_site.logged, at_site.acked, at_site.altered) == (4, 2, {"invalid_value": 1})
    assert at_site.dropped == {"invalid_value": 1, "invalid_call": 1}
    assert "values left out at the site (invalid_value): 1" in format_report(report)


def test_a_strict_run_raises_for_a_bad_value(tmp_path: Path) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, limits=FAST, strict=True) as writer:
        with pytest.raises(RecordError, match="'note'"):
            writer.log({"note": None, "loss": 0.1})
        writer.log({"loss": 0.2})
    assert len(lines(writer)) == 1


def test_a_single_backend_may_be_named_by_a_plain_string(tmp_path: Path) -> None:
    with trackhub.local("jsonl", folder=tmp_path, limits=FAST) as writer:
        writer.log({"a": 1.0})
    assert len(lines(writer)) == 1


def test_the_round_is_put_on_records(tmp_path: Path) -> None:
    with open_local(tmp_path) as writer:
        writer.set_round(4)
        writer.log({"a": 1.0})
    assert lines(writer)[0]["round"] == 4


def test_an_unknown_backend_is_an_error_that_leaves_nothing(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(UnknownBackendError, match="nonsense"):
        open_local(tmp_path / "runs", "nonsense", job="j")
    assert threading.active_count() == before
    with open_local(tmp_path / "runs", job="j") as writer:
        writer.log({"a": 1.0})
    assert len(lines(writer)) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"site": ""}, "site: '' is empty"),
        ({"site": "a\nb"}, "site: .*U.000A"),
        ({"site": "federation"}, "site: 'federation' is the name of the federation run"),
        ({"site": None}, "site: expected a str"),
        ({"tags": "demo"}, "tags: expected a list of texts, got the string 'demo'"),
    ],
)
def test_a_wrong_site_or_tag_is_an_error_that_leaves_nothing(
    tmp_path: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        trackhub.local(["jsonl"], folder=tmp_path, **arguments)

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["file", "file/below", "x" * 300])
def test_a_folder_that_cannot_be_used_is_an_error_that_names_it(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    before = threading.active_count()

    with pytest.raises(DeliveryError, match=rf"{name}/.*give another folder"):
        open_local(tmp_path / name)

    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert threading.active_count() == before


def test_a_folder_that_cannot_be_made_is_named_and_no_plugin_is_blamed() -> None:
    with pytest.raises(ConfigError, match=r"the folder /proc/nothing/.* cannot be made"):
        open_local(Path("/proc/nothing"))


@pytest.mark.parametrize("mode", ["open", "write", "hang"])
def test_a_backend_that_breaks_costs_the_script_nothing_but_the_deadline(
    tmp_path: Path, make_plugin: MakePlugin, mode: str
) -> None:
    make_plugin(
        "odd-plugin", {"odd": f"odd_{mode}:Odd"}, {f"odd_{mode}": f"MODE = {mode!r}\n" + textwrap.dedent(PLUGIN)}
    )
    limits = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=0.3)
    writer = trackhub.local(["jsonl", "odd"], folder=tmp_path, job="j", limits=limits)
    for step in range(50):
        writer.log({"a": 1.0}, step)
    start = time.monotonic()
    writer.close()
    assert time.monotonic() - start < 5
    report = report_of(writer)
    assert len(lines(writer)) == 50
    odd = report.lanes["odd"]["local"]
    assert (odd.confirmed, odd.pending, odd.state) == (0, 50, "unfinished")
    assert odd.last_error
    assert report.undelivered() == 50
    assert_balanced(report, {"local": 50}, {("jsonl", "local"): 50})


def test_forked_workers_log_into_the_same_run_and_end_without_ending_it(tmp_path: Path) -> None:
    with open_local(tmp_path) as writer:
        writer.log({"parent": 0}, 0)
        for child in range(3):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    with writer:  # as a child does that leaves the block of its parent by an exception
                        for i in range(10):
                            writer.log({f"child-{child}": i}, i)
                    code = 0
                finally:
                    os._exit(code)
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            assert not (writer.folder / "trackhub" / "delivery.json").exists()
        writer.log({"parent": 1}, 1)

    found: dict[str, list[int]] = {}
    for line in lines(writer):
        values = line["values"]
        assert isinstance(values, dict)
        for key, value in values.items():
            found.setdefault(key, []).append(value)
    assert found == {"parent": [0, 1], **{f"child-{n}": list(range(10)) for n in range(3)}}
    assert_balanced(report_of(writer), {"local": 32}, {("jsonl", "local"): 32})


def test_limits_come_from_the_environment_unless_they_are_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKHUB_SPOOL_BYTES", str(2 << 20))

    with trackhub.local(["jsonl"], folder=tmp_path) as writer:
        writer.log({"a": 1.0})

    assert read_spool_info(writer.folder / "trackhub" / "spool").max_bytes == 2 << 20


def fill(disk: Path, free: int = 0) -> Path:
    """Use up the space of a disk but for so many blocks. Return the file whose removal frees it."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - free * 4096)
    return filler


@pytest.mark.parametrize("free", [0, 2, 12, 24])
def test_a_full_disk_at_the_start_fails_no_script_and_tracking_begins_with_the_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    monkeypatch.setattr(retry_receiver_start, "_TRY_EVERY_S", 0.05)
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        filler = fill(disk, free)
        with open_local(disk / "runs", job="j") as writer:
            for step in range(10):
                writer.log({"a": step}, step)
            filler.unlink()
            deadline = time.monotonic() + 20
            while not lines_or_none(writer):
                writer.log({"late": 1.0})
                assert time.monotonic() < deadline
                threading.Event().wait(0.05)
        at_site = report_of(writer).sites["local"].at_site
        assert at_site is not None
        assert at_site.complete
        assert at_site.logged == at_site.acked + sum(at_site.dropped.values())
        assert at_site.dropped.keys() <= {"disk_full"}
        assert len(lines(writer)) == at_site.acked


def lines_or_none(writer: LocalWriter) -> list[dict[str, object]]:
    with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
        return lines(writer)
    return []


def test_a_script_whose_disk_never_has_room_ends_as_it_would_without_tracking(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = threading.active_count()
    with small_disk(tmp_path / "disk", 1 << 18) as disk:
        fill(disk)
        with open_local(disk / "runs", job="j") as writer:
            for step in range(10):
                writer.log({"a": step}, step)
        assert writer.report is None
    assert threading.active_count() == before
    assert "database or disk is full. Training goes on" in caplog.text
    assert "tracking could not end normally" in caplog.text


def test_to_close_never_raises_for_a_damaged_journal(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    before = threading.active_count()
    writer = open_local(tmp_path, job="j")
    writer.log({"a": 1.0})
    assert writer.flush(20)
    for path in (writer.folder / "trackhub").glob("trackhub.db*"):
        path.write_bytes(b"x" * max(4096, path.stat().st_size))

    writer.close()
    writer.close()

    assert threading.active_count() == before
    if writer.report is None:
        assert f"deliver it with `{runnable('trackhub replay')}" in caplog.text
    ProcessLock.open(writer.folder / "trackhub" / "trackhub.lock").release()


def test_to_close_never_raises_for_a_full_disk(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        writer = open_local(disk / "runs", job="j")
        writer.log({"a": 1.0})
        assert writer.flush(20)
        fill(disk)
        for step in range(1000):
            writer.log({"a": step}, step)
        writer.close()
        writer.close()
        ProcessLock.open(writer.folder / "trackhub" / "trackhub.lock").release()


def test_a_sender_that_cannot_start_leaves_no_thread_and_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a process may have no more threads."""
    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(Sender, "start", Mock(side_effect=RuntimeError("can't start new thread")))
        with pytest.raises(RuntimeError):
            open_local(tmp_path, job="j")

    assert threading.active_count() == before
    with open_local(tmp_path, job="j") as writer:
        writer.log({"a": 1.0})
    assert len(lines(writer)) == 1


@pytest.mark.parametrize("error", [JournalError("no"), KeyboardInterrupt()])
def test_a_start_that_fails_with_the_journal_open_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = threading.active_count()
    with monkeypatch.context() as patch:
        patch.setattr(Receiver, "_lane", Mock(side_effect=error))
        with pytest.raises(type(error)):
            open_local(tmp_path, job="j")
    assert threading.active_count() == before
    with open_local(tmp_path, job="j") as writer:
        writer.log({"a": 1.0})
    assert len(lines(writer)) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"backends": {"jsonl": {"pth": "x"}}},
        {"backends": {"tensorboard": {"logdir": 3}}},
        {"backends": ["jsonl", "nope"]},
        {"backends": {"jsonl": {}, "wandb": {"mode": "onlin"}}},
        {"backends": {"jsonl": 3}},
        {"backends": 3},
        {"backends": ["jsonl"], "site": ""},
        {"backends": ["jsonl"], "site": 3},
        {"backends": ["jsonl"], "tags": "one"},
        {"backends": ["jsonl"], "limits": {"deadline_s": 3}},
    ],
)
def test_a_wrong_argument_is_an_error_that_leaves_no_folder(tmp_path: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        trackhub.local(folder=tmp_path / "runs", **arguments)

    assert [path.name for path in tmp_path.rglob("*") if path.name not in ("runs",)] == []
