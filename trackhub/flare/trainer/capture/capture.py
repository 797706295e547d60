# SPDX-License-Identifier: Apache-2.0
"""Captures in one process the SDKs that a job names, and notes the use of other SDKs.

An import hook calls it with each module of an SDK that Python has loaded. It hands the module to `of_tensorboard`,
`of_wandb` or `of_mlflow`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Self

from trackhub.errors import ConfigError
from trackhub.flare.trainer.capture import of_mlflow, of_tensorboard, of_wandb
from trackhub.flare.trainer.capture.skip_backend_calls import keep_out_children
from trackhub.flare.trainer.capture.wrap_sdk_functions import CapturedCalls, Replacements
from trackhub.flare.trainer.note_other_loggers import note_logger
from trackhub.flare.trainer.process_writer import process_writer
from trackhub.spool.announce_spool import find_spool
from trackhub.writer.writer import Writer

__all__ = ["CAPTURE_ENV", "Capture", "CaptureSetting", "capture_in_trainer"]

CAPTURE_ENV = "TRACKHUB_CAPTURE"
"""Environment variable that tells trainers what to capture, as `CaptureSetting` writes it."""

_SDKS = {"tensorboard": of_tensorboard, "wandb": of_wandb, "mlflow": of_mlflow}
_SDK_OF = {module: name for name, sdk in _SDKS.items() for module in sdk.MODULES}
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CaptureSetting:
    """What to capture.

    Attributes:
        names: the SDKs: ``tensorboard``, ``wandb``, ``mlflow``.
        only: record the calls, and let the SDK do nothing.
    """

    names: tuple[str, ...] = ()
    only: bool = False

    @classmethod
    def of(cls, capture: Sequence[str] | None, capture_only: bool) -> Self:
        """Return what a job's configuration says.

        Args:
            capture: the SDKs; None or an empty list for none.
            capture_only: True if the SDKs themselves store nothing.

        Raises:
            ConfigError: an SDK is not known, or ``capture_only`` is set although no SDK is captured.
        """
        if isinstance(capture, str) or not isinstance(capture or (), Sequence):
            raise ConfigError(f"tracking: capture: expected a list of {', '.join(_SDKS)}, got {capture!r}")
        names = tuple(dict.fromkeys(capture or ()))
        for name in names:
            if name not in _SDKS:
                raise ConfigError(f"tracking: capture: cannot capture {name!r}; expected one of {', '.join(_SDKS)}")
        if not isinstance(capture_only, bool) or (capture_only and not names):
            raise ConfigError(
                f"tracking: capture_only: expected True or False, and True only with capture, got {capture_only!r}"
            )
        return cls(names, capture_only)

    @classmethod
    def read(cls, value: str) -> Self:
        """Return what ``CAPTURE_ENV`` says."""
        mode, _, names = value.partition(":")
        return cls(tuple(name for name in names.split(",") if name in _SDKS), mode == "only")

    def written(self) -> str:
        """Return the value of ``CAPTURE_ENV``."""
        return f"{'only' if self.only else 'beside'}:{','.join(self.names)}"


class Capture:
    """The capture of one process: gets the modules of SDKs as Python loads them, and replaces their log functions."""

    MODULES = tuple(_SDK_OF)
    """The modules that ``take`` can change."""

    def __init__(self, setting: CaptureSetting, spool: Path, writer: Writer, warn: Callable[[str], None]) -> None:
        """Prepare the capture. ``take`` does the work.

        Args:
            setting: what to capture. If the script uses another SDK, this is noted in the spool's folder.
            spool: the site's spool.
            writer: writes the records. This object does not close it.
            warn: called with the text of each warning.
        """
        self._setting = setting
        self._note = functools.partial(note_logger, spool)
        self._calls = CapturedCalls(writer, warn, only=setting.only)
        self._replaced = Replacements()
        if setting.names:
            keep_out_children(CAPTURE_ENV, self._replaced)

    def take(self, module: ModuleType) -> None:
        """Replace the log functions in a module of an SDK.

        Raises:
            Exception: the module is not as expected. The SDK is left as it was.
        """
        name = _SDK_OF[module.__name__]
        replaced, note = Replacements(), functools.partial(self._note, name)
        try:
            # The use of a captured SDK is noted, too: the report says if it was never used.
            _SDKS[name].watch(module, note, replaced)
            if name in self._setting.names:
                _SDKS[name].capture(module, self._calls, replaced)
        except Exception:
            replaced.undo()
            raise
        self._replaced.add(replaced)

    def undo(self) -> None:
        """Leave all SDKs as they were."""
        self._replaced.undo()


def capture_in_trainer(module: ModuleType, setting: str, spool: str) -> None:
    """Capture a module of an SDK in this process. Called when the trainer has imported it.

    Args:
        module: one of ``Capture.MODULES``.
        setting: the value of ``CAPTURE_ENV`` when this process started.
        spool: the value of ``SPOOL_ENV`` when this process started.

    Raises:
        ConfigError: the announced spool is not there, or does not belong to this site and job, or has ended.
        SpoolError: it cannot be read.
        PermissionError: this process may not write there.
    """
    _of_process(setting, spool).take(module)


@functools.cache
def _of_process(setting: str, spool: str) -> Capture:
    return Capture(CaptureSetting.read(setting), find_spool(spool), process_writer(spool), _log.warning)
