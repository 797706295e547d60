# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests of lanes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.rigs import Bench
from trackhub.delivery.lane import file_uploads, retry_timer, run_delivery
from trackhub.delivery.retry import Backoff


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have lanes wait for milliseconds between two attempts."""
    for module in (retry_timer, run_delivery, file_uploads):
        monkeypatch.setattr(module, "Backoff", lambda: Backoff(0.001, 0.01))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    """A journal to put records into and lanes on."""
    bench = Bench(tmp_path / "receiver")
    yield bench
    bench.journal.close()
