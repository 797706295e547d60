# SPDX-License-Identifier: Apache-2.0
"""What one log call becomes: a record with one payload.

The writer makes records, and a backend receives their payloads. `trackhub.framing` encodes them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import msgspec

__all__ = [
    "MAX_KEY_CHARS",
    "MAX_STEP",
    "Artifact",
    "Blob",
    "Gap",
    "Histogram",
    "Image",
    "Kind",
    "Metrics",
    "Params",
    "Payload",
    "Record",
    "Table",
    "Tags",
    "Text",
]

MAX_KEY_CHARS = 1000
"""Longest key, in characters. Longer than any backend's own limit; backends shorten, the writer refuses."""

MAX_STEP = 2**63 - 1
"""Largest step and round: what TensorBoard's and MLflow's int64 fields hold."""


class Kind(IntEnum):
    """What a record holds. The numbers are part of the format and never change."""

    METRICS = 1
    PARAMS = 2
    TAGS = 3
    TEXT = 4
    IMAGE = 5
    HISTOGRAM = 6
    TABLE = 7
    ARTIFACT = 8
    GAP = 9


class Blob(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A reference to bytes that travel beside the record, in chunks, and lie in a file of their own.

    Attributes:
        name: file name, unique within the site: ``<stream>-<seq>``.
        size: length in bytes.
        sha256: hex digest of the content.
        media_type: MIME type, such as ``image/png``.
    """

    name: str
    size: int
    sha256: str
    media_type: str


class Metrics(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=1):
    """Scalars logged together: key to float64. NaN and infinities are kept."""

    values: dict[str, float]


class Params(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=2):
    """Hyperparameters: key to None, bool, int, float, str, or lists and dicts of these."""

    values: dict[str, Any]


class Tags(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=3):
    """Labels of the run: key to string. The last value of a key holds."""

    values: dict[str, str]


class Text(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=4):
    """A piece of text, read as Markdown by backends that render it."""

    key: str
    text: str


class Image(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=5):
    """One encoded image; the blob holds the PNG or JPEG file's bytes.

    Attributes:
        width, height: in pixels.
        caption: a line of text below it; may be empty.
    """

    key: str
    blob: Blob
    width: int
    height: int
    caption: str = ""


class Histogram(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=6):
    """Counts in bins.

    Attributes:
        edges: n + 1 finite bin limits, rising; bin i is ``[edges[i], edges[i + 1])``, the last one closed.
        counts: n counts, each >= 0.
    """

    key: str
    edges: list[float]
    counts: list[float]


class Table(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=7):
    """Rows of cells; a cell is None, bool, int, float or str, and every row has one cell per column."""

    key: str
    columns: list[str]
    rows: list[list[Any]]


class Artifact(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=8):
    """A file.

    Attributes:
        key: the artifact's name within the run; may contain ``/``.
        filename: the last part of the path that was logged.
        artifact_type: what it is, in W&B's sense: ``file``, ``model``, ``dataset``, ...
    """

    key: str
    blob: Blob
    filename: str
    artifact_type: str = "file"


class Gap(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=9):
    """Stands in a stream for records that are not in it, so that every hole has a reason.

    The record that carries it has the first missing ``seq``; ``count`` records in a row are missing, for ``reason``
    (``spool_full``, ``disk_full``, ``withheld``, ...). Never handed to a backend.
    """

    count: int
    reason: str


Payload = Metrics | Params | Tags | Text | Image | Histogram | Table | Artifact | Gap


class Record(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One log call.

    The site is not in it: the receiver knows the site from the authenticated channel, so no record can claim another.

    Attributes:
        seq: position in its stream (one writing process), counted from 0.
        time: unix seconds (UTC) at the log call.
        step: what the caller gave, 0 to ``MAX_STEP``; None when it gave none.
        round: the federated round in which it was logged, where the process knew one.
        payload: what was logged.
    """

    seq: int
    time: float
    step: int | None
    round: int | None
    payload: Payload
