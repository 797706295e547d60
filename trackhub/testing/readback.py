# SPDX-License-Identifier: Apache-2.0
"""What a store holds of one run, in a form that does not depend on the backend.

The hook ``read_back`` of a contract class makes a `ReadBack`, and the kit compares it with what was logged. Keys,
steps, values and times are as stored; times are unix seconds (UTC).
"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["ArtifactItem", "HistogramItem", "ImageItem", "Point", "ReadBack", "TableItem", "TextItem"]


class Point(msgspec.Struct, frozen=True):
    """One value of one metric."""

    key: str
    step: int | None
    value: float
    time: float | None = None


class TextItem(msgspec.Struct, frozen=True):
    """One text."""

    key: str
    step: int | None
    text: str
    time: float | None = None


class ImageItem(msgspec.Struct, frozen=True):
    """One image; ``content`` is the PNG or JPEG file's bytes."""

    key: str
    step: int | None
    content: bytes
    caption: str = ""
    time: float | None = None


class HistogramItem(msgspec.Struct, frozen=True):
    """One histogram: n + 1 edges, n counts."""

    key: str
    step: int | None
    edges: list[float]
    counts: list[float]
    time: float | None = None


class TableItem(msgspec.Struct, frozen=True):
    """One table: column names, and one list of cells for each row."""

    key: str
    step: int | None
    columns: list[str]
    rows: list[list[Any]]
    time: float | None = None


class ArtifactItem(msgspec.Struct, frozen=True):
    """One file; ``content`` is its bytes."""

    key: str
    content: bytes
    filename: str | None = None
    artifact_type: str | None = None
    step: int | None = None
    time: float | None = None


class ReadBack(msgspec.Struct, kw_only=True):
    """What a store holds of one run.

    A field is None if this store cannot tell it. The contract class then says so, and why, in ``cannot_tell``. For a
    store that holds nothing of a kind, the field is an empty list or dict.

    Attributes:
        points: of all metrics. The points of one key are in the order in which the store shows them.
        params: name to value.
        tags: name to value.
        summary: the final values, name to value.
        texts: one item for each record, as in the next four fields.
        images: the images.
        histograms: the histograms.
        tables: the tables.
        artifacts: the files that were logged.
        status: how the run ended, in the store's own word; None while it is open.
    """

    points: list[Point]
    params: dict[str, Any] | None = None
    tags: dict[str, str] | None = None
    summary: dict[str, Any] | None = None
    texts: list[TextItem] | None = None
    images: list[ImageItem] | None = None
    histograms: list[HistogramItem] | None = None
    tables: list[TableItem] | None = None
    artifacts: list[ArtifactItem] | None = None
    status: str | None = None
