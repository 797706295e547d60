# SPDX-License-Identifier: Apache-2.0
"""The contract kit: tests that any backend can be put to, and that say whether it is right.

::

    class TestAcme(BackendContract):
        backend = AcmeBackend

        def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack: ...

It needs pytest: ``pip install 'flare-trackhub[testing]'``. ``docs/writing-a-backend.md`` is the guide.
"""

from __future__ import annotations

import pytest

# Before they are imported: a failing `assert` in the kit then shows its values, as it does in a test file.
pytest.register_assert_rewrite(
    "trackhub.testing.contract",
    "trackhub.testing.scenarios",
    "trackhub.testing.checks.delivery",
    "trackhub.testing.checks.hygiene",
    "trackhub.testing.checks.lifecycle",
    "trackhub.testing.checks.stored_records",
)

from trackhub.run import RunInfo, RunStatus  # noqa: E402
from trackhub.spi import Kind  # noqa: E402
from trackhub.testing.author import ContractHooks, StoreContext  # noqa: E402
from trackhub.testing.contract import BackendContract  # noqa: E402
from trackhub.testing.outages import FolderPeer, Peer  # noqa: E402
from trackhub.testing.readback import (  # noqa: E402
    ArtifactItem,
    HistogramItem,
    ImageItem,
    Point,
    ReadBack,
    TableItem,
    TextItem,
)
from trackhub.testing.version import KIT_VERSION  # noqa: E402

__all__ = [
    "KIT_VERSION",
    "ArtifactItem",
    "BackendContract",
    "ContractHooks",
    "FolderPeer",
    "HistogramItem",
    "ImageItem",
    "Kind",
    "Peer",
    "Point",
    "ReadBack",
    "RunInfo",
    "RunStatus",
    "StoreContext",
    "TableItem",
    "TextItem",
]
