# SPDX-License-Identifier: Apache-2.0
"""Finds the files in which FLARE's persistor has saved the global model. Written for nvflare 2.9.

`trackhub.flare.records_made_by_trackhub` asks for the best or the last model at the end of a job, on the server. The
job's configuration says where a persistor saves. So on a provisioned server, this module takes only files in the job's
own folders. Otherwise a job could copy any file of the server into its results.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from nvflare.apis.fl_context import FLContext
from nvflare.app_common.abstract.model_persistor import ModelPersistor

from trackhub.flare import flare_internals
from trackhub.open_without_links import open_plain_inside

__all__ = ["FoundModel", "ModelFile", "find_model"]

_MAX_FILES = 1000
"""The most files of a model. A model with more files is not logged, since a part of a model is of no use."""

# The attributes in which FLARE's persistors keep the paths of the models that they save.
_PATHS = {
    "best": ("_best_ckpt_save_path",),
    "last": ("_ckpt_save_path", "_model_save_path", "save_path"),
}
_BEST = "best"


class ModelFile(NamedTuple):
    """One file of the model.

    Attributes:
        path: the file, without symbolic links.
        key: the key of its artifact.
        folder: the folder in which the file must be when it is opened.
    """

    path: Path
    key: str
    folder: Path

    def open(self) -> BinaryIO:
        """Open the file for reading. Follow no link, even if somebody has replaced a part of the path meanwhile.

        Raises:
            OSError: it cannot be opened, or it is no ordinary file in the folder any more.
        """
        return os.fdopen(open_plain_inside(self.folder, self.path), "rb")


class FoundModel(NamedTuple):
    """Where the model is.

    Attributes:
        files: the files of the model. A model may be a folder.
        problem: why there is no model; empty if there is one.
    """

    files: list[ModelFile]
    problem: str = ""


def find_model(which: Literal["best", "last"], fl_ctx: FLContext) -> FoundModel:
    """Return the files of a job's global model. Call it on the server, after all workflows."""
    components = flare_internals.components(fl_ctx.get_engine()).values()
    persistors = [component for component in components if isinstance(component, ModelPersistor)]
    if not persistors:
        return FoundModel([], "the job has no persistor, so FLARE saves no model through one")
    own = _own_folders(fl_ctx)
    for persistor in persistors:
        for path in _paths(persistor, which, fl_ctx):
            real = Path(os.path.realpath(path))
            if (folder := _folder_of(real, own)) is None:
                what = f"{type(persistor).__name__} names {str(path)!r}, which is outside the job's folder"
                return FoundModel([], f"{what}. Let it save the model in the run folder, as persistors do by default")
            if real.exists():
                files = _files(path.name, real, folder)
                if 0 < len(files) <= _MAX_FILES:
                    return FoundModel(files)
                number = f"more than {_MAX_FILES:,} files" if files else "no file"
                return FoundModel(
                    [], f"{real} has {number}. Let the persistor save a model of 1 to {_MAX_FILES:,} files"
                )
    names = ", ".join(type(persistor).__name__ for persistor in persistors)
    why = f"{names} has saved no {which} model"
    if which == _BEST:
        why += ". FLARE keeps one only if the sites report the recipe's key_metric, and only with some persistors"
    return FoundModel([], why)


def _own_folders(fl_ctx: FLContext) -> list[Path] | None:
    """Return the folders in which a model must be. None in the simulator, where the submitter is the operator."""
    if not flare_internals.is_provisioned(fl_ctx):
        return None
    return [Path(os.path.realpath(folder)) for folder in (flare_internals.run_dir(fl_ctx), _result_root(fl_ctx))]


def _result_root(fl_ctx: FLContext) -> Path:
    """Return where FLARE wants a job's results: its run folder, unless the operator's environment names another."""
    return Path(fl_ctx.get_engine().get_workspace().get_result_root(fl_ctx.get_job_id()))


def _folder_of(real: Path, own: list[Path] | None) -> Path | None:
    """Return the folder that a model must not leave; None if the model is not below one of the job's own folders."""
    if own is None:
        return real.parent
    return next((folder for folder in own if folder in real.parents), None)


def _paths(persistor: Any, which: str, fl_ctx: FLContext) -> Iterator[Path]:
    for attribute in _PATHS[which]:
        if isinstance(value := getattr(persistor, attribute, None), str) and value:
            yield Path(value)
    if which == "last" and isinstance(name := getattr(persistor, "model_name", None), str):
        yield _result_root(fl_ctx) / str(getattr(persistor, "model_dir", "")) / name  # as NPModelPersistor saves
    # Any persistor, also one of the user's, may list its models. The list may include models that the job began with.
    for name, model in (persistor.get_model_inventory(fl_ctx) or {}).items():
        is_input = "source" in (getattr(model, "props", None) or {})
        if not is_input and str(name).startswith(_BEST) is (which == _BEST):
            yield Path(str(model.location))


def _files(name: str, real: Path, folder: Path) -> list[ModelFile]:
    """Return the files of a model, or one more than `_MAX_FILES` if it has more."""
    if real.is_file():
        return [ModelFile(real, f"model/{name}", folder)]
    inside = (file for file in real.rglob("*") if file.is_file() and not file.is_symlink())
    found = sorted(islice(inside, _MAX_FILES + 1))
    return [ModelFile(file, f"model/{name}/{file.relative_to(real)}", folder) for file in found]
