# SPDX-License-Identifier: Apache-2.0
"""Finds the log call for each value of ``wandb.log`` that is not a number: figures, texts and W&B's own types.

`WandBWriter` calls it with the values that a script logs. It recognises W&B's types by their names, and does not import
W&B.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from trackhub.writer.writer import Writer

__all__ = ["calls_for"]

_Call = Callable[[Writer, str, Any], None]


def calls_for(values: Any) -> dict[str, _Call]:
    """Return key -> function that logs the value under a key and at a step. Leave out numbers. Never raises."""
    try:
        if not isinstance(values, Mapping) or all(isinstance(value, int | float) for value in values.values()):
            return {}
        return {key: call for key, value in values.items() if (call := _call_for(value)) is not None}
    except Exception:  # noqa: BLE001  # a foreign value may raise anything; `Writer.log` counts it
        return {}


def _call_for(value: Any) -> _Call | None:
    """Return the function that logs this value. None if the value is a number, or of an unknown type."""
    if isinstance(value, int | float):
        return None
    if isinstance(value, str):
        return lambda writer, key, step: writer.log_text(key, value, step)
    if hasattr(value, "savefig") or (hasattr(value, "to_plotly_json") and hasattr(value, "to_html")):
        return lambda writer, key, step: writer.log_figure(key, value, step)
    if isinstance(value, list | tuple):
        images = [_image(one) for one in value]
        if images and all(images):
            pixels, captions = zip(*(image for image in images if image), strict=True)
            return lambda writer, key, step: writer.log_images(key, pixels, step, captions=captions)
        return None
    if (image := _image(value)) is not None:
        return lambda writer, key, step: writer.log_image(key, image[0], step, image[1])
    if not type(value).__module__.startswith("wandb."):
        return None
    match type(value).__name__:
        case "Histogram":
            return lambda writer, key, step: writer.log_histogram(
                key, step=step, edges=value.bins, counts=value.histogram
            )
        case "Table":
            return lambda writer, key, step: writer.log_table(key, value.columns, value.data, step)
        case "Html":
            return lambda writer, key, step: writer.log_text(key, value.html, step)
    return None


def _image(value: Any) -> tuple[Any, str] | None:
    """Return the pixels and the caption of an image of Pillow or W&B. None if the value is not an image."""
    kind = type(value)
    if kind.__module__.startswith("PIL."):
        return value, ""
    if kind.__module__.startswith("wandb.") and kind.__name__ == "Image":
        return value.image, value._caption or ""
    return None
