# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trackhub.errors import ConfigError
from trackhub.job_and_run_info import JobInfo
from trackhub.spi import path_component

_NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=400) | st.text("./%~a\0", max_size=8)


@pytest.mark.parametrize("name", ["site-1", "a_b.c~d", "7c9e6679-7425-40de-944b-e07fc1f90ae7", "lr=0.1", "x" * 150])
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


@pytest.mark.parametrize(
    ("info", "problem"),
    [
        ({"id": "a\nb"}, r"id: 'a\\nb' contains U\+000A"),
        ({"id": ""}, "id: '' is empty"),
        ({"id": "j", "name": "n" * 2000}, "name: .* has 2000 characters"),
        ({"id": "j", "tags": ("a", "\x00")}, r"tags: .* contains U\+0000"),
        ({"id": "j", "tags": (1,)}, "tags: expected a text, got 1"),
        ({"id": "j", "notes": "a\0"}, r"notes: there is a U\+0000"),
        ({"id": "j", "notes": "a" * 100_001}, "notes: 100001 characters"),
    ],
    ids=["id", "empty id", "long name", "tag", "no text", "notes", "long notes"],
)
def test_what_a_job_says_of_itself_can_be_stored_everywhere(info: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        JobInfo(**info)


def test_notes_may_have_lines_and_tabs() -> None:
    assert JobInfo("j", notes="# why\r\n\n\ta list\n").name == "j"
