# SPDX-License-Identifier: Apache-2.0
"""Text, images, histograms and tables as files in the forms that MLflow's UI shows.

`MLflowRun` calls these functions and stores what they return among the run's artifacts.
"""

from __future__ import annotations

import io
import json
import math
import uuid
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trackhub.spi import BadImageError, Entry, Histogram, Image, Table, Text, read_image_header
from trackhub_mlflow.naming import file_part
from trackhub_mlflow.points import milliseconds

__all__ = ["histogram_files", "image_files", "table_file", "table_path", "text_file"]

_THUMBNAIL_PIXELS = 256
_MAX_DECODED_PIXELS = 50_000_000  # 200 MB of memory; a larger image is stored without being decoded
_WIDTH, _HEIGHT, _MARGIN = 640, 320, 40


def text_file(entry: Entry, text: Text) -> tuple[str, bytes]:
    """Return path and content of a text, which the UI shows as Markdown."""
    return f"text/{_name(entry, text.key)}.md", text.text.encode()


def image_files(entry: Entry, image: Image, blob: Path, run_id: str) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of an image, of its thumbnail, and of its caption if it has one.

    The paths are those of ``MlflowClient.log_image(key=…, step=…)``, by which the UI's charts find an image and show a
    slider for the step. The charts show only PNG, so a JPEG is converted without loss.

    Args:
        entry: the record, for its position, step and time.
        image: its payload.
        blob: the file that holds the image, PNG or JPEG.
        run_id: ``RunInfo.run_id``. Together with the position, it makes the paths the same on every delivery.

    Raises:
        BadImageError: the content cannot be decoded.
    """
    unique = uuid.uuid5(uuid.UUID(run_id), str(entry.position))
    stem = f"images/{file_part(image.key)}+step+{entry.step or 0}+timestamp+{milliseconds(entry.time)}+{unique}"
    for suffix, content in _versions(blob.read_bytes()):
        yield stem + suffix, content
    if image.caption:
        yield f"{stem}.txt", image.caption.encode()


def histogram_files(entry: Entry, histogram: Histogram) -> Iterator[tuple[str, bytes]]:
    """Yield path and content of a histogram's data and of its picture."""
    stem = f"histograms/{_name(entry, histogram.key)}"
    data = {"edges": histogram.edges, "counts": histogram.counts, "step": entry.step, "time": entry.time}
    yield f"{stem}.json", _json(data)
    yield f"{stem}.svg", _bars(histogram, f"{histogram.key}, step {entry.step}").encode()


def table_path(entry: Entry, table: Table) -> str:
    """Return the path of a table."""
    return f"tables/{_name(entry, table.key)}.json"


def table_file(table: Table) -> bytes:
    """Return a table's content in the form of ``MlflowClient.log_table``, which the UI shows as a table.

    JSON has no NaN and no infinity, so such a cell holds the name of its value.
    """
    return _json({"columns": table.columns, "data": [[_cell(cell) for cell in row] for row in table.rows]})


def _name(entry: Entry, key: str) -> str:
    # The position keeps records of the same key and step apart, and is the same on every delivery.
    return f"{file_part(key)}/step-{entry.step or 0:08d}-p{entry.position}"


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode()


def _cell(cell: Any) -> Any:
    if isinstance(cell, float) and not math.isfinite(cell):
        return "NaN" if math.isnan(cell) else "Infinity" if cell > 0 else "-Infinity"
    return cell


def _versions(content: bytes) -> list[tuple[str, bytes]]:
    """Return suffix and content of the image as PNG, and of its thumbnail.

    A huge image is returned as it was logged, without a thumbnail: Pillow would refuse to open it.

    Raises:
        BadImageError: the content cannot be decoded.
    """
    header = read_image_header(io.BytesIO(content))
    is_png = header.media_type == "image/png"
    if header.width * header.height > _MAX_DECODED_PIXELS:
        return [(".png" if is_png else ".jpg", content)]
    from PIL import Image as Pillow

    try:
        with Pillow.open(io.BytesIO(content), formats=("PNG",) if is_png else ("JPEG",)) as image:
            if image.size != (header.width, header.height):
                raise BadImageError(f"Pillow reads another size than the header says: {image.size}, {header}")
            # Pillow's own conversion turns each 16-bit value above 255 into 255. Nearly all pixels would be white.
            shown = image.convert("I").point(lambda value: value * (1 / 257)) if image.mode.startswith("I") else image
            small = shown.convert("RGBA" if image.has_transparency_data else "RGB")
            whole = content if is_png else _encoded(image, "PNG")
        small.thumbnail((_THUMBNAIL_PIXELS, _THUMBNAIL_PIXELS))
        return [(".png", whole), ("+compressed.webp", _encoded(small, "WEBP"))]
    except Exception as error:  # a decoder raises anything for a damaged file, also AssertionError and struct.error
        raise BadImageError(f"the content cannot be decoded as PNG or JPEG: {type(error).__name__}: {error}") from error


def _encoded(image: Any, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def _bars(histogram: Histogram, title: str) -> str:
    """Return the histogram as an SVG picture, with bars as wide as their bins."""
    edges, counts = histogram.edges, histogram.counts
    low, span = edges[0], (edges[-1] - edges[0]) or 1.0
    top = max(counts, default=0.0) or 1.0
    inner_width, inner_height = _WIDTH - 2 * _MARGIN, _HEIGHT - 2 * _MARGIN
    base = _HEIGHT - _MARGIN

    def x(edge: float) -> float:
        return _MARGIN + inner_width * (edge - low) / span

    bars = []
    for left, right, count in zip(edges, edges[1:], counts, strict=False):
        height = inner_height * count / top
        bars.append(
            f'<rect x="{x(left):.2f}" y="{base - height:.2f}" width="{max(x(right) - x(left) - 0.5, 0.5):.2f}" '
            f'height="{height:.2f}"><title>[{left:g}, {right:g}): {count:g}</title></rect>'
        )
    return "\n".join(_picture(title, bars, edges, top, base))


def _picture(title: str, bars: Sequence[str], edges: Sequence[float], top: float, base: int) -> Iterator[str]:
    right = _WIDTH - _MARGIN
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif"'
    yield ' font-size="13"><rect width="100%" height="100%" fill="white"/>'
    yield f'<text x="{_MARGIN}" y="{_MARGIN / 2}">{escape(title)}</text>'
    yield f'<g fill="#2272b4">{"".join(bars)}</g>'
    yield f'<path d="M{_MARGIN} {base}H{right}" stroke="black"/>'
    yield f'<text x="{_MARGIN}" y="{base + 18}">{edges[0]:.6g}</text>'
    yield f'<text x="{right}" y="{base + 18}" text-anchor="end">{edges[-1]:.6g}</text>'
    yield f'<text x="{right}" y="{_MARGIN / 2}" text-anchor="end">highest bin: {top:.6g}</text></svg>'
