# SPDX-License-Identifier: Apache-2.0
"""The adapter with the methods of TensorBoard's ``SummaryWriter``: FLARE's, torch's and tensorboardX's.

Training code calls it. It converts the arguments of a call, and calls `trackhub.Writer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, SupportsIndex

from trackhub.writer import convert_figures_and_tables
from trackhub.writer.adapter_base import AdapterBase, first_given
from trackhub.writer.count_wrong_calls import with_counted_calls
from trackhub.writer.writer import Writer

__all__ = ["SummaryWriter"]


@with_counted_calls
class SummaryWriter(AdapterBase):
    """Has the methods of TensorBoard's ``SummaryWriter``, with the arguments of FLARE's and of torch's.

    A backend that needs a step gets 0, 1, 2, ... for the values of a tag that are logged without ``global_step``. No
    method raises, unless strict. trackhub has no record kind for some methods, such as ``add_video``. A call of one is
    counted as dropped, and the first call warns. ``walltime`` has no effect: a record has the time of its call.
    """

    COUNTED = ("add_",)  # add_audio, add_embedding, add_graph, add_mesh, add_onnx_graph, add_tensor, add_video, ...
    IGNORED = ("add_custom_scalars", "add_custom_scalars_marginchart", "add_custom_scalars_multilinechart")

    def __init__(
        self,
        log_dir: Any = None,
        comment: str = "",
        *args: Any,
        writer: Writer | None = None,
        strict: bool = False,
        **kwargs: Any,
    ) -> None:
        """Use a writer, by default a new one.

        Args:
            log_dir: not used; torch's folder, or FLARE's context.
            comment: not used.
            args, kwargs: torch's further arguments (``purge_step``, ``max_queue``, ``flush_secs``, ...), not used.
            writer, strict: as for the other adapters.

        Raises:
            ConfigError: ``strict`` is set and there is no tracking, or ``TRACKHUB_MODE`` has an unknown value.
        """
        super().__init__(writer=writer, strict=strict)
        self.log_dir = ""  # as for `get_logdir`

    def get_logdir(self) -> str:
        """Return an empty text. There is no log folder here: each backend of the job has its own."""
        return ""

    def add_scalar(
        self, tag: str | None = None, scalar: Any = None, global_step: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Log a scalar.

        Args:
            tag: its key.
            scalar: its value, as for ``Writer.log``. Torch calls it ``scalar_value``.
            global_step: the step.
            args, kwargs: TensorBoard's further arguments (``walltime``, ``new_style``, ...), without effect.
        """
        value = first_given(scalar, kwargs, "scalar_value")
        self._log_pair("add_scalar", tag, value, lambda pair: self.writer.log(pair, global_step))

    def add_scalars(
        self,
        tag: str | None = None,
        scalars: Mapping[str, Any] | None = None,
        global_step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log scalars as one record, each under ``tag/name``.

        Args:
            tag: what all their keys begin with. Torch calls it ``main_tag``.
            scalars: name to value. An empty mapping logs nothing. Torch calls it ``tag_scalar_dict``.
            global_step: the step.
            args, kwargs: as for ``add_scalar``.
        """
        tag, values = first_given(tag, kwargs, "main_tag"), first_given(scalars, kwargs, "tag_scalar_dict")
        self._log_pair("add_scalars", tag, values, lambda pair: self.writer.log(pair, global_step))

    def add_hparams(
        self,
        hparam_dict: Mapping[str, Any],
        metric_dict: Mapping[str, Any],
        hparam_domain_discrete: Any = None,
        run_name: str | None = None,
        global_step: int | None = None,
    ) -> None:
        """Log hyperparameters, and the metrics that were reached with them.

        Args:
            hparam_dict: the hyperparameters, as for ``Writer.log_params``.
            metric_dict: the metrics, as for ``Writer.log``.
            hparam_domain_discrete, run_name: without effect. A site has one run.
            global_step: the step of the metrics.
        """
        self.writer.log_params(hparam_dict)
        self.writer.log(metric_dict, global_step)

    def add_text(self, tag: str, text_string: str, global_step: int | None = None, *args: Any, **kwargs: Any) -> None:
        """Log a text, shown as Markdown by backends that can.

        Args:
            tag: its key.
            text_string: the text.
            global_step: the step.
            args, kwargs: as for ``add_scalar``.
        """
        self.writer.log_text(tag, text_string, global_step)

    def add_image(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Log an image.

        Args:
            tag: its key.
            img_tensor: as for ``Writer.log_image``: channels first, last or none.
            global_step: the step.
            walltime: without effect.
            dataformats: the names of its axes, such as ``HWC``. By default, the shape shows where the channels are; if
                the first axis and the last can be channels, the first one is.
            kwargs: as for ``add_scalar``.
        """
        self._log_image(
            "add_image", tag, global_step, convert_figures_and_tables.as_torch_image, img_tensor, dataformats
        )

    def add_images(
        self,
        tag: str,
        img_tensor: Any,
        global_step: int | None = None,
        walltime: float | None = None,
        dataformats: str = "NCHW",
        **kwargs: Any,
    ) -> None:
        """Log a batch of images as one image, in rows of eight.

        Args:
            tag: its key.
            img_tensor: an array or tensor.
            global_step: the step.
            walltime: without effect.
            dataformats: the names of its axes.
            kwargs: as for ``add_scalar``.
        """
        self._log_image(
            "add_images", tag, global_step, convert_figures_and_tables.as_torch_grid, img_tensor, dataformats
        )

    def add_image_with_boxes(
        self, tag: str, img_tensor: Any, box_tensor: Any, global_step: int | None = None, *args: Any, **kwargs: Any
    ) -> None:
        """Log an image without its boxes, and count the boxes as dropped.

        Args:
            tag: the image's key.
            img_tensor: the image.
            box_tensor: its boxes.
            global_step: the step.
            args, kwargs: torch's further arguments. Only ``dataformats`` has an effect, and only by name.
        """
        self.add_image(tag, img_tensor, global_step, dataformats=kwargs.get("dataformats"))
        self._count("add_image_with_boxes")

    def add_figure(
        self, tag: str, figure: Any, global_step: int | None = None, close: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Log figures of matplotlib as images. A list of them gets the keys ``tag/0``, ``tag/1``, ...

        Args:
            tag: the key.
            figure: a figure, or a list of them.
            global_step: the step.
            close: close the figures afterwards, also where nothing is recorded.
            args, kwargs: as for ``add_scalar``.
        """
        figures = figure if isinstance(figure, list | tuple) else [figure]
        try:
            for i, one in enumerate(figures):
                self._log_converted(
                    "add_figure",
                    tag,
                    lambda i=i, one=one: (  # type: ignore[misc]
                        tag if figures is not figure else f"{tag}/{i}",
                        convert_figures_and_tables.figure_png(one),
                    ),
                    lambda found: self.writer.log_image(*found, global_step),
                )
        finally:
            for one in figures if close else ():  # also without tracking: pyplot would keep all figures of a training
                convert_figures_and_tables.close_figure(one)

    def add_histogram(
        self,
        tag: str,
        values: Any,
        global_step: int | None = None,
        bins: Any = None,
        walltime: float | None = None,
        max_bins: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Log a distribution.

        Args:
            tag: its key.
            values: an array or tensor of numbers.
            global_step: the step.
            bins: how many bins. Anything but a whole number, such as the name ``tensorflow``, means the default of 30.
            walltime, max_bins: without effect.
            kwargs: as for ``add_scalar``.
        """
        is_whole = isinstance(bins, SupportsIndex) and getattr(bins, "shape", ()) == ()
        self.writer.log_histogram(tag, values, global_step, bins=bins if is_whole else 30)

    def add_histogram_raw(
        self,
        tag: str,
        min: float,
        max: float,
        num: float,
        sum: float,
        sum_squares: float,
        bucket_limits: Any,
        bucket_counts: Any,
        global_step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log a histogram whose values are already counted in buckets.

        Args:
            tag: its key.
            min: the smallest value.
            max, num, sum, sum_squares: not used, since the buckets and their counts are enough.
            bucket_limits: the right limit of each bucket.
            bucket_counts: how many values are in each bucket.
            global_step: the step.
            args, kwargs: as for ``add_scalar``.
        """
        self._log_converted(
            "add_histogram_raw",
            tag,
            lambda: convert_figures_and_tables.histogram_of_buckets(min, bucket_limits, bucket_counts),
            lambda found: self.writer.log_histogram(tag, step=global_step, edges=found[0], counts=found[1]),
        )

    def add_pr_curve(
        self,
        tag: str,
        labels: Any,
        predictions: Any,
        global_step: int | None = None,
        num_thresholds: int = 127,
        weights: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log a precision-recall curve as a table with a row for each threshold.

        Args:
            tag: its key.
            labels: for each example, True if it is positive.
            predictions: the probability that it is, 0 to 1.
            global_step: the step.
            num_thresholds: how many thresholds, up to 127.
            weights: the weight of each example.
            args, kwargs: as for ``add_scalar``.
        """
        self._log_converted(
            "add_pr_curve",
            tag,
            lambda: convert_figures_and_tables.pr_curve(labels, predictions, num_thresholds, weights),
            lambda found: self.writer.log_table(tag, found[0], found[1], global_step),
        )

    def add_pr_curve_raw(
        self,
        tag: str,
        true_positive_counts: Any,
        false_positive_counts: Any,
        true_negative_counts: Any,
        false_negative_counts: Any,
        precision: Any,
        recall: Any,
        global_step: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Log a precision-recall curve that is computed already, as a table with a row for each threshold.

        Args:
            tag: its key.
            true_positive_counts, false_positive_counts, true_negative_counts, false_negative_counts: for each
                threshold.
            precision, recall: for each threshold.
            global_step: the step.
            args, kwargs: as for ``add_scalar``.
        """
        columns = {
            "tp": true_positive_counts,
            "fp": false_positive_counts,
            "tn": true_negative_counts,
            "fn": false_negative_counts,
            "precision": precision,
            "recall": recall,
        }
        self._log_converted(
            "add_pr_curve_raw",
            tag,
            lambda: convert_figures_and_tables.table_of(columns),
            lambda found: self.writer.log_table(tag, *found, global_step),
        )

    def _log_image(self, method: str, tag: str, step: int | None, convert: Any, image: Any, dataformats: Any) -> None:
        self._log_converted(
            method, tag, lambda: convert(image, dataformats), lambda found: self.writer.log_image(tag, found, step)
        )
