# SPDX-License-Identifier: Apache-2.0
"""The log calls for figures, several images, and histograms of a whole model. Each makes several simpler log calls.

`Writer` inherits them. They call `Writer`'s own methods with what they find in objects of matplotlib, plotly and torch.
None of these libraries is imported here: a script that passes a figure has imported its library.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trackhub.errors import RecordError
from trackhub.records import MAX_CAPTION_CHARS
from trackhub.writer.bad_values import BadValues
from trackhub.writer.bounded_reading import Budget
from trackhub.writer.convert_figures_and_tables import figure_png
from trackhub.writer.count_wrong_calls import with_counted_calls
from trackhub.writer.plain_values import key_text, shown

if TYPE_CHECKING:
    from trackhub.spool.writing import SpoolWriter

__all__ = ["FigureAndModelCalls"]

_DRAWING_S = 10.0
_MAX_IMAGES = 10_000  # in one call
_can_draw_plotly: bool | None = None  # None until the first figure. A failure takes seconds, so it is tried once.


@with_counted_calls
class FigureAndModelCalls:
    """The methods of `Writer` that make several calls of its other methods."""

    _spool: SpoolWriter | None
    _strict: bool

    def log_figure(self, key: str, figure: Any, step: int | None = None, caption: str = "") -> None:
        """Log a figure of matplotlib or plotly, such as a confusion matrix, an ROC or a PR curve.

        A figure of matplotlib becomes an image. A figure of plotly becomes an HTML file, the artifact ``<key>.html``.
        That page loads plotly.js from the internet. The figure also becomes an image if kaleido is installed and draws
        it within 10 s.

        Args:
            key: the figure's key.
            figure: a figure, or an object that has one: matplotlib's axes, or a plotted display of scikit-learn.
            step: as for ``log``.
            caption: a line of text below the image.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        if self._spool is None:
            return
        with self._counting_errors("log_figure", key):
            found = _figure_of(figure)
            if hasattr(found, "savefig"):
                self.log_image(key, figure_png(found, {"bbox_inches": "tight"}), step, caption)
            else:
                self._log_plotly(key, found, step, caption)

    def log_images(
        self,
        key: str,
        images: Any,
        step: int | None = None,
        *,
        captions: Sequence[str] = (),
        columns: int | None = None,
    ) -> None:
        """Log several images, each under a key such as ``<key>/0``. With ``columns``, log one grid under ``key``.

        Args:
            key: the key of the grid, or the beginning of each image's key.
            images: a sequence of images, or a batch ``[N, H, W]``, ``[N, H, W, C]`` or ``[N, C, H, W]``, at most 10,000
                images. Each is as for ``log_image``.
            step: as for ``log``.
            captions: a line of text for each image. In a grid, they become one caption.
            columns: how many images are in a row of the grid; None for no grid. Each cell of a grid is as large as the
                largest image. A grid may have 100 million pixels.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        if self._spool is None:
            return
        with self._counting_errors("log_images", key):
            each: list[Any] = list(Budget(f"log_images({shown(key)})", _MAX_IMAGES, "images").each(images))
            budget = Budget(f"captions of {shown(key)}")
            texts = ["" if text is None else str(text) for text in budget.each(() if captions is None else captions)]
            if not each:
                raise RecordError(f"log_images({shown(key)}): there is no image; expected one or more")
            if columns is not None:
                from trackhub.writer.images import grid_of  # lazy, with Pillow

                caption = ", ".join(texts)[:MAX_CAPTION_CHARS]
                bad = BadValues(strict=self._strict)
                self.log_image(key, grid_of(key_text(key), each, columns, bad), step, caption)
                self._note_left_out("log_images", bad, has_rest=True)
                return
            texts += [""] * (len(each) - len(texts))
            for i, (image, text) in enumerate(zip(each, texts, strict=False)):
                self.log_image(f"{key_text(key)}/{i}", image, step, text)

    def log_model_histograms(
        self,
        model: Any,
        step: int | None = None,
        *,
        prefix: str = "parameters",
        gradients: bool = False,
        bins: int = 30,
    ) -> None:
        """Log a histogram of each parameter of a model, under keys such as ``parameters/conv1.weight``.

        Args:
            model: a torch module, a Keras model, or a mapping of name to array, such as a ``state_dict``.
            step: as for ``log``.
            prefix: what the keys begin with.
            gradients: log the gradients as well, under ``gradients/``. Parameters without a gradient are left out.
            bins: how many bins each histogram has.

        Raises:
            RecordError, SpoolError: only if strict, as for ``log``.
        """
        if self._spool is None:
            return
        with self._counting_errors("log_model_histograms", prefix):
            for name, values in _parameters_of(model):
                with self._counting_errors("log_model_histograms", name):
                    self.log_histogram(f"{prefix}/{key_text(name)}", values, step, bins=bins)
                    gradient = getattr(values, "grad", None) if gradients else None
                    if gradient is not None:
                        self.log_histogram(f"gradients/{key_text(name)}", gradient, step, bins=bins)

    def _log_plotly(self, key: str, figure: Any, step: int | None, caption: str) -> None:
        global _can_draw_plotly
        with tempfile.TemporaryDirectory(prefix="trackhub-") as folder:
            path = Path(folder, "figure.html")
            path.write_text(figure.to_html(include_plotlyjs="cdn"), encoding="utf-8")
            self.log_artifact(path, f"{key_text(key)}.html", "figure")
        if _can_draw_plotly is None:
            _can_draw_plotly = importlib.util.find_spec("kaleido") is not None
        if _can_draw_plotly:
            png = _drawn(figure)
            _can_draw_plotly = png is not None
            if png is not None:
                self.log_image(key, png, step, caption)

    @contextlib.contextmanager
    def _counting_errors(self, method: str, key: Any) -> Any:
        """Count the call as dropped if the ``with`` block raises."""
        try:
            yield
        except Exception as e:  # noqa: BLE001  # no log call raises, whatever it was given
            self._drop_call(method, e, key)

    if TYPE_CHECKING:  # what `Writer` has
        log_image: Callable[..., None]
        log_histogram: Callable[..., None]
        log_artifact: Callable[[str | os.PathLike[str], str | None, str], None]

        def _drop_call(self, method: str, error: Exception, key: Any = None) -> None: ...

        def _note_left_out(self, method: str, bad: BadValues, *, has_rest: bool) -> None: ...


def _drawn(figure: Any) -> bytes | None:
    """Return a figure of plotly as a PNG file, drawn by kaleido. None if that fails, or takes too long for training.

    kaleido starts a browser, which may be missing or may hang.
    """
    found: list[bytes] = []

    def draw() -> None:
        with contextlib.suppress(Exception):  # the HTML file is logged already, so the figure is not lost
            found.append(figure_png(figure))

    thread = threading.Thread(target=draw, name="trackhub-plotly", daemon=True)
    thread.start()
    thread.join(_DRAWING_S)
    return found[0] if found else None


def _figure_of(value: Any) -> Any:
    """Return the value if it is a figure, or else the figure that it holds.

    Raises:
        RecordError: the value is not a figure, and does not have one.
    """
    figure = getattr(value, "figure", None)  # the subfigure, if the axes are in one
    for found in (value, getattr(value, "figure_", None), figure, getattr(figure, "figure", None)):
        if hasattr(found, "savefig") or (hasattr(found, "to_html") and hasattr(found, "to_plotly_json")):
            return found
    raise RecordError(f"{shown(value)} is a {type(value).__name__}; expected a figure of matplotlib or plotly")


def _parameters_of(model: Any) -> list[tuple[str, Any]]:
    """Return the name and the values of each parameter.

    Raises:
        RecordError: this is neither a model nor a mapping.
    """
    if isinstance(model, Mapping):
        return list(model.items())
    weights = getattr(model, "weights", None)
    # Test for Keras first. With Keras's torch backend, a model is also a torch module, but its parameters have other
    # names there.
    if isinstance(weights, list) and all(hasattr(weight, "path") for weight in weights):
        return [(weight.path, weight.value) for weight in weights]
    if callable(getattr(model, "named_parameters", None)):
        return list(model.named_parameters())
    raise RecordError(f"{shown(model)} is a {type(model).__name__}; expected a torch module, or name to array")
