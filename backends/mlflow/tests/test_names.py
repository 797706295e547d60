# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.store.artifact.artifact_repo import verify_artifact_path
from mlflow.utils.uri import validate_path_is_safe
from mlflow.utils.validation import _validate_metric_name, _validate_tag_name
from trackhub_mlflow.naming import (
    KEY_RULE,
    TAG_RULE,
    artifact_path,
    cut_name,
    escape_name,
    file_part,
    job_tag_name,
    logged_tag_name,
    versioned_path,
)

from trackhub.delivery.lane.fit_keys_to_backend import key_fitter

# Weighted towards what makes a path, an escape, or a name of this backend's own.
TEXTS = st.text(st.sampled_from("/.: -_x0259FEaAüsitejob"), min_size=1, max_size=40) | st.text(
    st.characters(categories=("L", "N", "P", "S")), min_size=1, max_size=300
)
fit_key, fit_tag = key_fitter(KEY_RULE), key_fitter(TAG_RULE)


def entity_name(key: str) -> str:
    return fit_key(key)


def tag_name(key: str) -> str:
    return logged_tag_name(fit_tag(key))


def name_of_file_part(key: str) -> str:
    return file_part(fit_key(key))


def name_of_artifact(key: str) -> str:
    return artifact_path(fit_key(key))


@given(TEXTS)
def test_mlflow_accepts_every_name(key: str) -> None:
    names = [entity_name(key), tag_name(key), job_tag_name(key), cut_name(f"opt.{escape_name(key)}")]

    for name in names:
        _validate_metric_name(name)
        _validate_tag_name(name)
        assert len(name) <= 250
        assert not name.endswith(" ")


@given(TEXTS)
def test_mlflow_accepts_every_artifact_path(key: str) -> None:
    for path in (name_of_artifact(key), name_of_file_part(key), file_part(cut_name(f"opt.{escape_name(key)}"))):
        verify_artifact_path(path)
        assert validate_path_is_safe(path) == path
        assert all(0 < len(part.encode()) < 200 for part in path.split("/"))


@given(TEXTS, TEXTS)
@pytest.mark.parametrize(
    "spell", [entity_name, tag_name, job_tag_name, escape_name, name_of_file_part, name_of_artifact]
)
def test_two_keys_never_get_one_name(spell: Callable[[str], str], one: str, other: str) -> None:
    assert (spell(one) == spell(other)) == (one == other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("--lr", "lr"), ("-a-", "a"), ("a//b", "a/b"), ("./a", "a"), ("A", "a"), ("a ", "a"), ("a/", "a"), ("a~b", "a/b")],
)
@pytest.mark.parametrize("spell", [entity_name, tag_name, name_of_file_part, name_of_artifact])
def test_keys_that_other_software_merges_stay_two(spell: Callable[[str], str], one: str, other: str) -> None:
    assert spell(one) != spell(other)
    assert spell(other) in (other, "a~b")


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
        ("a ", "a_x0020_"),
        (" a", "_x0020_a"),
    ],
)
def test_only_what_makes_a_path_or_stands_at_an_end_is_escaped(key: str, name: str) -> None:
    assert entity_name(key) == name


def test_a_long_name_is_cut_and_ends_in_a_hash() -> None:
    one, other = entity_name("k" * 249 + "//a"), entity_name("k" * 249 + "//b")

    assert one != other
    assert len(one) == len(other) == 250
    assert entity_name("k" * 250) == "k" * 250
    assert cut_name("k" * 250) == "k" * 250
    assert len(cut_name("k" * 251)) == 250


OWN_TAGS = ["job", "job_name", "site", "side", "mlflow.parentRunId", "mlflow.runName", "trackhub.run_id"]


@pytest.mark.parametrize("key", OWN_TAGS)
def test_a_logged_tag_cannot_pass_for_one_that_says_what_the_run_is(key: str) -> None:
    assert tag_name(key) == job_tag_name(key) == f"_x{ord(key[0]):04X}_{key[1:]}"


@pytest.mark.parametrize("key", ["Site", "JOB", "síte", "\u017fide", "MLflow.parentRunId", "Trackhub.run_id"])
def test_nor_can_one_that_a_database_takes_for_the_same(key: str) -> None:
    """MySQL's usual collations ignore case and accents."""
    assert tag_name(key) == job_tag_name(key) == f"_x{ord(key[0]):04X}_{key[1:]}"


def test_the_description_may_be_logged_as_a_tag() -> None:
    assert tag_name("mlflow.note.content") == "mlflow.note.content"
    assert job_tag_name("mlflow.note.content") == "mlflow.note.content"
    assert tag_name("_x006D_lflow.note.content") != "mlflow.note.content"


@pytest.mark.parametrize("key", ["images/x.png", "Images", "text/a", "params/a", ".artifact.uploading.x"])
def test_artifacts_stay_out_of_the_folders_and_names_that_have_a_meaning(key: str) -> None:
    assert name_of_artifact(key).startswith("_x")


def test_a_part_of_a_nested_key_is_escaped_as_the_core_escapes_keys() -> None:
    assert escape_name("a,b") == "a_x002C_b"
    assert escape_name("a_x002C_b") == "a_x005F_x002C_b"
    assert escape_name("a/b") == "a/b"
    assert escape_name("../b/") == "_x002E_._x002F_b_x002F_"
    assert escape_name("") == ""


def test_a_version_stands_before_the_extension() -> None:
    assert versioned_path("model/best.pt", "step-3") == "model/best.step-3.pt"
    assert versioned_path("v1.0/README", "p7") == "v1.0/README.p7"
    assert versioned_path(".hidden", "p7") == ".hidden.p7"
