# SPDX-License-Identifier: Apache-2.0
"""The receiver's store for the bytes of images and artifacts. It joins the pieces that a site sends, and checks them.

`Receiver` calls `BlobStore`, which keeps one file per blob beside the journal. `trackhub.delivery.file_sender` sends
the pieces.
"""

from __future__ import annotations

import contextlib
import glob
import hashlib
import mimetypes
import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple
from urllib.parse import quote

from trackhub.delivery.wire import Accepted, Busy, Chunk, Refused, Reply
from trackhub.open_without_links import make_private_folder, open_plain
from trackhub.records import Blob

__all__ = ["BlobStore", "Stored"]

_NAME = re.compile(r"[0-9a-f]{32}-[0-9]{1,16}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

_COPY_BYTES = 1 << 20
_MAX_UNNAMED = 4096
"""Most blobs of a site that no record refers to yet. A sender sends a few at a time, and then their records."""
_MANY_FILES = "the receiver has thousands of files of this site that no record refers to; send their records first"

_UNNAMED = ".new"
"""The end of a whole blob's file name until a record refers to the blob. It marks the files that a killed receiver
left."""

_MAX_PARTS = 16
"""Most incomplete blobs of a site. A sender sends one blob after another, and a crash may leave one incomplete."""


class Stored(NamedTuple):
    """How much of a blob is there.

    Attributes:
        next: the offset that is expected next. For a complete blob, this is its size.
        is_longer: True if the piece added bytes to the blob. A piece that comes again adds none.
    """

    next: int
    is_longer: bool


class BlobStore:
    """Keeps the receiver's blobs, in one folder per site. Thread-safe."""

    def __init__(self, folder: Path, *, sync: bool = False) -> None:
        """Use this folder. The first blob creates it.

        Args:
            folder: where the sites' folders are.
            sync: write each whole blob through to the disk, so that it survives a loss of power.
        """
        self._folder = folder
        self._sync = sync
        self._parts: dict[str, dict[str, None]] = {}  # site -> names of files, the oldest first
        self._unnamed: dict[str, set[str]] = {}  # site -> names of blobs
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def folder(self, site: str) -> Path:
        """Return the folder of a site's blobs. No two sites share one."""
        return self._folder / quote(site, safe=" ").replace(".", "%2E")

    def has(self, site: str, name: str) -> bool:
        """Return whether this blob is here and complete. False for a name that no blob can have."""
        return self.path(site, name) is not None

    def path(self, site: str, name: str) -> Path | None:
        """Return the file of this blob; None if the blob is missing or incomplete."""
        if _NAME.fullmatch(name) is None:
            return None
        paths = (self.folder(site) / name, self.folder(site) / f"{name}{_UNNAMED}")
        return next((path for path in paths if _is_plain(path)), None)

    def missing(self, site: str, names: Iterable[str]) -> str | None:
        """Return the name of the first incomplete or missing blob; None if all blobs are complete."""
        return next((name for name in names if not self.has(site, name)), None)

    def note_named(self, site: str, names: Iterable[str]) -> None:
        """Give these blobs' files their final names. Call it before the records that refer to the blobs are stored.

        Raises:
            OSError: a file cannot be renamed.
        """
        folder = self.folder(site)
        unnamed = self._unnamed_of(site).intersection(names)
        for name in unnamed:
            with contextlib.suppress(FileNotFoundError):  # another thread has just named it
                (folder / f"{name}{_UNNAMED}").rename(folder / name)
        if unnamed and self._sync:
            _sync(folder)
        self._unnamed_of(site).difference_update(unnamed)

    def delete_unused(self) -> None:
        """Delete the incomplete blobs, and the blobs that no record refers to. Call it when no more pieces come.

        A site keeps the file until its record is stored, so a replay can still send it. Never raises.
        """
        for end in (".part", _UNNAMED):
            for path in glob.glob(f"*/*{end}", root_dir=self._folder, include_hidden=True):
                with contextlib.suppress(OSError):
                    (self._folder / path).unlink()
        self._unnamed.clear()

    def answer(self, site: str, chunk: Chunk) -> tuple[Reply, bool]:
        """Store a piece as ``add`` does. Return the receiver's reply to it, and whether it added bytes to its blob.

        Raises:
            OSError: the piece cannot be written.
        """
        if len(self._unnamed_of(site)) >= _MAX_UNNAMED:
            return Busy(_MANY_FILES), False
        stored = self.add(site, chunk)
        if stored is None:
            refused = Refused(
                "blob_damaged",
                f"the name, size or digest of blob {chunk.name[:80]!r} is not valid, or its bytes do not match its "
                "digest: the file was damaged at the site",
            )
            return refused, False
        return Accepted(stored.next), stored.is_longer

    def add(self, site: str, chunk: Chunk) -> Stored | None:
        """Store a piece, and return how much of its blob is there.

        A piece at another offset than the expected one is not stored. The sender goes on from the offset returned.

        Returns:
            How much is there. None if the blob can never be accepted: its bytes do not match its digest, or no blob can
            have its name, digest or size.

        Raises:
            OSError: the piece cannot be written.
        """
        if not (_NAME.fullmatch(chunk.name) and _DIGEST.fullmatch(chunk.sha256)):
            return None
        if chunk.offset + len(chunk.data) > chunk.size:
            return None
        # A site sends a piece again when the reply is late. Another thread may then still be storing the first copy.
        with self._locks[site]:
            return self._add(site, chunk)

    def keep(self, site: str, name: str, source: BinaryIO, filename: str) -> Blob:
        """Copy a file of this machine into the store, completely or not at all. Return the blob that refers to it.

        Args:
            site: whose blob it is.
            name: the blob's name, which no other blob has.
            source: the file, open for reading.
            filename: the file's name, from which its media type is guessed.

        Raises:
            OSError: the file cannot be read, or the copy cannot be written.
        """
        folder = self.folder(site)
        make_private_folder(folder)
        target, partial = folder / name, folder / f"{name}.part"
        digest, size = hashlib.sha256(), 0
        try:
            with open(partial, "wb", opener=open_plain) as file:
                while data := source.read(_COPY_BYTES):
                    digest.update(data)
                    size += len(data)
                    file.write(data)
            if self._sync:
                _sync(partial)
            partial.replace(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        if self._sync:
            for synced in (folder, self._folder, self._folder.parent):
                _sync(synced)
        media_type = mimetypes.guess_type(filename)[0] or "application/octet-stream"
        return Blob(name, size, digest.hexdigest(), media_type)

    def _unnamed_of(self, site: str) -> set[str]:
        """Return the whole blobs of this site that no record refers to. An earlier receiver may have left some."""
        if (names := self._unnamed.get(site)) is None:
            left = {path.name.removesuffix(_UNNAMED) for path in self.folder(site).glob(f"*{_UNNAMED}")}
            names = self._unnamed.setdefault(site, left)
        return names

    def _make_room_for_part(self, site: str, folder: Path, name: str) -> None:
        """Note an incomplete blob of this site. If there are too many, delete the oldest one."""
        parts = self._parts.get(site)
        if parts is None:  # an earlier receiver may have left some
            parts = self._parts[site] = dict.fromkeys(sorted(path.name for path in folder.glob("*.part")))
        parts[name] = None
        while len(parts) > _MAX_PARTS:
            oldest = next(iter(parts))
            del parts[oldest]
            (folder / oldest).unlink(missing_ok=True)

    def _add(self, site: str, chunk: Chunk) -> Stored | None:
        folder = self.folder(site)
        target, partial = folder / f"{chunk.name}{_UNNAMED}", folder / f"{chunk.name}.part"
        if self.has(site, chunk.name):
            return Stored(chunk.size, is_longer=False)
        make_private_folder(folder)
        self._make_room_for_part(site, folder, partial.name)
        with open(partial, "ab", buffering=0, opener=open_plain) as file:
            reached = file.tell()
            expected = reached == chunk.offset
            if expected:
                reached += file.write(chunk.data)
        stored = Stored(reached, is_longer=expected and len(chunk.data) > 0)
        if reached < chunk.size:
            return stored
        # A piece at an unexpected offset gets here, too. An earlier receiver may have stored the last piece, and died
        # before it renamed the file.
        with open(partial, "rb", opener=open_plain) as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if reached != chunk.size or digest != chunk.sha256:
            partial.unlink()
            self._parts[site].pop(partial.name)
            return None if expected else Stored(0, is_longer=False)
        if self._sync:
            _sync(partial)
        partial.replace(target)
        self._unnamed_of(site).add(chunk.name)
        self._parts[site].pop(partial.name)
        if self._sync:
            # Each of these may be new. A power cut loses a new folder if its parent is not synced.
            for path in (folder, self._folder, self._folder.parent):
                _sync(path)
        return stored


def _is_plain(path: Path) -> bool:
    # `Path.is_file` would raise for a folder that this user may not search.
    return os.path.isfile(path) and not os.path.islink(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
