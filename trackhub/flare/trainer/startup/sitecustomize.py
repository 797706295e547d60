# SPDX-License-Identifier: Apache-2.0
"""Python runs this file when a trainer's process starts, before the script.

`trackhub.flare.replace_log_functions` puts this folder first in the trainer's ``PYTHONPATH``, and announces a spool.
When the script imports a module of FLARE that logs, or one of an SDK, this file calls ``trackhub.flare.trainer``. It
imports only modules that Python has loaded by then. Without an announced spool, it changes nothing. It hides another
``sitecustomize``, so it runs that one as well. An old Python may run this file, so it has no annotations and no
f-strings.
"""

import os
import sys

_FOLDER = os.path.dirname(__file__)
_FLARE_MODULES = (
    "nvflare.client.cell.api",
    "nvflare.client.tracking",
    "nvflare.app_common.metrics_exchange.metrics_sender",
)
_SDK_MODULES = (
    "torch.utils.tensorboard.writer",
    "tensorboardX.writer",
    "wandb.sdk.wandb_init",
    "wandb.sdk.wandb_run",
    "wandb.sdk.lib.noop_run",
    "wandb.sdk.wandb_config",
    "wandb.sdk.wandb_summary",
    "wandb.sdk.lib.disabled",
    "mlflow.tracking.fluent",
    "mlflow.tracking.client",
)  # as Capture.MODULES, which cannot be imported here


class _LogCallHooks:
    """Changes modules that log once they are loaded, so that trackhub takes their log calls."""

    def __init__(self, cell, capture, spool):
        # The values are kept here, since a script may clear its environment.
        self._cell = cell
        self._capture = capture
        self._spool = spool
        self._has_warned = False

    def take(self, module):
        try:
            import importlib.util  # whoever imports such a module has loaded it by now

            package = os.path.dirname(os.path.dirname(os.path.dirname(_FOLDER)))
            spec = importlib.util.find_spec("trackhub")
            found = os.path.dirname(spec.origin) if spec and spec.origin else "none"
            if os.path.realpath(found) != os.path.realpath(package):
                raise ImportError("expected the trackhub in " + package + ", found " + found)
            if module.__name__ in _FLARE_MODULES:
                from trackhub.flare.trainer.record_flare_log_calls import take_in_trainer

                take_in_trainer(module, self._cell, self._spool)
            else:
                from trackhub.flare.trainer.capture import capture_in_trainer

                capture_in_trainer(module, self._capture, self._spool)
        except Exception as e:
            self._warn(module, e)

    def _warn(self, module, error):
        import logging

        if self._has_warned:
            return
        self._has_warned = True
        what = "take FLARE's log calls in this process. FLARE's messages carry them, and what is lost on the way"
        if module.__name__ not in _FLARE_MODULES:
            what = "capture calls of " + module.__name__.split(".")[0] + " in this process. What they log"
        logging.getLogger("trackhub").warning(
            "trackhub cannot %s is not counted. The reason: %s: %s", what, type(error).__name__, error
        )


def _prepare():
    spool = os.environ.get("TRACKHUB_SPOOL")
    cell, capture = os.environ.get("TRACKHUB_TAKE_OVER"), os.environ.get("TRACKHUB_CAPTURE")
    modules = (_FLARE_MODULES if cell else ()) + (_SDK_MODULES if capture else ())
    if modules and spool and sys.version_info >= (3, 11):
        # Run the file instead of importing it, so that no further module is loaded.
        names = {}
        with open(os.path.join(os.path.dirname(_FOLDER), "import_hook.py"), encoding="utf-8") as file:
            exec(compile(file.read(), file.name, "exec"), names)
        hook = names.get("ImportHook")
        sys.meta_path.insert(0, hook(modules, _LogCallHooks(cell, capture, spool).take, sys.meta_path))
    # Take this folder out again, so that the script's path is the same as without tracking. Its child processes get
    # the folder from PYTHONPATH.
    sys.path[:] = [entry for entry in sys.path if entry != _FOLDER]


try:
    _prepare()
except Exception:
    # The trainer must go on, and its output may be parsed, so nothing is printed. FLARE's messages carry the records.
    sys.path[:] = [entry for entry in sys.path if entry != _FOLDER]

if _FOLDER not in sys.path:
    # If there is no other sitecustomize, this raises the error that Python expects, and Python goes on.
    sys.modules.pop("sitecustomize", None)
    import sitecustomize  # noqa: F401
