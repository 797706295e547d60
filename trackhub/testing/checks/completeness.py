# SPDX-License-Identifier: Apache-2.0
"""What keeps a contract class whole, and a misspelt method from doing nothing."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from typing import Any

from trackhub.spi import Backend, BackendRun
from trackhub.testing.author import ContractHooks

__all__ = ["contract_problems", "misspelt_methods"]

_HOOKS = frozenset(name for name in (*vars(ContractHooks), *ContractHooks.__annotations__) if name[0] != "_")
_FIXTURE_TYPES = frozenset({"FixtureFunctionDefinition"})
_NEAR = 0.75


def contract_problems(cls: type, contract: type) -> Iterator[str]:
    """Yield what an author's class must not do to the contract: remove, replace or misname a part of it.

    Args:
        cls: the author's class.
        contract: the kit's class, from which it is derived.
    """
    for name in sorted(set(dir(contract)) - _HOOKS):
        if name.startswith("__") or name == "pytestmark":
            continue
        # Static, since looking up a fixture makes a new object every time.
        theirs, ours = inspect.getattr_static(cls, name, None), inspect.getattr_static(contract, name)
        if theirs is ours:
            continue
        if not callable(theirs):
            yield f"{name} is removed; mark it with @pytest.mark.xfail(reason=…) if the backend cannot pass it"
        elif not name.startswith("test_"):
            yield f"{name} belongs to the kit and is replaced; call yours something else"
        elif not _says_why(theirs):
            yield f"{name} is overridden without @pytest.mark.xfail(reason=…), which says why the backend cannot pass"
    known = _HOOKS | set(dir(contract))
    for base in cls.__mro__:
        if base is contract or issubclass(contract, base):
            continue
        for name, value in vars(base).items():
            if name[0] == "_" or name in known or name.startswith("test_") or name in ("pytestmark",):
                continue
            if type(value).__name__ in _FIXTURE_TYPES:
                continue
            near = difflib.get_close_matches(name, _HOOKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else "; begin a helper's name with an underscore"
            yield f"{name} is no hook of the contract{hint}"


def misspelt_methods(classes: Iterable[type], base: type[Backend[Any]] | type[BackendRun]) -> Iterator[str]:
    """Yield public methods that are almost those of the SPI: nobody would ever call them.

    Args:
        classes: of the plugin, each derived from ``base``.
    """
    known = {name for name in dir(base) if name[0] != "_"}
    for cls in classes:
        for owner in cls.__mro__:
            if owner is base or issubclass(base, owner):
                continue
            for name, value in vars(owner).items():
                if name in known or not callable(value):
                    continue
                near = difflib.get_close_matches(name.strip("_"), known, n=1, cutoff=_NEAR)
                if near and name[:2] != "__":
                    yield f"{owner.__name__}.{name} is not called by anything; did you mean {near[0]}?"


def _says_why(test: object) -> bool:
    """Return whether a test is marked as failing, with a reason, and does run."""
    return any(
        mark.name == "xfail" and mark.kwargs.get("reason") and mark.kwargs.get("run", True)
        for mark in getattr(test, "pytestmark", [])
    )
