# SPDX-License-Identifier: Apache-2.0
"""The check before a job says "no" for exactly those errors that stop the job in its receiver."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import MakePlugin
from trackhub.delivery.receiver import Receiver
from trackhub.errors import TrackhubError
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.preflight import Readiness, check_ready

PLUGIN = """
    from trackhub.spi import Backend, ConfigError, TransientError

    class Odd(Backend):
        spi = 1

        def __init__(self, options, context):
            super().__init__(options, context)
            if WHERE == "init":
                raise ERROR

        def preflight(self):
            if WHERE == "preflight":
                raise ERROR

        def open_run(self, info):
            raise NotImplementedError

        def close(self):
            if WHERE == "close":
                raise ERROR
"""
ERRORS = ["ConfigError('log in')", "ImportError('no SDK')", "TransientError('down')", "ValueError('a defect')"]


@pytest.mark.parametrize("where", ["init", "preflight", "close"])
@pytest.mark.parametrize("error", ERRORS)
def test_the_check_says_no_if_and_only_if_the_job_would_be_stopped(
    tmp_path: Path, make_plugin: MakePlugin, where: str, error: str
) -> None:
    make_plugin("odd", {"odd": "odd_check:Odd"}, {"odd_check": f"{PLUGIN}\n    WHERE, ERROR = {where!r}, {error}\n"})
    receiver = Receiver(tmp_path, job=JobInfo("j"), side=Side.SERVER, backends={"odd": {}}, limits=Limits())

    said = check_ready("odd", {})

    try:
        receiver.start()
        is_stopped = False
    except TrackhubError:
        is_stopped = True
    else:
        receiver.finish(RunStatus.FINISHED)
    assert (said.word is Readiness.NO) == is_stopped, said
    if where == "close":
        assert said.word is Readiness.YES
