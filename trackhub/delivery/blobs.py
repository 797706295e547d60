# SPDX-License-Identifier: Apache-2.0
"""The bytes of images and artifacts at the receiver: received in pieces, checked, kept beside the journal."""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections import defaultdict
from pathlib import Path
from urllib.parse import quote

from trackhub.delivery.wire import Chunk

__all__ = ["BlobStore"]

_NAME = re.compile(r"[0-9a-f]{32}-\d+")


class BlobStore:
    """One folder of blobs per site. Thread-safe."""

    def __init__(self, folder: Path, *, sync: bool = False) -> None:
        """Use this folder; it is created with the first blob.

        Args:
            sync: a blob that is here whole survives the machine's loss of power.
        """
        self._folder = folder
        self._sync = sync
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def folder(self, site: str) -> Path:
        """Return the folder of a site's blobs; every site name has one of its own."""
        return self._folder / quote(site, safe=" ").replace(".", "%2E")

    def has(self, site: str, name: str) -> bool:
        """Return whether this blob is here whole. False for what is no blob name."""
        return _NAME.fullmatch(name) is not None and (self.folder(site) / name).exists()

    def add(self, site: str, chunk: Chunk) -> int | None:
        """Store a piece and return the offset that is expected next; the blob's size when it is whole.

        A piece at another offset is not stored; the sender goes on from the offset returned.

        Returns:
            None if the whole is not what its digest says, or the name is impossible: it can never be accepted.

        Raises:
            OSError: it cannot be written.
        """
        if _NAME.fullmatch(chunk.name) is None:
            return None
        # A site sends a piece again when the reply is late; the first one may still be at work then.
        with self._locks[site]:
            return self._add(site, chunk)

    def _add(self, site: str, chunk: Chunk) -> int | None:
        folder = self.folder(site)
        target, partial = folder / chunk.name, folder / f"{chunk.name}.part"
        if target.exists():
            return chunk.size
        folder.mkdir(parents=True, exist_ok=True)
        with partial.open("ab", buffering=0) as file:
            reached = file.tell()
            expected = reached == chunk.offset
            if expected:
                reached += file.write(chunk.data)
        if reached < chunk.size:
            return reached
        # Also with an unexpected piece: a receiver may have died when it had the last one, before it gave it its name.
        with partial.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if reached != chunk.size or digest != chunk.sha256:
            partial.unlink()
            return None if expected else 0
        if self._sync:
            _sync(partial)
        partial.replace(target)
        if self._sync:
            for path in (folder, self._folder, self._folder.parent):  # those that may be new as well
                _sync(path)
        return reached


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
