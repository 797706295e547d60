# SPDX-License-Identifier: Apache-2.0
"""Turns a record into one TensorBoard event, with the values that the dashboards read.

`backend` encodes each entry here and appends the frames with `event_files`.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_DOUBLE, DT_STRING
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata

from trackhub.spi import Artifact, Entry, Histogram, Image, Metrics, Params, RunInfo, Table, Tags, Text
from trackhub.spi import Summary as FinalValues
from trackhub_tensorboard.event_files import NewTag
from trackhub_tensorboard.hparams_file import SESSION_TAGS
from trackhub_tensorboard.tfrecord import frame

__all__ = ["Encoder"]

_TEXT = text_metadata.create_summary_metadata(display_name="", description="")
_IMAGE = image_metadata.create_summary_metadata(display_name="", description="")
_HISTOGRAM = histogram_metadata.create_summary_metadata(display_name="", description="")

_MAX_SLOTS = 4096  # keys of all events that are kept for reuse; code that invents keys must not fill the memory

_MARKDOWN = re.compile(r"[\\`*_\[\]|#]")


class _ScalarEvent(NamedTuple):
    """An event that is filled again for each record with the same keys.

    Attributes:
        event: the event.
        slots: for each key, the place of its value.
        last_step, others: the last steps of its keys, as lists of one number. Usually all keys share ``last_step``.
    """

    event: Event
    slots: list[tuple[str, Summary.Value]]
    last_step: list[int]
    others: list[list[int]]


class Encoder:
    """Encodes one run's records as events.

    In TensorBoard a tag belongs to one dashboard, that of its first value: a text with a scalar's tag would break the
    scalar. So where records of two kinds have the same key, the later kind's tag is ``key (kind)``.

    Attributes:
        new_tags: the tags that were given since the caller last emptied this list.
        has_late_steps: True if a tag got a step that is not above its last one. Then TensorBoard's fast loader does not
            show all points. It may be True without such a step. It is never False with one.
    """

    def __init__(self, info: RunInfo, tags: Sequence[NewTag]) -> None:
        """Continue with the tags that the run's files hold already.

        Args:
            info: the run.
            tags: its tags, in the order of their first use.
        """
        self._info = info
        # A metric with a tag of the HPARAMS tab would vanish: TensorBoard keeps the tag for that tab.
        self._taken = {*SESSION_TAGS, *(new.tag for new in tags)}
        self._tags: dict[str, dict[str, str]] = {}
        for new in tags:
            self._tags.setdefault(new.kind, {})[new.key] = new.tag
        self._scalar_events: dict[tuple[str, ...], _ScalarEvent] = {}
        self._slots = 0
        self._scalar_steps: dict[str, list[int]] = {}
        self._other_steps: dict[str, int] = {}
        self.new_tags: list[NewTag] = []
        self.has_late_steps = bool(tags)  # the last steps of a run that is opened again are not known

    def encode(self, entry: Entry) -> bytes:
        """Return the frame with the entry's event.

        Raises:
            OSError: an image's file cannot be read.
            TypeError: the entry holds a payload that TensorBoard cannot show. The caller rejects such entries.
        """
        # Params and tags have no step, so their position takes its place. It never repeats: TensorBoard's fast loader
        # shows only the last value of a repeated step.
        step = entry.position if entry.step is None else entry.step
        payload = entry.payload
        if isinstance(payload, Metrics):
            return self._scalars(entry.time, step, payload.values)
        event = Event(wall_time=entry.time, step=step)
        summary = event.summary
        match payload:
            case Text(key, text):
                self._add_text(summary, "text", key, text)
            case Params(values):
                self._add_text(summary, "params", "params", _markdown_table(("param", "value"), values.items()))
            case Tags(values):
                self._add_text(summary, "tags", "tags", _markdown_table(("tag", "value"), values.items()))
            case FinalValues(values):
                table = _markdown_table(("final value", "value"), values.items())
                self._add_text(summary, "summary", "summary", table)
            case Artifact() as file:
                about = [file.filename, file.artifact_type, file.blob.size, file.blob.sha256]
                table = _markdown_table(("file", "type", "bytes", "sha256"), [about])
                self._add_text(summary, "artifact", file.key, table)
            case Table(key, columns, rows):
                self._add_text(summary, "table", key, _markdown_table(columns, rows))
            case Image() as image:
                self._add_image(summary, image)
            case Histogram() as histogram:
                self._add_histogram(summary, histogram)
            case _:
                raise TypeError(f"{type(payload).__name__} is not among the kinds of this backend's capabilities")
        for value in summary.value:
            self.has_late_steps |= step <= self._other_steps.get(value.tag, -1)
            self._other_steps[value.tag] = step
        return frame(event.SerializeToString())

    def _scalars(self, time: float, step: int, values: dict[str, float]) -> bytes:
        """Return the frame of an event of scalars.

        The event of the last record with these keys is used again. That takes a third of the time of a new event.
        """
        keys = tuple(values)
        event, slots, last_step, others = self._scalar_events.get(keys) or self._scalar_event(keys)
        if step <= last_step[0]:
            self.has_late_steps = True
        last_step[0] = step
        for last_step in others:
            if step <= last_step[0]:
                self.has_late_steps = True
            last_step[0] = step
        event.wall_time = time
        event.step = step
        for key, slot in slots:
            slot.simple_value = values[key]
        return frame(event.SerializeToString())

    def _scalar_event(self, keys: tuple[str, ...]) -> _ScalarEvent:
        first, *others = self._last_steps(keys)
        event = Event()
        slots = [(key, event.summary.value.add(tag=self._tag("metrics", key))) for key in keys]
        if self._slots + len(keys) > _MAX_SLOTS:
            self._scalar_events.clear()
            self._slots = 0
        self._slots += len(keys)
        made = self._scalar_events[keys] = _ScalarEvent(event, slots, first, others)
        return made

    def _last_steps(self, keys: tuple[str, ...]) -> list[list[int]]:
        """Return the last steps of these keys, as lists of one number.

        Keys that were first logged together share one list. So a record's step is usually compared once, not for each
        key. A key keeps its list, so events that refer to the list stay valid.
        """
        steps = self._scalar_steps
        found = {id(known): known for key in keys if (known := steps.get(key))}
        if any(key not in steps for key in keys):
            new = [-1]
            found[id(new)] = new
            for key in keys:
                steps.setdefault(key, new)
        return list(found.values()) or [[-1]]  # metrics without keys have no last step

    def _add_text(self, summary: Summary, kind: str, key: str, text: str) -> None:
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=_shape(), string_val=[text.encode()])
        summary.value.add(tag=self._tag(kind, key), tensor=tensor, metadata=_TEXT)

    def _add_image(self, summary: Summary, image: Image) -> None:
        content = self._info.blob_path(image.blob).read_bytes()
        parts = [str(image.width).encode(), str(image.height).encode(), content]
        tensor = TensorProto(dtype=DT_STRING, tensor_shape=_shape(len(parts)), string_val=parts)
        summary.value.add(tag=self._tag("image", image.key), tensor=tensor, metadata=_IMAGE)
        if image.caption:  # the image dashboard has no place for a caption that changes with the step
            self._add_text(summary, "caption", f"{image.key}/caption", image.caption)

    def _add_histogram(self, summary: Summary, histogram: Histogram) -> None:
        edges, counts = histogram.edges, histogram.counts
        cells = [cell for row in zip(edges, edges[1:], counts, strict=False) for cell in row]
        content = struct.pack(f"<{len(cells)}d", *cells)
        tensor = TensorProto(dtype=DT_DOUBLE, tensor_shape=_shape(len(counts), 3), tensor_content=content)
        summary.value.add(tag=self._tag("histogram", histogram.key), tensor=tensor, metadata=_HISTOGRAM)

    def _tag(self, kind: str, key: str) -> str:
        tags = self._tags.setdefault(kind, {})
        if key not in tags:
            tag = key
            while tag in self._taken:
                tag += f" ({kind})"
            tags[key] = tag
            self._taken.add(tag)
            self.new_tags.append(NewTag(kind, key, tag))
        return tags[key]


def _shape(*sizes: int) -> TensorShapeProto:
    return TensorShapeProto(dim=[TensorShapeProto.Dim(size=size) for size in sizes])


def _markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [[_cell(column) for column in columns], ["---"] * len(columns)]
    lines += [[_cell(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    """Return a string escaped so that Markdown shows it as it is, or another value as JSON."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = _MARKDOWN.sub(r"\\\g<0>", text.replace("&", "&amp;").replace("<", "&lt;"))
    return text.replace("\r\n", "<br>").replace("\n", "<br>")
