# SPDX-License-Identifier: Apache-2.0
"""Stores artifacts through MLflow's own artifact repositories: the clients for a shared folder, S3 and other places.

Both stores call it for a run whose artifacts lie neither on the MLflow server nor beside the SQLite file.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trackhub.spi import TransientError
from trackhub_mlflow.store import root_cause

__all__ = ["put_by_client"]


def put_by_client(artifact_uri: str, path: str, content: bytes | Path) -> None:
    """Store an artifact with MLflow's own client for this kind of place. Blocks until that client returns.

    Args:
        artifact_uri: where the run's artifacts lie.
        path: the artifact's path below it.
        content: the bytes, or the file that holds them.

    Raises:
        TransientError: the client failed. Every failure counts as temporary, because these clients have no errors in
            common.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    folder, _, name = path.rpartition("/")
    try:
        repository = get_artifact_repository(artifact_uri)
        with _file_with_name(content, name) as file:
            repository.log_artifact(str(file), folder or None)
    except Exception as error:
        raise TransientError(
            f"artifact {path} cannot be stored below {artifact_uri}: {root_cause(error)}; see whether "
            "the receiver can write there"
        ) from error


@contextmanager
def _file_with_name(content: bytes | Path, name: str) -> Iterator[Path]:
    """Give a file of this name: MLflow's clients name an artifact after the file."""
    with tempfile.TemporaryDirectory(prefix="trackhub-mlflow-") as folder:
        file = Path(folder, name)
        if isinstance(content, Path):
            file.symlink_to(content.absolute())
        else:
            file.write_bytes(content)
        yield file
