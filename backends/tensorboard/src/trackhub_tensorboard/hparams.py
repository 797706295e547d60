# SPDX-License-Identifier: Apache-2.0
"""A run's row in the HPARAMS tab: its params, and how it ended.

TensorBoard takes the params from the first event of their tag and ignores later ones. So that params can be logged in
several calls, and change, they are kept in an event file of their own that is replaced as a whole. A TensorBoard that
has read it already shows the new content when it is started again.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_FLOAT
from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE, STATUS_SUCCESS
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo, SessionStartInfo

from trackhub.spi import RunStatus
from trackhub_tensorboard.eventlog import first_event
from trackhub_tensorboard.frames import frame, frames

__all__ = ["Session"]

# Before the other event files in order: TensorBoard's own reader goes through them once, and never looks back.
_NAME = "events.out.tfevents.000000000000.hparams"
_PLUGIN = "hparams"
_START_TAG = "_hparams_/session_start_info"
_END_TAG = "_hparams_/session_end_info"
_EXACT = 2**53
_EMPTY = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))


class Session:
    """The file with a run's params. Its methods raise OSError."""

    def __init__(self, folder: Path, created: float) -> None:
        """Read what the file in this folder holds, if there is one."""
        self._path = folder / _NAME
        self._created = created
        # The group is the trial's name in the tab's first column, which shows only its first fifteen characters or so.
        self._start = SessionStartInfo(start_time_secs=created, group_name=f"{folder.name} ({folder.parent.name})")
        if self._path.exists():
            content = self._path.read_bytes()
            for start, end in frames(content):
                for value in Event.FromString(content[start:end]).summary.value:
                    if value.tag == _START_TAG:
                        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                        self._start = data.session_start_info

    def update(self, params: dict[str, Any]) -> None:
        """Add params, or change them."""
        for name, value in params.items():
            slot = self._start.hparams[name]
            if isinstance(value, bool):
                slot.bool_value = value
            elif _is_number(value):
                slot.number_value = value
            else:
                slot.string_value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        self._replace(self._start_event())

    def finish(self, status: RunStatus, time: float) -> None:
        """Say how the run ended, unless it has no params and so no place in the HPARAMS tab."""
        if self._start.hparams:
            end = SessionEndInfo(
                status=STATUS_SUCCESS if status is RunStatus.FINISHED else STATUS_FAILURE, end_time_secs=time
            )
            self._replace(self._start_event() + _event(_END_TAG, HParamsPluginData(session_end_info=end), time))

    def _start_event(self) -> bytes:
        return _event(_START_TAG, HParamsPluginData(session_start_info=self._start), self._created)

    def _replace(self, events: bytes) -> None:
        part = self._path.with_name(".hparams.part")  # a name that TensorBoard does not take for an event file
        try:
            part.write_bytes(first_event(self._created) + events)
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)


def _is_number(value: object) -> bool:
    """Whether a float64 holds this value exactly, and TensorBoard can send it to a browser as JSON."""
    if isinstance(value, int):
        return abs(value) <= _EXACT
    return isinstance(value, float) and math.isfinite(value)


def _event(tag: str, data: HParamsPluginData, time: float) -> bytes:
    plugin_data = SummaryMetadata.PluginData(plugin_name=_PLUGIN, content=data.SerializeToString())
    value = Summary.Value(tag=tag, tensor=_EMPTY, metadata=SummaryMetadata(plugin_data=plugin_data))
    return frame(Event(wall_time=time, summary=Summary(value=[value])).SerializeToString())
