# SPDX-License-Identifier: Apache-2.0
"""The lane's thread checks the backend first. Only a wrong configuration stops the job."""

from __future__ import annotations

import errno
import threading

import pytest

from tests.unit.readers_and_bad_backends import WAIT_S, MemoryBackend
from tests.unit.rigs import Bench, failing, run_of
from trackhub.errors import ConfigError, TransientError


def no_file_is_free() -> ImportError:
    """Return the error of an import in a process that has too many files open."""
    error = ImportError("cannot read the SDK")
    error.__cause__ = OSError(errno.EMFILE, "too many open files")
    return error


@pytest.mark.parametrize("error", [ConfigError("log in first"), ImportError("No module named 'sdk'")], ids=repr)
def test_a_check_that_says_that_the_configuration_is_wrong_is_raised(bench: Bench, error: Exception) -> None:
    lane = bench.lane(MemoryBackend(failing(1, lambda: error, "preflight")))
    with pytest.raises(ConfigError, match=str(error)):
        lane.wait_for_preflight(WAIT_S)
    bench.finish()


@pytest.mark.parametrize("error", [TransientError("down"), RuntimeError("bug"), no_file_is_free()], ids=repr)
def test_a_check_that_fails_otherwise_lets_the_job_go_on(bench: Bench, error: Exception) -> None:
    backend = MemoryBackend(failing(1, lambda: error, "preflight"))
    lane = bench.lane(backend)
    lane.wait_for_preflight(WAIT_S)
    bench.log(5)
    bench.finish()
    assert backend.positions() == list(range(5))


def test_a_wrong_configuration_that_a_slow_check_finds_is_told_and_delivers_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    release = threading.Event()

    def slow(method: str, _: object) -> None:
        if method == "preflight":
            assert release.wait(WAIT_S)
            raise ConfigError("there is no login")

    backend = MemoryBackend(slow)
    lane = bench.lane(backend)
    lane.wait_for_preflight(0.05)
    bench.log(5)
    release.set()

    run = run_of(bench.finish())

    assert (backend.positions(), backend.calls["open"], backend.calls["close"]) == ([], 0, 1)
    assert (run.pending, run.state, run.last_error) == (5, "unfinished", "ConfigError: there is no login")
    assert "backend memory cannot be used: there is no login" in caplog.text


def test_a_check_that_hangs_lets_the_job_go_on(bench: Bench) -> None:
    release = threading.Event()
    backend = MemoryBackend(lambda method, _: release.wait(WAIT_S) if method == "preflight" else None)
    lane = bench.lane(backend)
    lane.wait_for_preflight(0.05)
    bench.log(5)
    release.set()
    bench.finish()
    assert backend.positions() == list(range(5))
