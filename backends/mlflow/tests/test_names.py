# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.store.artifact.artifact_repo import verify_artifact_path
from mlflow.utils.uri import validate_path_is_safe
from mlflow.utils.validation import _validate_metric_name
from trackhub_mlflow.naming import artifact_path, component, entity_name, file_part, tag_name, versioned_path

# What the core lets through, weighted towards what makes a path.
KEYS = st.text(st.sampled_from("/.: -_x0259FEaAü"), min_size=1, max_size=40) | st.text(
    st.characters(categories=("L", "N")), min_size=1, max_size=300
)
_ESCAPE = re.compile(r"_x([0-9A-F]{4,6})_")


@given(KEYS)
def test_mlflow_accepts_every_name(key: str) -> None:
    name = entity_name(key)

    _validate_metric_name(name)
    assert len(name) <= 250


@given(KEYS)
def test_mlflow_accepts_every_artifact_path(key: str) -> None:
    for path in (artifact_path(key), file_part(key)):
        verify_artifact_path(path)
        assert validate_path_is_safe(path) == path
        assert all(0 < len(part.encode()) < 200 for part in path.split("/"))


@given(KEYS, KEYS)
@pytest.mark.parametrize("spell", [entity_name, tag_name, file_part, artifact_path])
def test_two_keys_never_get_one_name(spell: Callable[[str], str], one: str, other: str) -> None:
    # The core writes what looks like an escape in a key so that it does not; here it is left out.
    one, other = _ESCAPE.sub("-", one), _ESCAPE.sub("-", other)

    assert (spell(one) == spell(other)) == (one == other)


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("train/loss", "train/loss"),
        ("a b:c.d-e", "a b:c.d-e"),
        ("Zürich", "Zürich"),
        ("a//b", "a/_x002F_b"),
        ("/a", "_x002F_a"),
        ("a/", "a_x002F_"),
        ("/", "_x002F_"),
        ("./a", "_x002E_/a"),
        ("a/../b", "a/_x002E_./b"),
        ("../up", "_x002E_./up"),
        ("..up", "_x002E_.up"),
        ("a/..up", "a/..up"),
        (".", "_x002E_"),
        ("...", "_x002E_.."),
    ],
)
def test_only_what_makes_a_path_is_escaped(key: str, name: str) -> None:
    assert entity_name(key) == name


def test_a_long_name_is_cut_and_ends_in_a_hash() -> None:
    one, other = entity_name("k" * 249 + "//a"), entity_name("k" * 249 + "//b")

    assert one != other
    assert len(one) == len(other) == 250
    assert entity_name("k" * 250) == "k" * 250


@pytest.mark.parametrize("key", ["job", "site", "side", "mlflow.parentRunId", "mlflow.runName", "trackhub.run_id"])
def test_a_logged_tag_cannot_pass_for_one_that_says_what_the_run_is(key: str) -> None:
    assert tag_name(key) == f"_x{ord(key[0]):04X}_{key[1:]}"


def test_the_description_may_be_logged_as_a_tag() -> None:
    assert tag_name("mlflow.note.content") == "mlflow.note.content"


@pytest.mark.parametrize("key", ["images/x.png", "Images", "text/a", "params/a", ".artifact.uploading.x"])
def test_artifacts_stay_out_of_the_folders_and_names_that_have_a_meaning(key: str) -> None:
    assert artifact_path(key).startswith("_x")


def test_a_piece_of_a_nested_key_is_escaped_as_the_core_escapes_keys() -> None:
    assert component("a,b") == "a_x002C_b"
    assert component("a_x002C_b") == "a_x005F_x002C_b"


def test_a_version_stands_before_the_extension() -> None:
    assert versioned_path("model/best.pt", "step-3") == "model/best.step-3.pt"
    assert versioned_path("v1.0/README", "p7") == "v1.0/README.p7"
    assert versioned_path(".hidden", "p7") == ".hidden.p7"
