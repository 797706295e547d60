# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of lanes and senders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rigs import Bench, SenderRig
from trackhub.delivery import request_retry
from trackhub.delivery.backoff import Backoff
from trackhub.delivery.lane import file_uploads, retry_timer


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lanes wait for milliseconds between two attempts."""
    for module in (retry_timer, file_uploads):
        monkeypatch.setattr(module, "Backoff", lambda: Backoff(0.001, 0.01))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A journal to put records into and lanes on."""
    bench = Bench(tmp_path / "receiver")
    yield bench
    bench.journal.close()


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SenderRig]:
    """A receiver, and senders that wait for milliseconds between two attempts."""
    monkeypatch.setattr(request_retry, "Backoff", lambda **_: Backoff(0.001, 0.02))
    rig = SenderRig(tmp_path)
    yield rig
    for sender in rig.senders:
        sender.close(0.0)
    if not rig.finished:
        rig.finish(1.0)
