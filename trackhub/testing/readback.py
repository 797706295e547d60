# SPDX-License-Identifier: Apache-2.0
"""What a store holds of one run, as the author of a contract class reads it back."""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["ArtifactItem", "HistogramItem", "ImageItem", "Point", "ReadBack", "TableItem", "TextItem"]


class Point(msgspec.Struct, frozen=True):
    """One value of one metric.

    Attributes:
        key, step, value: as stored.
        time: unix seconds (UTC) as stored.
    """

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
    """One table."""

    key: str
    step: int | None
    columns: list[str]
    rows: list[list[Any]]
    time: float | None = None


class ArtifactItem(msgspec.Struct, frozen=True):
    """One file."""

    key: str
    content: bytes
    filename: str | None = None
    artifact_type: str | None = None
    step: int | None = None
    time: float | None = None


class ReadBack(msgspec.Struct, kw_only=True):
    """What a store holds of one run.

    A field is None if this store cannot tell it; the contract class then says so, and why, in ``cannot_tell``. A store
    that holds nothing of a kind gives an empty list or dict.

    Attributes:
        points: of all metrics. Within a key in the order in which the store shows them.
        params: name to value.
        tags: name to value.
        texts, images, histograms, tables, artifacts: one item for each record.
        status: how the run ended, in the store's own word; None while it is open.
    """

    points: list[Point]
    params: dict[str, Any] | None = None
    tags: dict[str, str] | None = None
    texts: list[TextItem] | None = None
    images: list[ImageItem] | None = None
    histograms: list[HistogramItem] | None = None
    tables: list[TableItem] | None = None
    artifacts: list[ArtifactItem] | None = None
    status: str | None = None
