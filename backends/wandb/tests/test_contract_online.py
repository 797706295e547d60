# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
from trackhub_wandb.contract import WandBContract, add_row
from trackhub_wandb.offline_readback import parse_integer

from tests.support.wandb_emulator import Emulator
from trackhub.testing import ArtifactItem, ReadBack, RunInfo, StoreContext

pytestmark = pytest.mark.long

KEY_VARIABLE = "TRACKHUB_TEST_WANDB_KEY"


@pytest.fixture(autouse=True, scope="module")
def _emulated() -> Iterator[None]:
    with Emulator(accept_any_key=True) as server:
        TestWandBOnline._server = server
        yield
    assert server.violations == []


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "k" * 40)


class ServerOutage:
    """The emulated server, taken away and brought back."""

    def __init__(self, server: Emulator) -> None:
        self._server = server

    def begin(self) -> None:
        """Take the server away."""
        self._server.stop()

    def end(self) -> None:
        """Bring it back."""
        self._server.start()


class TestWandBOnline(WandBContract):
    """The same contract, with the unmodified client and a strict emulator of the server's protocol."""

    _server: ClassVar[Emulator]
    secret_options: ClassVar[Mapping[str, str]] = {"api_key": "${secret:TRACKHUB_CONTRACT_SECRET}"}

    def options(self, tmp_path: Path) -> Mapping[str, Any]:
        return {
            "mode": "online",
            "base_url": self._server.url,
            "api_key": f"${{secret:{KEY_VARIABLE}}}",
            "upload_interval_s": 1.0,
        }

    def outage(self, context: StoreContext) -> ServerOutage:
        return ServerOutage(self._server)

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        state = self._server.state
        with state.lock:
            held = state.runs[run.run_id]
            params = held.params()
            found = ReadBack(points=[], params={}, tags={}, texts=[], images=[], histograms=[], tables=[], artifacts=[])
            entry = params.pop("trackhub")
            found.params, found.tags = params, entry.get("tags", {})
            # A server's summary also has the last value of each key of the history.
            summary = json.loads(held.summary, parse_int=parse_integer)
            found.summary = {key: summary[key] for key in entry.get("summary", {})}
            for row in held.rows:
                add_row(found, json.loads(row, parse_int=parse_integer), held.files.__getitem__)
            for one in state.artifacts:
                if one.run_name == run.run_id and one.artifact_type != "run_table":
                    (filename,) = set(one.files) - {"wandb_manifest.json"}
                    about = one.metadata
                    item = ArtifactItem(
                        about["key"], one.files[filename], filename, one.artifact_type, about.get("step"), about["time"]
                    )
                    found.artifacts = [*(found.artifacts or ()), item]
            found.status = None if held.state == "running" else held.state
        return found

    def canonical_value(self, value: float) -> float:
        """On its way to the server, W&B writes -0.0 as ``0``."""
        return value + 0.0

    def canonical_params(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """W&B writes 2.0 as ``2``."""
        found: Mapping[str, Any] = json.loads(json.dumps(super().canonical_params(params)), parse_float=_number)
        return found


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() else value
