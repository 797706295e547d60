# SPDX-License-Identifier: Apache-2.0
"""Finds the files in which FLARE's persistor has saved the global model. Written for nvflare 2.9.

`trackhub.flare.records_made_by_trackhub` asks for the best or the last model at the end of a job, on the server.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model_persistor import ModelPersistor

from trackhub.flare import flare_internals

__all__ = ["FoundModel", "find_model"]

_MAX_FILES = 1000
# The attributes in which FLARE's persistors keep the paths of the models that they save.
_PATHS = {
    "best": ("_best_ckpt_save_path",),
    "last": ("_ckpt_save_path", "_model_save_path", "save_path"),
}
_BEST = "best"


class FoundModel(NamedTuple):
    """Where the model is.

    Attributes:
        files: each file of the model, and the key of its artifact. A model may be a folder.
        problem: why there is no model; empty if there is one.
    """

    files: list[tuple[Path, str]]
    problem: str = ""


def find_model(which: Literal["best", "last"], fl_ctx: FLContext) -> FoundModel:
    """Return the files of a job's global model. Call it on the server, after all workflows."""
    components = flare_internals.components(fl_ctx.get_engine()).values()
    persistors = [component for component in components if isinstance(component, ModelPersistor)]
    if not persistors:
        return FoundModel([], "the job has no persistor, so FLARE saves no model through one")
    for persistor in persistors:
        for path in _paths(persistor, which, fl_ctx):
            if path.exists():
                return FoundModel(list(_files(path)))
    names = ", ".join(type(persistor).__name__ for persistor in persistors)
    why = f"{names} has saved no {which} model"
    if which == _BEST:
        why += ". FLARE keeps one if the sites report the recipe's key_metric, and with some persistors only"
    return FoundModel([], why)


def _paths(persistor: Any, which: str, fl_ctx: FLContext) -> Iterator[Path]:
    for attribute in _PATHS[which]:
        if isinstance(value := getattr(persistor, attribute, None), str) and value:
            yield Path(value)
    if which == "last" and isinstance(name := getattr(persistor, "model_name", None), str):
        root = Path(fl_ctx.get_workspace().get_result_root(fl_ctx.get_job_id()))  # as NPModelPersistor saves
        yield root / str(getattr(persistor, "model_dir", "")) / name
    # Any persistor, also one of the user's, may list its models. The list may include models that the job began with.
    for name, model in (persistor.get_model_inventory(fl_ctx) or {}).items():
        is_input = "source" in (getattr(model, "props", None) or {})
        if not is_input and str(name).startswith(_BEST) is (which == _BEST):
            yield Path(str(model.location))


def _files(path: Path) -> Iterator[tuple[Path, str]]:
    if path.is_file():
        yield path, f"model/{path.name}"
        return
    for file in sorted(path.rglob("*"))[:_MAX_FILES]:
        if file.is_file() and not file.is_symlink():
            yield file, f"model/{path.name}/{file.relative_to(path)}"
