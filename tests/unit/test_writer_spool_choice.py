# SPDX-License-Identifier: Apache-2.0
"""A writer finds the spool of its process, and records nothing where there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import trackhub
from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from trackhub.errors import ConfigError, SpoolError
from trackhub.limits import Limits
from trackhub.spool import announce_spool
from trackhub.spool.announce_spool import SPOOL_ENV, set_process_spool, spool_env
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.writer import spool_choice
from trackhub.writer.adapters import MLflowWriter, SummaryWriter, WandBWriter
from trackhub.writer.spool_choice import MODE_ENV
from trackhub.writer.writer import Writer


@pytest.fixture(autouse=True)
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the test as in a process without tracking that has not warned of that yet."""
    monkeypatch.delenv(SPOOL_ENV, raising=False)
    monkeypatch.delenv(MODE_ENV, raising=False)
    monkeypatch.setattr(spool_choice, "_has_warned", False)
    monkeypatch.setattr(announce_spool, "_process_spool", None)


def announce(spool: Path, monkeypatch: pytest.MonkeyPatch, *, site: str = "site-1", job: str = "job-1") -> None:
    monkeypatch.setenv(SPOOL_ENV, spool_env(spool, site, job))


def test_a_writer_finds_the_spool_that_the_environment_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = new_spool(tmp_path / "spool")
    announce(spool, monkeypatch)
    with trackhub.Writer() as writer:
        writer.log({"a": 1.0})
    assert len(read_spool(spool)) == 1


def test_the_process_own_spool_goes_before_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = new_spool(tmp_path / "own"), new_spool(tmp_path / "other")
    announce(other, monkeypatch)
    set_process_spool(own)
    try:
        with Writer() as writer:
            writer.log({"a": 1.0})
    finally:
        set_process_spool(None)
    assert (len(read_spool(own)), len(read_spool(other))) == (1, 0)


def test_a_writer_beside_trackhub_local_records_into_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with trackhub.local(backends=["jsonl"], folder=tmp_path, limits=Limits(poll_s=0.005, linger_s=0)) as local:
        with trackhub.Writer() as writer:
            writer.log({"a": 1.0}, 0)
        WandBWriter().log({"b": 2.0}, 1)
    assert local.report is not None
    assert local.report.lanes["jsonl"]["local"].confirmed == 2
    assert caplog.records == []

    Writer().log({"after": 1.0})  # the run has ended: this writer records nothing
    assert "records nothing" in caplog.text


def test_a_spool_that_another_one_replaced_is_not_withdrawn_again(tmp_path: Path) -> None:
    first, second = new_spool(tmp_path / "first"), new_spool(tmp_path / "second")
    announce_spool.set_process_spool(first)
    announce_spool.set_process_spool(second)
    announce_spool.withdraw_process_spool(first)
    assert announce_spool.find_spool() == second
    announce_spool.withdraw_process_spool(second)
    with pytest.raises(ConfigError):
        announce_spool.find_spool()


class Untouchable:
    """Fails the test when anything is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise AssertionError(f"a writer that records nothing read {name!r}")


@pytest.mark.parametrize(
    "call",
    {
        "log": lambda w, x: w.log({"a": x}, 1),
        "log without a dict": lambda w, x: w.log(x, step=1),
        "log_params": lambda w, x: w.log_params({"a": x}),
        "set_tags": lambda w, x: w.set_tags({"a": x}),
        "log_text": lambda w, x: w.log_text("a", x, 1),
        "log_image": lambda w, x: w.log_image("a", x, step=1, caption="c"),
        "log_histogram": lambda w, x: w.log_histogram("a", x, 1, bins=3),
        "log_table": lambda w, x: w.log_table("a", ["b"], [[x]], 1),
        "log_artifact": lambda w, x: w.log_artifact(x, "a", type="model"),
        "count_unconvertible": lambda w, x: w.count_unconvertible(x),
        "flush": lambda w, x: w.flush(timeout_s=100.0),
        "close twice": lambda w, x: (w.close(), w.close()),
    }.items(),
    ids=lambda item: item[0],
)
def test_without_tracking_a_call_does_not_even_look_at_its_arguments(
    call: tuple[str, Callable[[Writer, Any], None]],
) -> None:
    call[1](Writer(), Untouchable())


def test_without_tracking_flush_returns_true_at_once() -> None:
    with trackhub.Writer() as writer:
        writer.log({"a": 1.0}, 0)
        assert writer.flush(timeout_s=100.0) is True


def test_without_tracking_one_warning_line_names_both_ways_to_turn_it_on(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        with trackhub.Writer() as writer:
            writer.log({"a": 1.0})
    WandBWriter().log({"a": 1.0})

    (record,) = caplog.records
    message = record.getMessage()
    assert record.levelname == "WARNING"
    assert "\n" not in message
    assert "trackhub.flare.recipe.add_tracking" in message
    assert "trackhub.local" in message
    assert f"{MODE_ENV}=disabled" in message


def test_a_script_without_tracking_and_logging_set_up_says_one_line_and_runs(tmp_path: Path) -> None:
    script = "import trackhub\nfor _ in range(2):\n    with trackhub.Writer() as w:\n        w.log({'a': 1.0}, 0)"
    environment = {"PYTHONPATH": str(Path(trackhub.__file__).parents[1])}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert done.stderr.count("\n") == 1
    assert "records nothing" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_strict_writer_without_tracking_is_an_error_that_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"(?s)TRACKHUB_SPOOL.*add_tracking.*trackhub\.local"):
        Writer(strict=True)
    assert caplog.records == []


def test_a_strict_writer_with_tracking_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(new_spool(tmp_path / "spool"), monkeypatch)
    with Writer(strict=True) as writer:
        writer.log({"a": 1.0})
    assert len(read_spool(tmp_path / "spool")) == 1


def assert_records_nothing(reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Check that a writer warns with this reason, and that a strict one raises with it."""
    with Writer() as writer:
        writer.log({"a": 1.0})
    assert [reason in record.getMessage() for record in caplog.records] == [True], caplog.text
    with pytest.raises(ConfigError) as caught:
        Writer(strict=True)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    "value",
    ["no JSON", "5", "[]", "{}", '{"dir": 5, "site": "a", "job": "b"}', '{"dir": "\\u0000", "site": "a", "job": "b"}'],
)
def test_with_an_announcement_that_is_not_ours_a_writer_records_nothing(
    value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(SPOOL_ENV, value)
    assert_records_nothing(SPOOL_ENV, caplog)


@pytest.mark.parametrize(("site", "job"), [("site-2", "job-1"), ("site-1", "job-2")])
def test_a_process_of_another_site_or_job_does_not_write_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, site: str, job: str
) -> None:
    spool = new_spool(tmp_path / "spool")
    announce(spool, monkeypatch, site=site, job=job)
    assert_records_nothing(f"the spool of site '{site}', job '{job}'", caplog)
    assert "belongs to site 'site-1', job 'job-1'" in caplog.text
    assert read_spool(spool) == {}


def test_no_writer_starts_after_the_job_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    create_spool(tmp_path, SpoolInfo("site-1", "job-1", ("server",), open=False))
    announce(tmp_path, monkeypatch)
    assert_records_nothing("has ended", caplog)
    assert read_spool(tmp_path) == {}


def test_with_an_announced_spool_that_cannot_be_used_a_writer_records_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    spool = new_spool(tmp_path / "spool")
    (spool / "spool.json").write_bytes(b"nonsense")
    announce(spool, monkeypatch)
    assert_records_nothing("is not a spool", caplog)


def test_a_round_that_cannot_be_read_costs_the_records_their_round_and_nothing_else(tmp_path: Path) -> None:
    """Such as on a disk that had room for ``spool.json`` and for no further file."""
    spool = new_spool(tmp_path / "spool")
    (spool / "round").unlink()
    (spool / "round").mkdir()
    with Writer(spool) as writer:
        writer.log({"a": 1.0})
        (record,) = read_spool(spool)[spool_of(writer).stream]
    assert record.round is None


def test_mode_disabled_records_nothing_and_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also in a job with tracking, and also where the script asks for ``strict``: whoever runs it has said so."""
    monkeypatch.setenv(MODE_ENV, "disabled")
    Writer(strict=True).log({"a": 1.0})
    spool = new_spool(tmp_path / "spool")
    announce(spool, monkeypatch)
    for writer in (Writer(), SummaryWriter().writer, MLflowWriter(strict=True).writer):
        writer.log({"a": 1.0})
        assert writer.flush(timeout_s=100.0)
    assert read_spool(spool) == {}
    assert caplog.records == []


@pytest.mark.parametrize("value", ["", "enabled"])
def test_mode_enabled_is_the_same_as_unset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(MODE_ENV, value)
    announce(new_spool(tmp_path / "spool"), monkeypatch)
    with Writer() as writer:
        writer.log({"a": 1.0})
    assert len(read_spool(tmp_path / "spool")) == 1


@pytest.mark.parametrize("value", ["offline", "Disabled", "0"])
def test_an_unknown_mode_is_an_error_that_names_those_that_there_are(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv(MODE_ENV, value)
    with pytest.raises(ConfigError, match=f"TRACKHUB_MODE is '{value}'; expected enabled or disabled"):
        Writer()


def test_a_folder_that_is_not_a_spool_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SpoolError, match="not a spool"):
        Writer(tmp_path)


def test_a_writer_with_a_folder_records_whatever_the_mode_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE_ENV, "disabled")
    with Writer(new_spool(tmp_path / "spool")) as writer:
        writer.log({"a": 1.0})
        assert len(read_spool(tmp_path / "spool")[spool_of(writer).stream]) == 1


@pytest.mark.parametrize("adapter", [SummaryWriter, WandBWriter, MLflowWriter])
def test_an_adapter_without_tracking_records_nothing_or_raises_when_strict(
    adapter: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with adapter() as writer:
        writer.flush()
    assert len(caplog.records) == 1
    with pytest.raises(ConfigError, match="add_tracking"):
        adapter(strict=True)
