# SPDX-License-Identifier: Apache-2.0
"""The contract of ``wandb`` in the mode offline: it reads the ``.wandb`` files with `offline_readback`.

``trackhub check wandb`` and this package's tests run it. Online, W&B is a server that no check may use, so the tests
run the same contract against an emulator of it.
"""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trackhub.testing import (
    ArtifactItem,
    BackendContract,
    HistogramItem,
    ImageItem,
    Point,
    ReadBack,
    RunInfo,
    RunStatus,
    StoreContext,
    TableItem,
    TextItem,
)
from trackhub_wandb.backend import WandBBackend
from trackhub_wandb.offline_readback import read_log

__all__ = ["WandBContract", "add_row"]

_OWN = {"step", "round"}
_TEXT = re.compile(r"<pre[^>]*>(.*)</pre>", re.DOTALL)


class WandBContract(BackendContract):
    """The contract that `WandBBackend` passes when it writes files for ``wandb sync``."""

    backend = WandBBackend
    name = "wandb"
    secret_env = ("WANDB_API_KEY",)

    def options(self, tmp_path: Path) -> Mapping[str, Any]:
        """Return the options of a receiver in the mode offline."""
        return {"mode": "offline"}

    def read_back(self, run: RunInfo, context: StoreContext) -> ReadBack:
        """Read the run's folder. There must be exactly one."""
        (path,) = context.workdir.glob(f"offline-run-*-{run.run_id}/run-{run.run_id}.wandb")
        log = read_log(path)
        found = ReadBack(points=[], params={}, tags={}, texts=[], images=[], histograms=[], tables=[], artifacts=[])
        entry = log.config.pop("trackhub")
        found.params, found.tags = log.config, entry.get("tags", {})
        # The SDK's summary also has the last value of each key of the history.
        found.summary = {key: log.summary[key] for key in entry.get("summary", {})}
        for row in log.rows:
            add_row(found, row, lambda name: (log.folder / "files" / name).read_bytes())
        for artifact in log.artifacts:
            if artifact.kind != "run_table":
                ((filename, local_path),) = artifact.files.items()
                about, content = artifact.metadata, (context.workdir.parent / local_path).read_bytes()
                found.artifacts = [
                    *(found.artifacts or ()),
                    ArtifactItem(about["key"], content, filename, artifact.kind, about.get("step"), about["time"]),
                ]
        if log.exit_code is not None:
            found.status = {0: "finished", 254: "crashed"}.get(log.exit_code, "failed")
        return found

    def canonical_params(self, params: Mapping[str, Any]) -> Mapping[str, Any]:
        """A config is plain JSON, kept as a tree of its leaves.

        A value that refers to an artifact becomes JSON text.
        """
        return {key: self._param(value) for key, value in params.items()}

    def _param(self, value: Any) -> Any:
        if isinstance(value, float) and not math.isfinite(value):
            return str(value).replace("inf", "Infinity").replace("nan", "NaN")
        if isinstance(value, str) and value.startswith("wandb-artifact://"):
            return json.dumps(value)
        if isinstance(value, dict):
            return {key: self._param(item) for key, item in value.items()} or "{}"
        return [self._param(item) for item in value] if isinstance(value, list) else value

    def canonical_status(self, status: RunStatus) -> str:
        """W&B tells a run's state by its exit code: 0 is finished, 254 crashed, and others are failed."""
        return {RunStatus.FINISHED: "finished", RunStatus.KILLED: "crashed"}.get(status, "failed")


def add_row(found: ReadBack, row: dict[str, Any], file: Callable[[str], bytes]) -> None:
    """Add what one row of a history holds.

    Args:
        found: where to add it.
        row: key to value, media as dicts.
        file: returns the bytes of a file of the run.

    Raises:
        ValueError: the row holds media of a kind that this backend does not write.
    """
    step, time = row.get("step"), row["_timestamp"]
    for key, value in row.items():
        if key.startswith("_") or key in _OWN:
            continue
        kind = value.get("_type") if isinstance(value, dict) else None
        if kind is None:
            found.points.append(Point(key, step, float(value), time))
        elif kind == "histogram":
            edges, counts = ([float(x) for x in value[name]] for name in ("bins", "values"))
            found.histograms = [*(found.histograms or ()), HistogramItem(key, step, edges, counts, time)]
        elif kind == "image-file":
            image = ImageItem(key, step, file(value["path"]), value.get("caption", ""), time)
            found.images = [*(found.images or ()), image]
        elif kind == "html-file":
            text = _TEXT.search(file(value["path"]).decode())
            assert text is not None
            found.texts = [*(found.texts or ()), TextItem(key, step, html.unescape(text[1]), time)]
        elif kind == "table-file":
            table = json.loads(file(value["path"]))
            found.tables = [*(found.tables or ()), TableItem(key, step, table["columns"], table["data"], time)]
        else:
            raise ValueError(
                f"the row of step {step} holds a {kind!r} under {key!r}, which this backend does not write"
            )
