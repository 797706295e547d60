# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.spi import path_component

_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=400) | st.text("./%~a\0", max_size=8)


@pytest.mark.parametrize("name", ["site-1", "a_b.c~d", "7c9e6679-7425-40de-944b-e07fc1f90ae7", "x" * 150])
def test_a_plain_name_stays_as_it_is_in_a_path(name: str) -> None:
    assert path_component(name) == name


@given(_NAMES)
def test_no_name_leads_elsewhere(name: str) -> None:
    component = path_component(name)

    assert component
    assert len(component.encode()) <= 150
    assert not component.startswith(".")
    assert not {"/", "\\", "\0", ":"} & set(component)


@given(_NAMES, _NAMES)
def test_two_names_never_become_one(one: str, other: str) -> None:
    assert (path_component(one) == path_component(other)) == (one == other)
