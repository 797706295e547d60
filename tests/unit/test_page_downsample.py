# SPDX-License-Identifier: Apache-2.0
"""A curve that is reduced to a few points keeps its lowest and highest values, and stays in order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trackhub.page.downsample import Series, keep_extremes

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=32)


def series_of(values: np.ndarray) -> Series:
    series = Series()
    for step, value in enumerate(values.tolist()):
        series.add(step, step // 1000, 1000.0 + step, value)
    return series


@settings(max_examples=60, deadline=None)
@given(values=st.lists(FINITE, min_size=1, max_size=400), most=st.integers(8, 60))
def test_the_kept_values_have_the_extremes_and_both_ends(values: list[float], most: int) -> None:
    found = np.array(values)

    kept = keep_extremes(found, most)

    assert len(kept) <= most
    assert (np.diff(kept) > 0).all()
    assert {0, len(values) - 1} <= set(kept.tolist())
    assert (found[kept].min(), found[kept].max()) == (found.min(), found.max())


@pytest.mark.parametrize("count", [1, 7, 4096, 4097, 100_000])
def test_a_long_series_keeps_single_peaks_with_their_steps_and_times(count: int) -> None:
    values = np.random.default_rng(count).standard_normal(count)
    values[count // 3], values[count // 2] = 99.0, -99.0

    curve = series_of(values).curve(200)

    assert len(curve.value) <= 200
    assert (np.diff(curve.step) > 0).all()
    assert (curve.step[0], curve.step[-1]) == (0, count - 1)
    assert curve.step[curve.value.argmin()] == values.argmin()
    assert curve.step[curve.value.argmax()] == values.argmax()
    assert np.array_equal(curve.value, values[curve.step.astype(int)])
    assert np.array_equal(curve.time, 1000.0 + curve.step)


def test_every_stretch_of_a_long_series_has_its_extremes() -> None:
    """Old points are not thinned more than new ones: each twentieth has points, and reaches as far as the values."""
    values = np.random.default_rng(1).standard_normal(300_000).cumsum()

    curve = series_of(values).curve(2000)

    for part in np.array_split(np.arange(len(values)), 20):
        inside = (curve.step >= part[0]) & (curve.step <= part[-1])
        around = curve.value[(curve.step >= part[0] - 500) & (curve.step <= part[-1] + 500)]  # a stretch may overlap
        assert 50 <= inside.sum() <= 150
        assert around.max() >= values[part].max()
        assert around.min() <= values[part].min()


def test_a_series_takes_the_same_memory_however_long_it_is() -> None:
    series = series_of(np.arange(50_000.0))
    size = series._buckets.nbytes
    for step in range(50_000, 200_000):
        series.add(step, None, 0.0, float(step))

    assert series._buckets.nbytes <= 2 * 2048 * 2 * 4 * 8
    assert series._buckets.nbytes <= 2 * size
    assert len(series._pending) <= 4096 * 4


def test_what_is_not_finite_is_counted_and_not_drawn() -> None:
    series = Series()
    for step, value in enumerate([math.nan, 1.0, math.inf, -math.inf, 3.0, math.nan]):
        series.add(step, None, 0.0, value)

    assert series.curve(8).value.tolist() == [1.0, 3.0]
    assert (series.count, series.nonfinite, series.low, series.high) == (6, 4, 1.0, 3.0)
    assert math.isnan(series.first)
    assert math.isnan(series.last)


def test_the_last_value_of_each_round_is_kept_exactly() -> None:
    values = np.random.default_rng(2).standard_normal(20_500)

    found = series_of(values).by_round

    assert found == {r: values[min(r * 1000 + 999, 20_499)] for r in range(21)}
