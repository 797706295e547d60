# SPDX-License-Identifier: Apache-2.0
"""A model of 200 MB as an artifact: it arrives whole, and each backend shows it in its own form."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import trackhub
from tests.unit.readers_and_bad_backends import json_lines
from trackhub.limits import Limits

MODEL_BYTES = 200 << 20


@pytest.mark.long
def test_a_model_of_200_mb_arrives_whole_and_tensorboard_names_it(tmp_path: Path) -> None:
    model = tmp_path / "model.pt"
    with model.open("wb") as file:
        for seed in range(MODEL_BYTES >> 20):
            file.write(random.Random(seed).randbytes(1 << 20))
    with model.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()

    with trackhub.local(["jsonl", "tensorboard"], folder=tmp_path, job="j", limits=Limits(deadline_s=120)) as writer:
        writer.log_artifact(model, "model/best.pt", "model")
        model.unlink()  # the copy is what arrives
        writer.log({"loss": 0.5}, 1)

    (line,) = [line for line in json_lines(tmp_path / "j/jsonl/j/local.jsonl") if line["kind"] == "artifact"]
    assert (line["size"], line["sha256"]) == (MODEL_BYTES, digest)
    with (tmp_path / "j/jsonl/j" / line["file"]).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == digest
    reader = EventAccumulator(str(tmp_path / "j/tensorboard/j/local"), size_guidance={"tensors": 0})
    reader.Reload()
    (event,) = reader.Tensors("model/best.pt")
    text = event.tensor_proto.string_val[0].decode()
    assert f"| model.pt | model | {MODEL_BYTES} | {digest} |" in text
