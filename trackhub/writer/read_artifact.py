# SPDX-License-Identifier: Apache-2.0
"""Reads the file that training code logs as an artifact. `Writer.log_artifact` calls it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from trackhub.errors import RecordError
from trackhub.open_without_links import open_plain
from trackhub.records import MAX_NAME_CHARS, Artifact, Blob
from trackhub.spool.writing import NewBlob
from trackhub.writer.plain_values import plain_text, shown
from trackhub.writer.values import read_key

__all__ = ["read_artifact"]

_COPY_BYTES = 1 << 20


def read_artifact(path: Any, name: Any, artifact_type: Any, folder: Any = None) -> NewBlob:
    """Check the file and return how to copy it into the spool.

    Args:
        path: the file. A symbolic link is followed if it leads to a file in or below its own folder. Any other link is
            refused.
        name: its name in the run; None takes its file name.
        artifact_type: what it is, such as ``model``.
        folder: the folder in the run to put it into; None or empty for none.

    Raises:
        RecordError: it is not a file that can be read, or the name or type is not accepted.
    """
    import hashlib  # imported late: with OpenSSL it takes a tenth of the time of `import trackhub`

    if not isinstance(artifact_type, str):
        raise RecordError(f"log_artifact: type {shown(artifact_type)}; expected a str such as 'model'")
    source, real, size = _check_readable(path)
    own_name = source.name if name is None else name
    key = read_key(f"{folder}/{own_name}" if folder else own_name)
    filename = _short_text("file name of artifact", key, source.name)
    artifact_type = _short_text("type of artifact", key, artifact_type)
    digest = hashlib.sha256()
    copied = 0

    def write(target: Path) -> None:
        # Size and digest are those of the copy: the source may be changing.
        nonlocal copied
        with open(real, "rb", opener=open_plain) as file, open(target, "wb", opener=open_plain) as out:
            while data := file.read(_COPY_BYTES):
                digest.update(data)
                copied += out.write(data)

    def payload(blob: str) -> Artifact:
        reference = Blob(blob, copied, digest.hexdigest(), "application/octet-stream")
        return Artifact(key, reference, filename, artifact_type)

    return NewBlob(key, size, write, payload)


def _short_text(what: str, key: str, text: str) -> str:
    if len(text) > MAX_NAME_CHARS:  # no reader could decode the record
        raise RecordError(f"{what} {key!r} has {len(text)} characters; expected at most {MAX_NAME_CHARS}")
    return plain_text(what, key, text)


def _check_readable(path: Any) -> tuple[Path, Path, int]:
    """Return the path, the file that it leads to, and that file's size in bytes."""
    try:
        source = Path(path)
        if source.is_dir():
            raise IsADirectoryError("it is a folder; pack it first, for example with shutil.make_archive")
        if not source.is_file():
            raise FileNotFoundError("it does not exist, or is not an ordinary file")
        real = source.resolve()
        # "last.ckpt" is often a link to a file beside it. A link to another folder may lead to a file that nobody meant
        # to log.
        if source.is_symlink() and not real.is_relative_to(source.parent.resolve()):
            raise PermissionError("it is a symbolic link that leads out of its folder; log the file itself")
        with open(real, "rb", opener=open_plain) as file:
            return source, real, os.fstat(file.fileno()).st_size
    except (OSError, TypeError, ValueError) as e:
        raise RecordError(f"log_artifact: cannot read {shown(path)}: {e}") from e
