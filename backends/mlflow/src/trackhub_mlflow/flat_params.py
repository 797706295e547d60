# SPDX-License-Identifier: Apache-2.0
"""Params and tags as MLflow holds them: flat, as text, with values of limited length.

`MLflowRun` flattens every param with ``flatten`` and asks its `ParamNames` for the name of each leaf.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trackhub_mlflow.naming import cut_name, digest, escape_name

__all__ = ["MAX_PARAM_CHARS", "MAX_TAG_CHARS", "ParamNames", "flatten", "pointer", "stored_text"]

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
"""The longest values. MLflow would cut off longer ones. Source: ``mlflow.utils.validation``, mlflow 3.17."""

_SHOWN_CHARS = 200

_REFUSED = {0: "\u2400"}
"""The characters that some databases behind MLflow refuse, and what is stored in their place.

PostgreSQL refuses a NUL in any text. MLflow's server then answers HTTP 500 each time. U+2400 is the symbol for NUL.
"""

LeafPath = tuple[str, ...]


def flatten(key: str, value: Any) -> Iterator[tuple[LeafPath, str]]:
    """Yield each leaf of a param's value: its path, and its text as ``mlflow.log_param`` would store it.

    Each entry of a dict has its own leaves. An empty dict is a leaf.

    Args:
        key: the param's key, or an inner key as `escape_name` returns it.
        value: the param's value.
    """
    if not isinstance(value, dict) or not value:
        yield (key,), stored_text(str(value))
        return
    for name, inner in value.items():
        for path, text in flatten(escape_name(str(name)), inner):
            yield (key, *path), text


def stored_text(text: str) -> str:
    """Return a text as every database behind MLflow can hold it."""
    return text.translate(_REFUSED)


def pointer(text: str, path: str) -> str:
    """Return what replaces a value that is too long: its beginning, and the path of the artifact with all of it."""
    return f"{text[:_SHOWN_CHARS]}… ({len(text)} characters, whole in artifact {path})"


class ParamNames:
    """Names the leaves of one run's params: the parts of a leaf's path, joined by dots.

    ``{"a.b": 1, "a": {"b": 2}}`` has two leaves that would both be named ``a.b``. The second one in its run gets a name
    that ends in a hash.
    """

    def __init__(self, stored: Mapping[str, str]) -> None:
        """Start with the params that the run has already.

        Args:
            stored: name -> value. The paths of these params are not known. A leaf with the same name and value counts
                as the stored param.
        """
        self._stored = dict(stored)
        self._owners: dict[str, LeafPath] = {}

    def place(self, path: LeafPath, value_under: Callable[[str], str]) -> tuple[str, str]:
        """Return the name and the value under which this leaf is stored.

        Args:
            path: the leaf's path.
            value_under: returns the value to store for a name. For a long value, it returns a pointer, which holds the
                name.
        """
        plain = cut_name(".".join(path))
        value = value_under(plain)
        if self._belongs(plain, path, value):
            return plain, value
        own = cut_name(f"{plain}_{digest(chr(0).join(path))}")
        return own, value_under(own)

    def _belongs(self, name: str, path: LeafPath, value: str) -> bool:
        owner = self._owners.get(name)
        if owner is None and self._stored.get(name, value) == value:
            owner = self._owners[name] = path
        return owner == path
