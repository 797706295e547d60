# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import logging
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from trackhub_wandb import WandBBackend, WandBOptions

from backends.wandb.tests.conftest import Rig, services
from tests.support.wandb_emulator import Emulator
from trackhub.registry import check_options, option_marks
from trackhub.spi import ConfigError, InvalidOptionError, OptionMark, Redelivery, TransientError


def test_without_a_login_the_default_is_offline_and_says_so_once(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """One clear line before training: where, what, and how to change it."""
    backend = rig.backend()
    with caplog.at_level(logging.INFO, logger="trackhub_wandb"):
        backend.preflight()
        backend.open_run(rig.info())
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("trackhub_wandb")]
    assert len(lines) == 1
    assert "OFFLINE" in lines[0]
    assert socket.gethostname() in lines[0]
    assert "wandb login" in lines[0]
    assert "`wandb leet`" in lines[0]
    assert backend.capabilities.redelivery is Redelivery.REBUILD


def test_offline_by_choice_says_nothing(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever chose offline knows it."""
    with caplog.at_level(logging.INFO, logger="trackhub_wandb"):
        rig.backend(mode="offline").preflight()
    assert not [record for record in caplog.records if record.name.startswith("trackhub_wandb")]


@pytest.mark.parametrize("source", ["option", "environment", "netrc"])
def test_login_that_is_found_makes_the_default_online(
    rig: Rig, emulator: Emulator, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    """A key from the options, the environment or the netrc file is a login. The server is asked whether it is good."""
    key = emulator.state.api_key
    if source == "environment":
        monkeypatch.setenv("WANDB_API_KEY", key)
    if source == "netrc":
        host = emulator.url.removeprefix("http://")
        Path(rig.folder.parent, "home", "netrc").write_text(f"machine {host}\n  login user\n  password {key}\n")
    backend = rig.backend(base_url=emulator.url, api_key=key if source == "option" else None)
    backend.preflight()
    assert backend.capabilities.redelivery is Redelivery.IDEMPOTENT
    assert emulator.state.requests == ["Viewer"]
    backend.close()
    assert services() == []


def test_online_without_a_login_is_an_error_that_says_how_to_log_in(rig: Rig) -> None:
    """Never silently offline."""
    with pytest.raises(ConfigError) as caught:
        rig.backend(mode="online").preflight()
    message = str(caught.value)
    assert socket.gethostname() in message
    assert all(part in message for part in ("wandb login", "WANDB_API_KEY", "${secret:NAME}", "mode='offline'"))


def test_environment_that_asks_for_online_needs_a_login_too(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """``WANDB_MODE=online`` is a choice."""
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(ConfigError, match="no W&B login"):
        rig.backend().preflight()


def test_environment_that_asks_for_offline_wins_over_a_login(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """``WANDB_MODE=offline`` is a choice."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    backend = rig.backend()
    backend.preflight()
    assert backend.capabilities.redelivery is Redelivery.REBUILD


def test_mode_in_which_nothing_would_be_recorded_is_refused(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend that was asked for and records nothing would be a silent loss."""
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(ConfigError, match="WANDB_MODE=disabled"):
        rig.backend().preflight()


def test_key_that_the_server_rejects_stops_the_job(online: Callable[..., WandBBackend]) -> None:
    """The backend finds a wrong key before training, and the message does not hold the key."""
    key = "wrong" * 8
    with pytest.raises(ConfigError, match="rejects the login") as caught:
        online(api_key=key).preflight()
    assert key not in str(caught.value)


def test_key_that_cannot_be_one_stops_the_job(online: Callable[..., WandBBackend]) -> None:
    """The SDK itself refuses a key that is too short."""
    with pytest.raises(ConfigError, match="40"):
        online(api_key="short").preflight()


def test_server_that_is_away_does_not_stop_the_job(online: Callable[..., WandBBackend], emulator: Emulator) -> None:
    """The records wait on disk."""
    emulator.stop()
    with pytest.raises(TransientError, match="cannot be reached"):
        online().preflight()


def test_proxy_that_is_away_is_named_before_training(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a person looks for the mistake at the server."""
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    backend = rig.backend(mode="online", base_url="http://wandb.example:8080", api_key="k" * 40)
    with pytest.raises(TransientError, match="proxy that HTTPS_PROXY or HTTP_PROXY names"):
        backend.preflight()


def test_no_proxy_is_named_where_only_its_exceptions_are_set(
    online: Callable[..., WandBBackend], emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("NO_PROXY", "elsewhere.example")
    emulator.stop()

    with pytest.raises(TransientError, match="cannot be reached now: "):
        online().preflight()


def test_settings_are_checked_before_training(rig: Rig) -> None:
    """An unknown field, and one that the backend must decide itself, are refused by name."""
    with pytest.raises(InvalidOptionError, match="no_such_setting"):
        rig.backend(mode="offline", settings={"no_such_setting": 1}).preflight()
    with pytest.raises(InvalidOptionError, match="run_id"):
        rig.backend(mode="offline", settings={"run_id": "mine"}).preflight()


def test_base_url_among_the_settings_is_refused(rig: Rig) -> None:
    """It would do nothing there: the login belongs to the option of that name."""
    with pytest.raises(InvalidOptionError, match="base_url"):
        rig.backend(mode="offline", settings={"base_url": "http://127.0.0.1:1"}).preflight()


def test_equal_names_for_step_and_round_are_refused(rig: Rig) -> None:
    """One would overwrite the other."""
    with pytest.raises(InvalidOptionError, match="round_metric"):
        rig.backend(step_metric="x", round_metric="x")


@pytest.mark.parametrize("column", ["", "_step", "user/step", "step*"])
def test_column_that_would_meet_another_key_is_refused_where_the_job_is_written(column: str) -> None:
    """W&B has keys that begin with _, and user/ is where taken keys go."""
    with pytest.raises(InvalidOptionError, match=r"wandb: step_metric .* cannot be a column; choose"):
        check_options("wandb", {"step_metric": column})


def test_marked_options_are_the_key_the_host_and_what_may_hold_hosts_and_paths() -> None:
    """The core knows no backend by name, and must know these."""
    marks = {name: found for name, found in option_marks(WandBBackend).items() if found}
    assert marks == {
        "api_key": {OptionMark.SECRET},
        "base_url": {OptionMark.HOST},
        "settings": {OptionMark.HOST, OptionMark.PATH},
    }


def test_key_that_is_no_reference_is_refused_where_the_job_is_written() -> None:
    """Also a short one, which does not look like a secret."""
    with pytest.raises(InvalidOptionError, match=r"wandb\.api_key"):
        check_options("wandb", {"api_key": "abc"})


def test_options_do_not_show_the_key() -> None:
    """Neither in a log line nor in a traceback."""
    options = WandBOptions(api_key="s3cret" * 8, project="demo")
    assert repr(options).startswith("WandBOptions(project='demo', api_key=***")
    assert "s3cret" not in f"{options} {options!r}"


def test_loading_the_plugin_imports_no_wandb() -> None:
    """Whoever lists or loads backends must not wait for an SDK."""
    code = "import sys, trackhub_wandb; assert 'wandb' not in sys.modules and 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
