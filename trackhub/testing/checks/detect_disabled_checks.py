# SPDX-License-Identifier: Apache-2.0
"""Detect removed checks and misspelt methods, which would otherwise do nothing and look like a pass.

The checks of `trackhub.testing.contract` call it with the contract class and with the classes of the plugin.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from trackhub.spi import Backend, BackendRun
from trackhub.testing.contract_hooks import ContractHooks

__all__ = ["contract_problems", "misspelt_methods"]

_HOOKS = frozenset(name for name in (*vars(ContractHooks), *ContractHooks.__annotations__) if name[0] != "_")
_FIXTURE_TYPES = frozenset({"FixtureFunctionDefinition"})
_SIMILARITY = 0.75


def contract_problems(cls: type, contract: type) -> Iterator[str]:
    """Yield what is wrong with a contract class: checks that it removes or replaces, and names that are not hooks.

    Args:
        cls: the author's class.
        contract: the kit's class, from which it derives.
    """
    for name in sorted(set(dir(contract)) - _HOOKS):
        if name.startswith("__") or name == "pytestmark":
            continue
        # `getattr` would make a new object of a fixture at each lookup.
        theirs, ours = inspect.getattr_static(cls, name, None), inspect.getattr_static(contract, name)
        if theirs is ours:
            continue
        if not callable(theirs):
            yield f"{name} is removed. If the backend cannot pass it, mark it with @pytest.mark.xfail(reason=...)"
        elif not name.startswith("test_"):
            yield f"{name} belongs to the kit and is replaced. Give yours another name"
        elif not _says_why(theirs):
            yield (
                f"{name} is overridden without @pytest.mark.xfail(reason=...). Say why the backend cannot pass it, or "
                "remove the override"
            )
    yield from _unknown_names(cls, contract)


def _unknown_names(cls: type, contract: type) -> Iterator[str]:
    known = _HOOKS | set(dir(contract))
    for base in cls.__mro__:
        if base is contract or issubclass(contract, base):
            continue
        for name, value in vars(base).items():
            if name[0] == "_" or name in known or name.startswith("test_") or name == "pytestmark":
                continue
            if type(value).__name__ in _FIXTURE_TYPES:
                continue
            near = difflib.get_close_matches(name, _HOOKS, n=1)
            hint = f"Did you mean {near[0]}?" if near else "Begin a helper's name with an underscore"
            yield f"{name} is not a hook of the contract. {hint}"


def misspelt_methods(classes: Iterable[type], base: type[Backend[Any]] | type[BackendRun]) -> Iterator[str]:
    """Yield public methods whose names are nearly those of the SPI. Nothing would ever call them.

    Args:
        classes: classes of the plugin.
        base: the class of the SPI that they derive from.
    """
    known = {name for name in dir(base) if name[0] != "_"}
    for cls in classes:
        for owner in cls.__mro__:
            if owner is base or issubclass(base, owner):
                continue
            for name, value in vars(owner).items():
                if name in known or not callable(value):
                    continue
                near = difflib.get_close_matches(name.strip("_"), known, n=1, cutoff=_SIMILARITY)
                if near and name[:2] != "__":
                    yield f"nothing calls {owner.__name__}.{name}. Did you mean {near[0]}?"


def _says_why(test: object) -> bool:
    """Return True if a test is marked as failing, with a reason, but still runs."""
    return any(
        mark.name == "xfail" and mark.kwargs.get("reason") and mark.kwargs.get("run", True)
        for mark in getattr(test, "pytestmark", [])
    )
