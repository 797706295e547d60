# SPDX-License-Identifier: Apache-2.0
"""A store is the file that it should be, whatever characters are in its path."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from trackhub_mlflow.sqlite_store import sqlite_uri

import trackhub


@pytest.mark.parametrize("job", ["my job", "100%25", "Läufe?b=c"])
def test_a_job_of_any_name_has_its_points_in_its_own_folder(tmp_path: Path, job: str) -> None:
    with trackhub.local(["mlflow"], folder=tmp_path, job=job, quiet=True) as writer:
        writer.log({"loss": 0.5}, 0)

    assert points(writer.folder / "mlflow" / "mlflow.db") == [("loss", 0.5)]
    assert list(tmp_path.iterdir()) == [writer.folder]


@pytest.mark.parametrize("name", ["a%20b", "ru?ns"])
def test_a_folder_is_never_taken_for_another_one(tmp_path: Path, name: str) -> None:
    (tmp_path / "a b").mkdir()
    with trackhub.local(["mlflow"], folder=tmp_path / name, job="j", quiet=True) as writer:
        writer.log({"loss": 0.5}, 0)

    assert points(tmp_path / name / "j" / "mlflow" / "mlflow.db") == [("loss", 0.5)]
    assert {path.name for path in tmp_path.iterdir()} == {"a b", name}
    assert not list((tmp_path / "a b").iterdir())


def test_mlflow_opens_the_file_that_a_uri_names(tmp_path: Path) -> None:
    file = tmp_path / "100%25 of a?b.db"

    SqlAlchemyStore(sqlite_uri(file), "mlflow-artifacts:/").engine.dispose()

    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def points(database: Path) -> list[tuple[str, float]]:
    with closing(sqlite3.connect(database)) as connection:
        return connection.execute("SELECT key, value FROM metrics WHERE key NOT LIKE 'fl/%'").fetchall()
