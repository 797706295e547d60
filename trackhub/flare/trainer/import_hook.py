# SPDX-License-Identifier: Apache-2.0
"""Calls a function when Python has loaded a given module, before the importing code can use it.

``startup/sitecustomize.py`` runs this file, and `trackhub.flare.replace_log_functions` imports it. It imports no
module, since a trainer's process must be as it would be without tracking.
"""


class ImportHook:
    """Finds modules as Python does, and calls a function when one of them is loaded.

    It is put into ``sys.meta_path``.
    """

    def __init__(self, modules, loaded, meta_path):
        """Watch for some modules.

        Args:
            modules: the full names of the modules.
            loaded: called with each module once, in the thread that imports it. It must not raise.
            meta_path: ``sys.meta_path``.
        """
        self._modules = modules
        self._loaded = loaded
        self._meta_path = meta_path

    def find_spec(self, name, path=None, target=None):
        """Find a module. Python calls it for each import of a module that is not loaded yet.

        Args:
            name, path, target: as for the finders in ``sys.meta_path``.
        """
        if name not in self._modules:
            return None
        # Ask only the finders after this one. One of the earlier finders may be another hook: the two would ask each
        # other for ever.
        is_later = False
        for finder in list(self._meta_path):
            if finder is self:
                is_later = True
            elif is_later and hasattr(finder, "find_spec"):
                spec = finder.find_spec(name, path, target)
                if spec:
                    self._watch(spec.loader)
                    return spec
        return None

    def _watch(self, loader):
        """Change a loader, so that it calls the function after it has loaded its module."""
        load = getattr(loader, "exec_module", None)
        if load is None:
            return

        def load_and_call(module):
            load(module)
            self._loaded(module)

        try:
            loader.exec_module = load_and_call
        except AttributeError:
            pass  # a loader of another kind. The module stays as it is
