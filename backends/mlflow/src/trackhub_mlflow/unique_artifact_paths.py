# SPDX-License-Identifier: Apache-2.0
"""Where each logged artifact lies among a run's artifacts, so that no two of them take the same place.

`MLflowRun` has one `ArtifactPaths`, which asks the store for what lies there from an earlier process.
"""

from __future__ import annotations

from collections.abc import Iterator

from trackhub.spi import Artifact, Blob, Entry
from trackhub_mlflow.naming import artifact_path, versioned_path
from trackhub_mlflow.store import Store, StoredRun

__all__ = ["ArtifactPaths"]


class ArtifactPaths:
    """Gives each artifact record of one run its path.

    The path is the artifact's key, with the step before the extension unless the step is 0. The record's position is
    added if that path is taken. A path is taken if it holds another content, if another path differs only in case, or
    if there is a file where it needs a folder. A record that is handed over again gets the same path.
    """

    def __init__(self, store: Store, run: StoredRun, *, is_new: bool) -> None:
        """Give paths to the artifacts of a run.

        Args:
            store: where the run is.
            run: which run.
            is_new: True if the run has no record yet. Otherwise the store is asked which artifacts it has.
        """
        self._store = store
        self._run = run
        self._is_new = is_new
        self._files: dict[str, tuple[str, str]] = {}
        self._folders: set[str] = set()
        self._stored: dict[str, dict[str, int]] = {}

    def path(self, entry: Entry, artifact: Artifact) -> str:
        """Return the path for this record. Blocks on the store if the run was continued.

        Raises:
            TransientError: the store cannot say what lies there.
        """
        plain = artifact_path(artifact.key)
        if entry.step:
            plain = versioned_path(plain, f"step-{entry.step}")
        own = versioned_path(plain, f"p{entry.position}")
        path = next((p for p in (plain, own) if self._is_mine(p, artifact.blob)), own.replace("/", "~"))
        self._files[path.casefold()] = path, artifact.blob.sha256
        self._folders.update(_folders(path.casefold()))
        return path

    def _is_mine(self, path: str, blob: Blob) -> bool:
        """Return whether the path is free, or holds the content of this record."""
        folded = path.casefold()
        if folded in self._files:
            return self._files[folded] == (path, blob.sha256)
        if folded in self._folders or any(folder in self._files for folder in _folders(folded)):
            return False
        if self._is_new:
            return True
        if any(size >= 0 for folder in _folders(path) for size in self._sizes_of(folder).values()):
            return False
        there = self._sizes_of(path)
        if path not in there:
            return not there
        return there[path] == blob.size and self._store.artifact_sha256(self._run, path) == blob.sha256

    def _sizes_of(self, path: str) -> dict[str, int]:
        """Return the paths that equal this one except for upper and lower case, with the sizes of their files.

        These are the paths that the store had when the run was opened.
        """
        folder, slash, name = path.rpartition("/")
        if folder not in self._stored:
            self._stored[folder] = self._store.artifact_sizes(self._run, folder)
        found = self._stored[folder].items()
        return {f"{folder}{slash}{there}": size for there, size in found if there.casefold() == name.casefold()}


def _folders(path: str) -> Iterator[str]:
    parts = path.split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])
