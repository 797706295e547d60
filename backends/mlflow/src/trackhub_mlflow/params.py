# SPDX-License-Identifier: Apache-2.0
"""Params and tags as MLflow has them: flat, strings, of limited length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trackhub_mlflow.naming import component, digest, entity_name

__all__ = ["MAX_PARAM_CHARS", "MAX_TAG_CHARS", "ParamNames", "flatten", "pointer"]

MAX_PARAM_CHARS = 6000
MAX_TAG_CHARS = 8000
"""Longest values; MLflow cuts longer ones off. Source: ``mlflow.utils.validation``, mlflow 3.17."""

_SHOWN_CHARS = 200

Path = tuple[str, ...]


def flatten(key: str, value: Any) -> Iterator[tuple[Path, str]]:
    """Yield each leaf of a param's value with its path, as text. A dict branches, unless it is empty.

    The text is what ``mlflow.log_param`` stores: ``str`` of the value.
    """
    if not isinstance(value, dict) or not value:
        yield (key,), str(value)
        return
    for name, inner in value.items():
        for path, text in flatten(component(str(name)), inner):
            yield (key, *path), text


def pointer(text: str, path: str) -> str:
    """Return what stands in place of a value that is too long, which lies in an artifact."""
    return f"{text[:_SHOWN_CHARS]}… ({len(text)} characters, whole in artifact {path})"


class ParamNames:
    """Gives each leaf its name: the parts of its path, joined with dots.

    ``{"a.b": 1, "a": {"b": 2}}`` has two leaves that would be named ``a.b``. The one that comes second in its run gets
    a name of its own.
    """

    def __init__(self, stored: Mapping[str, str]) -> None:
        """Begin with the params that the run has; whose they are is not known any more."""
        self._stored = dict(stored)
        self._owners: dict[str, Path] = {}

    def place(self, path: Path, value_under: Callable[[str], str]) -> tuple[str, str]:
        """Return the name and the value under which this leaf is stored.

        Args:
            value_under: the value to store, given the name: a long value is a reference that holds it.
        """
        plain = entity_name(".".join(path))
        value = value_under(plain)
        if self._belongs(plain, path, value):
            return plain, value
        own = entity_name(f"{plain}_{digest(chr(0).join(path))}")
        return own, value_under(own)

    def _belongs(self, name: str, path: Path, value: str) -> bool:
        owner = self._owners.get(name)
        if owner is None and self._stored.get(name, value) == value:
            owner = self._owners[name] = path
        return owner == path
