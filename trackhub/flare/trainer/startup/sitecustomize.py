# SPDX-License-Identifier: Apache-2.0
"""Python runs this file when a trainer's process starts, before the script.

`trackhub.flare.source` puts this folder first in the trainer's ``PYTHONPATH``, and announces a spool. When the script
imports one of FLARE's modules for log calls, ``trackhub.flare.trainer.log_calls`` is called. This file imports nothing
that Python has not loaded by then, leaves no trace where nothing is announced, and runs the ``sitecustomize`` that
it hides. Any Python may run it, also an old one, so it has no annotations and no f-strings.
"""

import os
import sys

_FOLDER = os.path.dirname(__file__)
_MODULES = (
    "nvflare.client.cell.api",
    "nvflare.client.tracking",
    "nvflare.app_common.metrics_exchange.metrics_sender",
)


class _Finder:
    """Finds FLARE's modules as Python does, and has them changed once they are loaded."""

    def __init__(self, cell, spool):
        # Kept here, since a script may clear its environment.
        self._cell = cell
        self._spool = spool
        self._has_warned = False

    def find_spec(self, name, path=None, target=None):
        if name not in _MODULES:
            return None
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec:
                    self._watch(spec.loader)
                    return spec
        return None

    def _watch(self, loader):
        """Make a loader call ``_take`` after it has loaded its module."""
        load = getattr(loader, "exec_module", None)
        if load is None:
            return

        def load_and_take(module):
            load(module)
            self._take(module)

        try:
            loader.exec_module = load_and_take
        except AttributeError:
            pass  # a loader of another kind. FLARE's messages carry the records then

    def _take(self, module):
        try:
            import importlib.util  # FLARE has loaded it by now

            package = os.path.dirname(os.path.dirname(os.path.dirname(_FOLDER)))
            spec = importlib.util.find_spec("trackhub")
            found = os.path.dirname(spec.origin) if spec and spec.origin else "none"
            if os.path.realpath(found) != os.path.realpath(package):
                raise ImportError("expected the trackhub in " + package + ", found " + found)
            from trackhub.flare.trainer.log_calls import take_in_trainer

            take_in_trainer(module, self._cell, self._spool)
        except Exception as e:
            import logging

            if self._has_warned:
                return
            self._has_warned = True
            logging.getLogger("trackhub").warning(
                "trackhub cannot take FLARE's log calls in this process. FLARE's messages carry them, and what is lost "
                "on the way is not counted. The reason: %s: %s", type(e).__name__, e,
            )  # fmt: skip


def _prepare():
    cell, spool = os.environ.get("TRACKHUB_TAKE_OVER"), os.environ.get("TRACKHUB_SPOOL")
    if cell and spool and sys.version_info >= (3, 11):
        sys.meta_path.insert(0, _Finder(cell, spool))
    # The script then finds the path that it has without tracking. Its children get this folder from PYTHONPATH again.
    sys.path[:] = [entry for entry in sys.path if entry != _FOLDER]


try:
    _prepare()
except Exception:
    pass  # it must neither fail a trainer nor print where its output is parsed; FLARE's messages carry the records

if _FOLDER not in sys.path:
    # Where there is no other one, this raises the error that Python expects there, and Python goes on.
    sys.modules.pop("sitecustomize", None)
    import sitecustomize  # noqa: F401
