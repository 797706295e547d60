# SPDX-License-Identifier: Apache-2.0
"""The contract kit's receiver delivers into the class that it was given, and not into an installed plugin."""

from __future__ import annotations

from pathlib import Path

from trackhub.builtin.jsonl import JsonlBackend
from trackhub.job_and_run_info import JobInfo, RunStatus, Side
from trackhub.limits import Limits
from trackhub.testing.receiver_rig import ReceiverOfClass


class OtherBackend(JsonlBackend):
    """A backend that no entry point names. The installed ``jsonl`` has the same name."""


def test_the_receiver_of_the_kit_uses_the_class_that_it_was_given(tmp_path: Path) -> None:
    """Otherwise the kit injects no faults, and passes a backend that it never called."""
    receiver = ReceiverOfClass(
        OtherBackend, tmp_path, job=JobInfo("j"), side=Side.SERVER, backends={"jsonl": {}}, limits=Limits()
    )

    receiver.start()
    receiver.finish(RunStatus.FINISHED)

    assert type(receiver.backend) is OtherBackend
