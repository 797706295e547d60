# SPDX-License-Identifier: Apache-2.0
"""Artifacts that lie neither on the server nor beside the SQLite file: a shared folder, S3, and so on."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trackhub.spi import TransientError

__all__ = ["put_by_client", "root_cause"]


def put_by_client(artifact_uri: str, path: str, content: bytes | Path) -> None:
    """Store an artifact by MLflow's own client for this kind of place: a folder, S3, and so on.

    Raises:
        TransientError: it did not work, whatever the reason: the clients have no errors in common.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    folder, _, name = path.rpartition("/")
    try:
        repository = get_artifact_repository(artifact_uri)
        with _named_file(content, name) as file:
            repository.log_artifact(str(file), folder or None)
    except Exception as error:
        raise TransientError(f"artifact {path} cannot be stored below {artifact_uri}: {root_cause(error)}") from error


@contextmanager
def _named_file(content: bytes | Path, name: str) -> Iterator[Path]:
    """Give a file of this name, which is how MLflow's client names an artifact."""
    with tempfile.TemporaryDirectory(prefix="trackhub-mlflow-") as folder:
        file = Path(folder, name)
        if isinstance(content, Path):
            file.symlink_to(content.absolute())
        else:
            file.write_bytes(content)
        yield file


def root_cause(error: BaseException) -> str:
    """Return what lies at the bottom of an error: requests and urllib3 wrap it several times."""
    seen: list[BaseException] = [error]
    while len(seen) < 10:
        inner = seen[-1].__cause__ or seen[-1].__context__ or getattr(seen[-1], "reason", None)
        if not isinstance(inner, BaseException) or inner in seen:
            break
        seen.append(inner)
    return f"{type(seen[-1]).__name__}: {seen[-1]}"[:300]
