# SPDX-License-Identifier: Apache-2.0
"""A spool that cannot be read does not fill the log: the sender says so once, and then at most once a minute."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.unit.rigs import FAST, SenderRig, log
from trackhub.spool.repeated_warnings import RepeatedWarnings


def _delete(spool: Path) -> None:
    shutil.rmtree(spool)


def _make_unreadable(spool: Path) -> None:
    """Put folders in the place of segments. The tests may run as root, whom no permission stops."""
    for segment in spool.glob("*-*.spool"):
        segment.unlink()
        segment.mkdir()


@pytest.mark.parametrize("damage", [_delete, _make_unreadable])
def test_a_spool_that_cannot_be_read_is_named_once(
    rig: SenderRig, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None]
) -> None:
    # Each keep-alive counts the spool: its warning and that of a pass used to take turns.
    rig.limits = msgspec.structs.replace(FAST, keepalive_s=0.1)
    sender = rig.sender()
    log(rig.spool, 10)
    assert sender.flush(5)
    log(rig.spool, 10, "b")
    damage(rig.spool)
    caplog.clear()

    rig.requests.clear()
    while len(rig.requests) < 8:  # keep-alives
        sender.flush(0.2)
    # Lanes that another test left behind, with a journal that it closed under them, log as well.
    own = [record for record in caplog.records if not record.name.startswith("trackhub.delivery.lane")]
    counted = Counter(record.getMessage() for record in own)
    sender.close(0.5)

    assert counted
    assert set(counted.values()) == {1}


def test_a_warning_comes_again_after_a_minute(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("trackhub.spool.repeated_warnings.time.monotonic", lambda: now)
    warnings = RepeatedWarnings(logging.getLogger("test"))
    for now in (100.0, 100.0, 159.9, 160.0, 219.0):
        warnings.warn("spool", f"gone at {now}")
        warnings.warn("ledger", f"bad at {now}")

    assert [record.getMessage() for record in caplog.records] == [
        "gone at 100.0", "bad at 100.0", "gone at 160.0", "bad at 160.0"
    ]  # fmt: skip
