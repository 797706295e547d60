# SPDX-License-Identifier: Apache-2.0
"""The file with a run's row in the HPARAMS tab: its params, and how the run ended.

TensorBoard reads the params from the first event of their tag and ignores later ones. But a site may log params in
several calls, and change them. So `backend` keeps params in a separate event file, which this module replaces as a
whole. If TensorBoard has read the file already, it shows new params only after it is started again.
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

from trackhub.spi import RunInfo, RunStatus, Side, open_file
from trackhub_tensorboard.event_files import first_event
from trackhub_tensorboard.tfrecord import frame, frames

__all__ = ["SESSION_TAGS", "HParamsFile"]

# The name sorts before the other event files: TensorBoard's own reader goes through the files only once.
_NAME = "events.out.tfevents.000000000000.hparams"
_PLUGIN = "hparams"
_START_TAG = "_hparams_/session_start_info"
_END_TAG = "_hparams_/session_end_info"
SESSION_TAGS = frozenset({_START_TAG, _END_TAG, "_hparams_/experiment"})
"""The tags that the HPARAMS tab reads. Source: ``tensorboard/plugins/hparams/metadata.py`` 2.21."""

_EXACT = 2**53
_EMPTY = TensorProto(dtype=DT_FLOAT, tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=0)]))


class HParamsFile:
    """The file with a run's params. TensorBoard calls what it holds a session. Its methods raise OSError."""

    def __init__(self, folder: Path, info: RunInfo) -> None:
        """Read the params that the file holds already, if there is one.

        Args:
            folder: the run's folder.
            info: the run.

        Raises:
            OSError: the file system refuses.
        """
        self._path = folder / _NAME
        self._is_changed = False
        self._created = info.created
        self._start = SessionStartInfo(start_time_secs=info.created, group_name=_trial_name(info))
        if self._path.exists():
            content = self._path.read_bytes()
            for start, end in frames(content):
                for value in Event.FromString(content[start:end]).summary.value:
                    if value.tag == _START_TAG:
                        data = HParamsPluginData.FromString(value.metadata.plugin_data.content)
                        self._start = data.session_start_info

    def update(self, params: dict[str, Any]) -> None:
        """Add params, or change them. ``write`` stores them."""
        self._is_changed = True
        for name, value in params.items():
            slot = self._start.hparams[name]
            if isinstance(value, bool):
                slot.bool_value = value
            elif _is_number(value):
                slot.number_value = value
            else:
                slot.string_value = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def write(self) -> None:
        """Store the params, if there are new ones. The whole file is written, so call it once for many records.

        Raises:
            OSError: the file system refuses.
        """
        if self._is_changed:
            self._replace(self._start_event())
            self._is_changed = False

    def finish(self, status: RunStatus, time: float) -> None:
        """Store how the run ended. A run without params has no row in the HPARAMS tab, so nothing is stored for it.

        Raises:
            OSError: the file system refuses.
        """
        if self._start.hparams:
            end = SessionEndInfo(
                status=STATUS_SUCCESS if status is RunStatus.FINISHED else STATUS_FAILURE, end_time_secs=time
            )
            self._replace(self._start_event() + _event(_END_TAG, HParamsPluginData(session_end_info=end), time))

    def _start_event(self) -> bytes:
        return _event(_START_TAG, HParamsPluginData(session_start_info=self._start), self._created)

    def _replace(self, events: bytes) -> None:
        part = self._path.with_name(".hparams.part")  # TensorBoard does not take this name for an event file
        try:
            # A new file: in a shared folder, somebody else may have put a link in its place.
            part.unlink(missing_ok=True)
            with open(part, "xb", opener=open_file) as file:
                file.write(first_event(self._created) + events)
            part.replace(self._path)
        finally:
            part.unlink(missing_ok=True)


def _trial_name(info: RunInfo) -> str:
    """Return the name in the tab's first column. It shows about fifteen characters, so the site comes first.

    TensorBoard makes one row of all sessions of the same name, so each run needs its own name.
    """
    job = info.job.unique_name + (" at the client" if info.side is Side.CLIENT else "")
    return f"{info.site} ({job})"


def _is_number(value: object) -> bool:
    """Return whether a float64 holds this value exactly, and TensorBoard can send it to a browser as JSON."""
    if isinstance(value, int):
        return abs(value) <= _EXACT
    return isinstance(value, float) and math.isfinite(value)


def _event(tag: str, data: HParamsPluginData, time: float) -> bytes:
    plugin_data = SummaryMetadata.PluginData(plugin_name=_PLUGIN, content=data.SerializeToString())
    value = Summary.Value(tag=tag, tensor=_EMPTY, metadata=SummaryMetadata(plugin_data=plugin_data))
    return frame(Event(wall_time=time, summary=Summary(value=[value])).SerializeToString())
