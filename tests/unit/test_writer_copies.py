# SPDX-License-Identifier: Apache-2.0
"""A writer may be copied and pickled, as Lightning, Hugging Face and ``multiprocessing`` do. Each copy has a stream."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest

import trackhub
from tests.unit.readers_and_bad_backends import json_lines, new_spool, read_spool, spool_of, values
from trackhub.errors import RecordError, SpoolError
from trackhub.limits import Limits
from trackhub.records import Params, Summary
from trackhub.spool.layout import close_spool
from trackhub.writer.adapters import MLflowWriter, SummaryWriter, WandBWriter
from trackhub.writer.writer import Writer

FAST = Limits(poll_s=0.005, linger_s=0, flush_s=0.01, deadline_s=5)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda writer: pickle.loads(pickle.dumps(writer))])
def test_a_copy_logs_into_the_same_spool_with_a_stream_of_its_own(
    tmp_path: Path, how: Callable[[Writer], Writer]
) -> None:
    with Writer(new_spool(tmp_path)) as writer:
        writer.log({"a": 1.0})
        other = how(writer)
        writer.log({"a": 2.0})
        other.log({"a": 3.0})
        other.close()
        writer.log({"a": 4.0})

    streams = read_spool(tmp_path)
    assert values(streams.pop(spool_of(writer).stream)) == [1.0, 2.0, 4.0]
    assert [values(records) for records in streams.values()] == [[3.0]]


def log_some(writer: Writer, n: int) -> None:
    for i in range(n):
        writer.log({"worker": i})


def test_spawned_workers_go_on_with_their_parents_writer(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path))
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=log_some, args=(writer, 10)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [values(records) for records in read_spool(tmp_path).values()] == [list(range(10))] * 2


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
@pytest.mark.parametrize("adapter", [SummaryWriter, WandBWriter, MLflowWriter])
def test_an_adapter_may_be_copied_as_well(
    tmp_path: Path, adapter: type[SummaryWriter], how: Callable[[SummaryWriter], SummaryWriter]
) -> None:
    with Writer(new_spool(tmp_path)) as writer:
        other = how(adapter(writer=writer))
        other.writer.log({"a": 1.0})
        other.close()
        writer.log({"a": 2.0})
    assert sorted(value for records in read_spool(tmp_path).values() for value in values(records)) == [1.0, 2.0]


class CountingWriter(Writer):
    """As a user may write one."""

    calls = 0


def test_a_writer_with_attributes_of_its_own_keeps_them(tmp_path: Path) -> None:
    writer = CountingWriter(new_spool(tmp_path))
    writer.calls = 5
    assert isinstance(other := pickle.loads(pickle.dumps(writer)), CountingWriter)
    assert other.calls == 5


def test_a_copy_of_a_closed_writer_is_closed(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path), strict=True)
    writer.close()
    with pytest.raises(SpoolError, match="closed"):
        copy.deepcopy(writer).log({"a": 1.0})


def test_a_writer_that_records_nothing_is_copied_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKHUB_MODE", "disabled")
    pickle.loads(pickle.dumps(Writer())).log({"a": 1.0})


def test_a_copy_that_finds_its_job_ended_records_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = pickle.dumps(Writer(new_spool(tmp_path)))
    close_spool(tmp_path)
    pickle.loads(data).log({"a": 1.0})
    assert read_spool(tmp_path) == {}
    assert "a copied writer records nothing" in caplog.text


def test_a_copy_that_finds_no_folder_drops_what_it_is_given_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one that was pickled on another machine."""
    spool = new_spool(tmp_path / "spool")
    data = pickle.dumps(Writer(spool))
    spool.rename(tmp_path / "elsewhere")
    writer = pickle.loads(data)
    writer.log({"a": 1.0})
    writer.log_artifact(__file__)
    assert caplog.text.count("tracking dropped a record (io_error") == 1


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_local_writer_logs_into_its_run_and_does_not_end_it(
    tmp_path: Path, how: Callable[[Writer], Writer]
) -> None:
    with trackhub.local(["jsonl"], folder=tmp_path, limits=FAST, strict=True) as writer:
        with how(writer) as other:
            other.log({"copy": 1.0})
            with pytest.raises(RecordError):
                other.log({"copy": None})
        assert type(other) is Writer
        assert writer.report is None
        writer.log({"own": 2.0})
    lines = json_lines(writer.folder / "jsonl" / writer.folder.name / "local.jsonl")
    assert sorted(key for line in lines for key in line["values"]) == ["copy", "own"]


def test_a_copy_of_a_wandb_writer_logs_its_params_and_final_values_itself(tmp_path: Path) -> None:
    """Otherwise they are lost if the first writer is closed."""
    first = WandBWriter(writer=Writer(new_spool(tmp_path), strict=True), config={"lr": 0.1})
    other = copy.copy(first)
    first.close()

    other.config.seed = 7
    other.summary["best"] = 0.9

    found = [[r.payload.values for r in stream if isinstance(r.payload, Params | Summary)]
             for stream in read_spool(tmp_path).values()]  # fmt: skip
    assert sorted(found, key=len) == [[{"lr": 0.1}], [{"seed": 7}, {"best": 0.9}]]
    assert dict(other.config) == {"lr": 0.1, "seed": 7}
    assert "seed" not in first.config
