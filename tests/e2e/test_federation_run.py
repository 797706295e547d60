# SPDX-License-Identifier: Apache-2.0
"""The CIFAR-10 job with four uneven sites: each backend has the statistics that numpy makes of the sites' points."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.stores import BACKENDS, own_home, read_run
from tests.e2e.test_cifar10_job import run_job
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.testing import Point

SITES = [f"site-{number}" for number in range(1, 5)]
ROUNDS = 5
KEYS = ("val/loss", "val/accuracy", "train/accuracy", "train/epoch_loss")
STATISTICS: dict[str, Callable[[Any], Any]] = {
    "mean": np.mean,
    "std": np.std,
    "min": np.min,
    "max": np.max,
    "count": np.size,
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_home(tmp_path / "home", monkeypatch)


def by_key(points: Iterable[Point]) -> dict[str, dict[int | None, float]]:
    """Return the value of each key and step. There is one."""
    found: dict[str, dict[int | None, float]] = defaultdict(dict)
    for point in points:
        assert point.step not in found[point.key], point
        found[point.key][point.step] = point.value
    return found


@pytest.mark.long
def test_each_backend_has_numpys_statistics_over_the_points_that_it_has_of_the_sites(tmp_path: Path) -> None:
    flags = [flag for name in BACKENDS for flag in ("--backend", name)]
    uneven = ("--n_clients", "4", "--partition", "dirichlet", "--alpha", "0.3", "--num_rounds", str(ROUNDS))

    done = run_job(tmp_path, *flags, "--option", "wandb.mode=offline", *uneven, "--update_statistics", "--strict")

    assert done.status == 0, done.output
    job = JobInfo((done.result / ".trackhub" / "execution").read_text(), "cifar10_fedavg")
    run_dir = done.result / "server" / "simulate_job"
    for backend in BACKENDS:
        sites = [by_key(read_run(backend, run_dir, job, site, Side.SERVER).points) for site in SITES]
        federation = by_key(read_run(backend, run_dir, job, "federation", Side.SERVER).points)
        for key in KEYS:
            for name, statistic in STATISTICS.items():
                found = federation[f"{key}/{name}"]
                assert sorted(found, key=str) == list(range(ROUNDS)), (backend, key, name)
                for round_, value in found.items():
                    values = np.array([site[key][round_] for site in sites], dtype=np.float64)
                    # TensorBoard has 32-bit floats of both.
                    assert value == pytest.approx(float(statistic(values)), rel=1e-5, abs=1e-6), (backend, key, name)
        steps = {round_: [federation[f"fl/steps/{site}"][round_] for site in SITES] for round_ in range(ROUNDS)}
        for key in KEYS:
            for round_, value in federation[f"{key}/weighted_mean"].items():
                expected = np.average([site[key][round_] for site in sites], weights=steps[round_ or 0])
                assert value == pytest.approx(float(expected), rel=1e-5, abs=1e-6), (backend, key)
        assert set(federation["fl/sites_reported"].values()) == {4.0}
        for site in SITES:
            assert federation[f"fl/weight/{site}"] == federation[f"fl/steps/{site}"]
            assert set(federation[f"fl/update_norm/{site}"]) == set(range(ROUNDS))
            assert all(-1 <= cosine <= 1 for cosine in federation[f"fl/update_cosine/{site}"].values())
            assert len(federation[f"fl/update_cosine/{site}"]) == ROUNDS
            assert federation[f"fl/delivery/retries/{site}"]
        assert all(lag >= 0 for name in BACKENDS for lag in federation[f"fl/delivery/lag_seconds/{name}"].values())
        assert "fl/updates_left_out" not in federation
