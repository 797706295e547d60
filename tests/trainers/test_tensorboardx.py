# SPDX-License-Identifier: Apache-2.0
"""What a script logs with tensorboardX is captured as what it logs with torch's ``SummaryWriter``.

`make trainers` installs it into ``.venv-trainers``, and `make test-all` runs this test there.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from tests.integration.test_capture import _dropped, _of, _python, _records
from trackhub.records import Histogram, Image, Metrics, Params, Text
from trackhub.spool.layout import SpoolInfo, create_spool

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="not installed here: make trainers"),
]

SCRIPT = """
import numpy as np
from tensorboardX import SummaryWriter

with SummaryWriter("own") as writer:
    for step in range(100):
        writer.add_scalar("loss", step / 7, step)
    writer.add_scalar(tag="named", scalar_value=2.0, global_step=5)
    writer.add_scalars("both", {"x": 1, "y": 2}, 3)
    writer.add_text("note", "hello", 1)
    writer.add_histogram("weights", np.arange(10.0), 2)
    writer.add_image("image", np.zeros((3, 4, 5), np.uint8), 2)
    writer.add_hparams({"lr": 0.1}, {"final": 1.0})
"""


@pytest.mark.parametrize("mode", ["beside", "only"])
def test_calls_of_tensorboardx_become_records(tmp_path: Path, mode: str) -> None:
    spool = tmp_path / "spool"
    create_spool(spool, SpoolInfo("site-1", "job", ("server",)))

    _python(SCRIPT, spool, f"{mode}:tensorboard")

    records = _records(spool)
    metrics = _of(records, Metrics)
    assert metrics[:100] == [(Metrics({"loss": step / 7}), step) for step in range(100)]
    assert metrics[100:102] == [(Metrics({"named": 2.0}), 5), (Metrics({"both/x": 1.0, "both/y": 2.0}), 3)]
    assert metrics[102:] == [(Metrics({"final": 1.0}), None)]
    assert _of(records, Text, Params) == [(Text("note", "hello"), 1), (Params({"lr": 0.1}), None)]
    # An image is in another stream than a histogram, so the two have no order.
    assert {payload.key for payload, _ in _of(records, Histogram, Image)} == {"weights", "image"}
    assert _dropped(spool) == {}
    assert bool(list((tmp_path / "work").rglob("events.out.*"))) is (mode == "beside")
