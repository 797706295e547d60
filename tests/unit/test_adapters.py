# SPDX-License-Identifier: Apache-2.0
"""The adapters take the calls of FLARE's own writers, and log what those would."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.helpers import read_spool
from trackhub.errors import ConfigError, RecordError
from trackhub.records import Artifact, Histogram, Image, Metrics, Params, Payload, Tags, Text
from trackhub.spool.announcement import SPOOL_ENV, spool_env
from trackhub.spool.layout import SpoolInfo, create_spool
from trackhub.spool.reading import SpoolReader
from trackhub.writer import adapters

NAMES = ["SummaryWriter", "WandBWriter", "MLflowWriter"]


@pytest.fixture
def spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A spool as a FLARE client announces it to its trainer."""
    create_spool(tmp_path / "spool", SpoolInfo("site-1", "job-1", ("server",)))
    monkeypatch.setenv(SPOOL_ENV, spool_env(tmp_path / "spool", "site-1", "job-1"))
    return tmp_path / "spool"


@pytest.mark.parametrize("name", NAMES)
def test_every_method_of_flares_writer_is_there_with_its_parameters(name: str) -> None:
    from nvflare.client import tracking

    theirs, ours = getattr(tracking, name), getattr(adapters, name)
    methods = [m for m, _ in inspect.getmembers(theirs, inspect.isfunction) if m == "__init__" or m[0] != "_"]

    assert methods, name
    for method in methods:
        expected = inspect.signature(getattr(theirs, method)).parameters
        found = inspect.signature(getattr(ours, method)).parameters
        # Only keyword arguments may come in addition.
        shared = {k: p for k, p in found.items() if p.kind is not p.KEYWORD_ONLY}
        assert [(p.name, p.kind, p.default) for p in shared.values()] == [
            (p.name, p.kind, p.default) for p in expected.values()
        ], f"{name}.{method}"


def payloads(spool: Path) -> list[tuple[Payload, int | None]]:
    """Return what was logged: first the records without files."""
    records = [record for records in read_spool(spool).values() for record in records]
    records.sort(key=lambda record: isinstance(record.payload, Image | Artifact))
    return [(record.payload, record.step) for record in records]


def test_the_calls_of_flares_wandb_example_work(spool: Path) -> None:
    writer = adapters.WandBWriter()
    writer.log({"train_loss": 0.25}, 3)
    writer.log({"a": 1, "b": np.float32(0.5).item()})
    writer.log({})
    writer.finish()

    assert payloads(spool) == [(Metrics({"train_loss": 0.25}), 3), (Metrics({"a": 1.0, "b": 0.5}), None)]


def test_the_calls_of_tensorboard_work(spool: Path, tmp_path: Path) -> None:
    with adapters.SummaryWriter() as writer:
        writer.add_scalar("loss", 0.5, 7)
        writer.add_scalar(tag="loss", scalar=0.25, global_step=8, new_style=True)
        writer.add_scalars("acc", {"train": 0.5, "val": 0.25}, 9)
        writer.add_text("note", "*hi*")
        writer.add_image("x", np.zeros((3, 4, 5), np.uint8), 1)
        writer.add_histogram("w", [0.0, 1.0], 2, bins="tensorflow")
        writer.flush()

    found = payloads(spool)
    assert found[:4] == [
        (Metrics({"loss": 0.5}), 7),
        (Metrics({"loss": 0.25}), 8),
        (Metrics({"acc/train": 0.5, "acc/val": 0.25}), 9),
        (Text("note", "*hi*"), None),
    ]
    histogram, image = found[4][0], found[5][0]
    assert isinstance(image, Image)
    assert (image.width, image.height) == (5, 4)
    assert isinstance(histogram, Histogram)
    assert (len(histogram.counts), sum(histogram.counts)) == (30, 2)


def test_the_calls_of_mlflow_work(spool: Path, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"weights")
    with adapters.MLflowWriter() as writer:
        writer.log_param("lr", 0.1)
        writer.log_params({"path": tmp_path, "object": NAMES.index, "layers": [1, 2, tmp_path]})
        writer.log_metric("loss", 0.5, step=1)
        writer.log_metrics({"a": 1.0, "b": 2.0}, 2)
        writer.log_text("hello", "notes/a.txt")
        writer.set_tag("n", 5)
        writer.set_tags({"who": "me", "none": None})
        writer.log_artifact(tmp_path / "model.bin", "models")

    found = payloads(spool)
    assert found[:7] == [
        (Params({"lr": 0.1}), None),
        (Params({"path": str(tmp_path), "object": str(NAMES.index), "layers": [1, 2, str(tmp_path)]}), None),
        (Metrics({"loss": 0.5}), 1),
        (Metrics({"a": 1.0, "b": 2.0}), 2),
        (Text("notes/a.txt", "hello"), None),
        (Tags({"n": "5"}), None),
        (Tags({"who": "me", "none": "None"}), None),
    ]
    assert isinstance(found[7][0], Artifact)
    assert found[7][0].key == "models/model.bin"


@pytest.mark.parametrize(
    "call",
    [
        lambda strict: adapters.WandBWriter(strict=strict).log({"": 1.0}),
        lambda strict: adapters.WandBWriter(strict=strict).log(None),  # type: ignore[arg-type]
        lambda strict: adapters.SummaryWriter(strict=strict).add_scalar("x", "a"),  # type: ignore[arg-type]
        lambda strict: adapters.SummaryWriter(strict=strict).add_scalars("x", {"y": None}),  # type: ignore[dict-item]
        lambda strict: adapters.SummaryWriter(strict=strict).add_histogram("x", None),
        lambda strict: adapters.MLflowWriter(strict=strict).log_metric("x", 1.0, -1),
        lambda strict: adapters.MLflowWriter(strict=strict).log_params(5),  # type: ignore[arg-type]
        lambda strict: adapters.MLflowWriter(strict=strict).log_artifact(None, "folder"),  # type: ignore[arg-type]
    ],
    ids=["key", "mapping", "value", "scalars", "histogram", "step", "params", "path"],
)
def test_a_bad_call_is_counted_or_if_strict_an_error(spool: Path, call: Callable[[bool], Any]) -> None:
    with pytest.raises(RecordError):
        call(True)
    call(False)
    (count,) = SpoolReader(spool, "server").counts().values()
    assert count.logged == sum(count.dropped.values()) == 1


@pytest.mark.parametrize("name", NAMES)
def test_outside_a_job_the_error_of_a_strict_one_says_what_to_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPOOL_ENV, raising=False)
    with pytest.raises(ConfigError, match="add_tracking"):
        getattr(adapters, name)(strict=True)


def test_nothing_of_flare_or_of_the_sdks_is_imported() -> None:
    code = "import sys, trackhub.writer.adapters; print(*{m.partition('.')[0] for m in sys.modules})"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"nvflare", "wandb", "mlflow", "tensorboard", "torch", "numpy", "sqlite3"} & set(modules)
