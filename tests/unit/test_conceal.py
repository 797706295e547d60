# SPDX-License-Identifier: Apache-2.0
"""A secret that the process knows is in no log record, no error, no journal and no report."""

from __future__ import annotations

import base64
import errno
import io
import json
import logging
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import pytest

from tests.unit.readers_and_bad_backends import STREAM, batch_of, metric
from trackhub import conceal as module
from trackhub.conceal import clean_errors, conceal, remember_secret
from trackhub.delivery import Limits, Receiver, RunStatus, Side
from trackhub.delivery import receiver as receiver_module
from trackhub.delivery.wire import encode
from trackhub.errors import ConfigError, JournalError, TrackhubError

if TYPE_CHECKING:
    from tests.conftest import MakePlugin

SECRET = 'planted/"s3cr3t"+&'


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    factory = logging.getLogRecordFactory()
    monkeypatch.setattr(module, "_known", ())
    yield
    logging.setLogRecordFactory(factory)


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """The text of all log records, as a handler of anybody's writes it."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def forms(secret: str) -> list[str]:
    return [secret, quote(secret, safe=""), json.dumps(secret), repr(secret)]


def test_each_form_of_a_secret_is_concealed_and_nothing_else() -> None:
    remember_secret(SECRET)
    remember_secret("abc")
    remember_secret(None)

    for form in forms(SECRET):
        assert "s3cr3t" not in conceal(f"a {form} b")
    assert conceal("abc") == "abc"
    assert conceal(f"x{SECRET}y") == "x***y"


@pytest.mark.parametrize("user", ["", "a", "ab", "abc", "api"])
@pytest.mark.parametrize("after", ["", "x", "xy"])
def test_a_secret_in_an_authorization_header_is_concealed(user: str, after: str) -> None:
    remember_secret("k" * 40)
    header = base64.b64encode(f"{user}:{'k' * 40}{after}".encode()).decode()

    shown = conceal(f"Authorization: Basic {header}")

    assert "***" in shown
    assert len(shown) < len("Authorization: Basic ") + 20


def test_of_two_secrets_the_one_that_holds_the_other_is_concealed_whole() -> None:
    remember_secret("token")
    remember_secret("token-and-more")

    assert conceal("token-and-more") == "***"


def test_log_records_of_any_logger_are_clean(log: io.StringIO) -> None:
    remember_secret(SECRET)
    logger = logging.getLogger("somebody.elses.sdk")

    logger.warning("url %s", f"http://h?k={quote(SECRET, safe='')}")
    logger.warning("dict %s and %d", {"key": SECRET}, 3)
    logger.warning("wrong %s")
    try:
        try:
            raise ValueError(f"inner {SECRET}")
        except ValueError as e:
            raise RuntimeError("outer") from e
    except RuntimeError:
        logger.exception("it failed")
    logger.warning("untouched %s", "text")

    text = log.getvalue()
    assert "s3cr3t" not in text
    assert "inner ***" in text
    assert "RuntimeError: outer" in text
    assert "untouched text" in text


def test_an_error_and_its_causes_are_clean() -> None:
    remember_secret(SECRET)

    with pytest.raises(ConfigError) as caught, clean_errors():
        try:
            raise ValueError(SECRET)
        except ValueError as e:
            raise ConfigError("the login failed") from e

    assert "s3cr3t" not in "".join(traceback.format_exception(caught.value))
    with pytest.raises(ConfigError) as caught, clean_errors():
        raise ConfigError("plain") from ValueError("cause")
    assert isinstance(caught.value.__cause__, ValueError)


LEAKY = """
    import logging, os
    from typing import Annotated
    import msgspec
    from trackhub.spi import (
        Backend, BackendRun, Capabilities, ConfigError, ConfirmedBy, Credentials, OptionMark, Results, TransientError,
        remember_secret,
    )

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        key: Annotated[str, OptionMark.SECRET] = ""
        fails_in: str = ""

    class Leaky(Backend[Options]):
        spi = 1
        capabilities = Capabilities(confirmed_by=ConfirmedBy.WRITE)
        credentials = Credentials(("LEAKY_TOKEN",))

        def __init__(self, options, context):
            super().__init__(options, context)
            with open(os.environ["LEAKY_FILE"]) as file:
                found = file.read()
            remember_secret(found)
            self.secrets = f"{options.key} {os.environ['LEAKY_TOKEN']} {found}"
            self.fail_in("constructor", RuntimeError)

        def fail_in(self, place, error):
            logging.getLogger("leaky").warning("%s: %s", place, self.secrets)
            if self.options.fails_in == place:
                raise error(f"{place}: {self.secrets}") from ValueError(self.secrets)

        def preflight(self):
            self.fail_in("preflight", ConfigError)

        def open_run(self, info):
            self.fail_in("open_run", TransientError)
            return Run(self)

        def results(self, info):
            return Results(url=f"http://h/{self.secrets}", command=f"open {self.secrets}")

        def close(self):
            self.fail_in("close", RuntimeError)

    class Run(BackendRun):
        def __init__(self, backend):
            self.backend = backend

        def write(self, batch):
            self.backend.fail_in("write", OSError)

        def finish(self, status):
            self.backend.fail_in("finish", RuntimeError)
"""


def read_everything(folder: Path) -> str:
    return "".join(path.read_bytes().decode(errors="replace") for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def leaky(tmp_path: Path, make_plugin: MakePlugin, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a backend that shows its secrets everywhere."""
    monkeypatch.syspath_prepend(str(make_plugin("leaky", {"leaky": "leaky_p:Leaky"}, {"leaky_p": LEAKY})))
    (tmp_path / "secret").write_text("s3cr3t-of-a-file")
    monkeypatch.setenv("LEAKY_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("LEAKY_TOKEN", "s3cr3t-of-the-environment")
    monkeypatch.setenv("OPTION", "s3cr3t-of-an-option")
    return {"key": "${secret:OPTION}"}


@pytest.mark.parametrize("fails_in", ["", "constructor", "preflight", "open_run", "write", "finish", "close"])
def test_a_backend_that_shows_its_secrets_everywhere_shows_none(
    tmp_path: Path, leaky: dict[str, Any], log: io.StringIO, capfd: pytest.CaptureFixture[str], fails_in: str
) -> None:
    run_dir = tmp_path / "run"
    options = {**leaky, "fails_in": fails_in}
    receiver = Receiver(run_dir, job="job", side=Side.LOCAL, backends={"leaky": options}, limits=Limits(deadline_s=1.0))

    error: TrackhubError | None = None
    report = None
    try:
        receiver.start()
    except TrackhubError as e:
        error = e
    else:
        receiver.handle("site-1", encode(batch_of([metric(0)], STREAM)))
        report = receiver.finish(RunStatus.FINISHED)

    shown = log.getvalue() + "".join(capfd.readouterr()) + repr(report) + read_everything(run_dir)
    if error is not None:
        shown += "".join(traceback.format_exception(error))
    assert (error is not None) == (fails_in in ("constructor", "preflight"))
    assert "***" in shown
    assert "s3cr3t" not in shown


@pytest.mark.parametrize("fails_in", ["constructor", "preflight"])
def test_the_last_attempt_of_a_waiting_receiver_to_start_shows_no_secret(
    tmp_path: Path, leaky: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fails_in: str
) -> None:
    def no_space(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "no space")

    receiver = Receiver(tmp_path, job="job", side=Side.LOCAL, backends={"leaky": {**leaky, "fails_in": fails_in}})
    with monkeypatch.context() as full_disk:
        full_disk.setattr(receiver_module, "set_up_backends", no_space)
        receiver.start()

    with pytest.raises(JournalError) as caught:
        receiver.finish(RunStatus.FINISHED)

    shown = "".join(traceback.format_exception(caught.value))
    assert "***" in shown
    assert "s3cr3t" not in shown
