# SPDX-License-Identifier: Apache-2.0
"""Scripts also call the loggers and callbacks themselves, with whatever they have. A bad value costs itself.

`make trainers` installs the trainers' libraries into ``.venv-trainers``, and `make test-all` runs these tests there.
"""

from __future__ import annotations

import argparse
import collections
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.readers_and_bad_backends import new_spool
from tests.unit.test_writer_bad_values import Evil, Optim, count_of, payloads
from trackhub.records import Metrics, Params, Text
from trackhub.writer.writer import Writer

pytestmark = pytest.mark.long


@pytest.fixture
def writer(tmp_path: Path) -> Writer:
    return Writer(new_spool(tmp_path / "spool"))


@pytest.fixture
def lightning(writer: Writer) -> Any:
    pytest.importorskip("lightning", reason="not installed here: make trainers")
    from trackhub.integrations.lightning import TrackhubLogger

    return TrackhubLogger(writer)


class OwnDict(dict[str, Any]):
    """Has an empty ``__dict__``, as Lightning's ``AttributeDict`` has, which is the type of ``self.hparams``."""


PARAMS = {
    "a dict": {"lr": 0.1},
    "a subclass of dict": OwnDict(lr=0.1),
    "an OrderedDict": collections.OrderedDict(lr=0.1),
    "a mapping with fields of its own, as an OmegaConf is": collections.UserDict(lr=0.1),
    "a namespace": argparse.Namespace(lr=0.1),
}


@pytest.mark.parametrize("what", PARAMS)
def test_lightning_logs_hyperparameters_of_any_kind(lightning: Any, writer: Writer, what: str) -> None:
    lightning.log_hyperparams(PARAMS[what], seed=3)

    assert payloads(writer) == [Params({"lr": 0.1}), Params({"seed": 3})]


def test_an_omegaconf_with_a_missing_value_keeps_the_others(lightning: Any, writer: Writer) -> None:
    omegaconf = pytest.importorskip("omegaconf", reason="not installed here: make trainers")
    config = omegaconf.OmegaConf.create({"lr": 0.1, "data": {"path": "???", "size": 3, "l": [1, 2]}})
    writer.log_params(config)
    lightning.log_hyperparams(config)
    assert payloads(writer) == [Params({"lr": 0.1, "data/size": 3, "data/l": [1, 2]})] * 2
    assert count_of(writer).altered == {"invalid_value": 2}


def test_a_lightning_module_logs_its_own_hyperparameters(lightning: Any, writer: Writer) -> None:
    from lightning.pytorch.core.mixins import HyperparametersMixin

    class Module(HyperparametersMixin):  # type: ignore[misc]  # not installed beside mypy
        def __init__(self, width: int = 3) -> None:
            super().__init__()
            self.save_hyperparameters(logger=False)

    lightning.log_hyperparams(Module().hparams)
    assert payloads(writer) == [Params({"width": 3})]


def test_lightning_logs_the_fields_of_objects_and_counts_other_values(lightning: Any, writer: Writer) -> None:
    lightning.log_hyperparams(Optim())
    lightning.log_hyperparams(None)
    for value in (5, [1], "x"):
        lightning.log_hyperparams(value)
    lightning.log_metrics(None)
    lightning.log_metrics({"loss": 0.5}, 1)

    found = payloads(writer)
    assert (found[0], found[-1]) == (Params({"lr": 0.1, "betas": [0.9, 0.999]}), Metrics({"loss": 0.5}))
    assert count_of(writer).dropped == {"invalid_call": 4}


def test_a_prefix_comes_before_the_metrics_of_lightning(lightning: Any, writer: Writer) -> None:
    type(lightning)(writer, prefix="fold-1").log_metrics({"loss": 0.5}, 1)

    assert payloads(writer) == [Metrics({"fold-1/loss": 0.5})]


def test_accelerate_logs_texts_in_nested_values_and_counts_what_is_no_mapping(writer: Writer) -> None:
    pytest.importorskip("accelerate", reason="not installed here: make trainers")
    from trackhub.integrations.accelerate import TrackhubTracker

    tracker: Any = TrackhubTracker(writer)
    tracker.log({"val": {"acc": 0.5, "note": "x"}}, 1)
    for call in (tracker.log, tracker.log_images, tracker.store_init_configuration):
        call(5)

    assert payloads(writer) == [Text("val/note", "x"), Metrics({"val/acc": 0.5})]
    assert count_of(writer).dropped == {"invalid_call": 3}


def test_hugging_faces_callback_takes_names_of_any_type(writer: Writer) -> None:
    pytest.importorskip("transformers", reason="not installed here: make trainers")
    from trackhub.integrations.transformers import TrackhubCallback

    state = types.SimpleNamespace(is_world_process_zero=True, global_step=1)
    callback = TrackhubCallback(writer)
    callback.on_log(None, state, None, logs={1: 0.5, "eval_loss": 0.25, "lr": 0.125})
    callback.on_log(None, state, None, logs=5)

    assert payloads(writer)[0] == Metrics({"train/1": 0.5, "train/lr": 0.125, "eval/loss": 0.25})
    assert count_of(writer).dropped == {"invalid_call": 1}


def test_an_optimizer_without_a_configuration_does_not_end_keras(
    writer: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    keras = pytest.importorskip("keras", reason="not installed here: make trainers")
    from trackhub.integrations.keras import TrackhubCallback

    sgd: Any = keras.optimizers.SGD

    class Own(sgd):  # type: ignore[misc]  # not installed beside mypy
        def get_config(self) -> Any:
            raise NotImplementedError

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(optimizer=Own(0.1), loss="mse")
    model.fit(np.ones((8, 3)), np.zeros(8), epochs=1, verbose=0, callbacks=[TrackhubCallback(writer)])

    found = payloads(writer)
    assert isinstance(found[0], Params)
    assert found[0].values["optimizer/name"] == "Own"
    assert isinstance(found[-1], Metrics)
    assert count_of(writer).dropped == {"invalid_call": 1}


def test_a_model_that_raises_ends_no_training_of_xgboost(writer: Writer) -> None:
    pytest.importorskip("xgboost", reason="not installed here: make trainers")
    from trackhub.integrations.xgboost import TrackhubCallback

    callback, model = TrackhubCallback(writer), Evil()
    assert callback.before_training(model) is model
    assert callback.after_iteration(model, 0, Evil()) is False
    assert callback.after_training(model) is model
    assert count_of(writer).dropped == {"invalid_call": 3}
