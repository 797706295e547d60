# SPDX-License-Identifier: Apache-2.0
"""Norms and cosines of updates are those of numpy, for the forms in which FLARE carries models."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from nvflare.apis.dxo import DXO, DataKind, MetaKey
from nvflare.apis.shareable import Shareable

from trackhub.flare.model_updates import ModelUpdates

SITES = ("site-1", "site-2", "site-3")
RNG = np.random.default_rng(7)
BASE = {"weight": RNG.normal(size=(40, 7)), "bias": RNG.normal(size=7), "steps": np.array(5)}


class Rig:
    """Measures one round, and keeps what the log would say."""

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.lines: list[str] = []
        self.updates = ModelUpdates(self.lines.append, max_bytes)
        self.found: dict[str, float] = {}

    def answer(self, site: str, result: Any, sent: Any = BASE, task: str = "") -> None:
        """Take a site's result to a task with this model; None for a task without one."""
        task = task or f"task of {site}"
        if sent is not None:
            self.updates.note_sent(task, shareable(sent))
        self.found |= self.updates.take(task, site, result)

    def end(self) -> dict[str, float]:
        self.found |= self.updates.end()
        return self.found


def shareable(model: Any, kind: str = DataKind.WEIGHTS, **meta: Any) -> Shareable:
    return DXO(kind, data=model, meta=meta).to_shareable()


def changed(seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {name: array + rng.normal(size=np.shape(array)) for name, array in BASE.items() if name != "steps"}


def flat(model: dict[str, Any], names: tuple[str, ...] = ("weight", "bias")) -> Any:
    return np.concatenate([np.ravel(model[name]).astype(np.float64) for name in names])


def cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def expected(updates: dict[str, Any]) -> dict[str, Any]:
    mean = np.mean([*updates.values()], axis=0)
    norms = {f"fl/update_norm/{site}": pytest.approx(np.linalg.norm(u), rel=1e-12) for site, u in updates.items()}
    cosines = {f"fl/update_cosine/{site}": pytest.approx(cosine(u, mean), abs=1e-6) for site, u in updates.items()}
    return norms | cosines


@pytest.mark.parametrize("form", ["numpy", "torch", "difference", "float16", "bfloat16"])
def test_whole_models_and_differences_give_what_numpy_gives(form: str) -> None:
    rig, updates = Rig(), {}
    for seed, site in enumerate(SITES):
        model = changed(seed)
        if form == "float16":
            model = {name: array.astype(np.float16) for name, array in model.items()}
        elif form == "bfloat16":
            model = {name: torch.tensor(array).bfloat16().float().numpy() for name, array in model.items()}
        updates[site] = flat(model) - flat(BASE)
        result = shareable({**model, "steps": np.array(9)})
        if form in ("torch", "bfloat16"):
            kind = torch.bfloat16 if form == "bfloat16" else torch.float64
            tensors = {name: torch.tensor(array, requires_grad=True).to(kind) for name, array in model.items()}
            result = shareable({**tensors, "steps": torch.tensor(9)})
        elif form == "difference":
            result = shareable({name: array - BASE[name] for name, array in model.items()}, DataKind.WEIGHT_DIFF)
        rig.answer(site, result)

    assert rig.end() == expected(updates)
    assert rig.lines == []


@given(st.lists(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), min_size=1, max_size=6))
def test_any_updates_give_what_numpy_gives(vectors: list[list[float]]) -> None:
    rig = Rig()
    for i, vector in enumerate(vectors):
        rig.answer(f"site-{i}", shareable({"w": np.array(vector)}), {"w": np.zeros(3)})
    found = rig.end()

    mean = np.mean(vectors, axis=0)
    for i, vector in enumerate(vectors):
        norm = np.linalg.norm(vector)
        assert found[f"fl/update_norm/site-{i}"] == pytest.approx(norm, rel=1e-12)
        if norm > 1e-3 and np.linalg.norm(mean) > 1e-3:
            assert found[f"fl/update_cosine/site-{i}"] == pytest.approx(cosine(np.array(vector), mean), abs=1e-4)


def test_rounds_and_workflows_that_relay_the_model_are_measured_against_what_was_sent() -> None:
    """In a cyclic workflow, each site gets the model of the one before it."""
    rig = Rig()
    first, second = changed(1), changed(2)
    rig.answer("site-1", shareable(first))
    rig.answer("site-2", shareable(second), sent=first)
    assert rig.end() == expected({"site-1": flat(first) - flat(BASE), "site-2": flat(second) - flat(first)})

    rig.found = {}
    rig.answer("site-1", shareable(second))
    assert rig.end() == expected({"site-1": flat(second) - flat(BASE)})


def test_arrays_that_only_one_side_has_count_as_unchanged() -> None:
    rig, model = Rig(), changed(3)
    other = {"bias": model["bias"], "weight": np.zeros((2, 2)), "new": np.ones(3)}  # of another shape, and a new one
    rig.answer("site-1", shareable(model))
    rig.answer("site-2", shareable(other))

    whole = flat(model) - flat(BASE)
    part = np.concatenate([np.zeros(BASE["weight"].size), model["bias"] - BASE["bias"]])
    assert rig.end() == expected({"site-1": whole, "site-2": part})


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        (shareable(changed(1), **{MetaKey.PROCESSED_ALGORITHM: "_HE_CKKS_"}), "encrypted, quantized"),
        (shareable({"weight": object()}), "holds a object"),
        (shareable({"other": np.ones(2)}), "expected floating-point arrays"),
        (
            shareable({"site-7": DXO(DataKind.WEIGHTS, data=changed(1))}, DataKind.COLLECTION),
            "models of several clients",
        ),
        (shareable({"weight": torch.eye(40, 7).to_sparse()}), "of its update is missing"),
    ],
)
def test_what_cannot_be_read_is_left_out_counted_and_said_once(result: Shareable, reason: str) -> None:
    rig, model = Rig(), changed(2)
    for _ in range(2):
        rig.found = {}
        rig.answer("site-1", result)
        rig.answer("site-2", shareable(model))
        assert rig.end() == expected({"site-2": flat(model) - flat(BASE)}) | {"fl/updates_left_out": 1}

    assert len(rig.lines) == 1
    assert reason in rig.lines[0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200])
def test_an_update_that_is_not_finite_poisons_no_other(bad: float) -> None:
    rig, good = Rig(), changed(2)
    rig.answer("site-1", shareable({**changed(1), "bias": np.full(7, bad)}))
    rig.answer("site-2", shareable(good))

    found = rig.end()

    assert not math.isfinite(found.pop("fl/update_norm/site-1"))
    assert found == expected({"site-2": flat(good) - flat(BASE)}) | {"fl/updates_left_out": 1}


def test_metrics_and_models_that_answer_no_model_are_no_updates() -> None:
    rig = Rig()
    rig.answer("site-1", shareable({"accuracy": 0.5}, DataKind.METRICS))
    rig.answer("site-2", shareable(changed(1)), sent=None)  # as in cross-site evaluation
    rig.answer("site-3", Shareable())

    assert rig.end() == {}
    assert rig.lines == []


def test_updates_beyond_the_limit_have_a_norm_and_count_in_the_mean() -> None:
    models = {site: changed(seed) for seed, site in enumerate(SITES)}
    updates = {site: flat(model) - flat(BASE) for site, model in models.items()}
    numbers = len(updates["site-1"])
    rig = Rig(max_bytes=8 * numbers + 2 * 4 * numbers)  # the sum, and two updates
    for site, model in models.items():
        rig.answer(site, shareable(model))

    found, all_of_it = rig.end(), expected(updates)

    del all_of_it["fl/update_cosine/site-3"]
    assert found == all_of_it | {"fl/updates_left_out": 1}
    assert "take more than" in rig.lines[0]

    small = Rig(max_bytes=8 * numbers - 1)
    small.answer("site-1", shareable(models["site-1"]))
    assert sorted(small.end()) == ["fl/update_norm/site-1", "fl/updates_left_out"]


def test_only_the_first_model_of_a_site_in_a_round_counts() -> None:
    rig, first = Rig(), changed(1)
    rig.answer("site-1", shareable(first), task="a")
    rig.answer("site-1", shareable(changed(2)), task="b")

    assert rig.end() == expected({"site-1": flat(first) - flat(BASE)})
