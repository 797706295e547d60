# SPDX-License-Identifier: Apache-2.0
"""Plain values into Structs, with an error message that names the path to the wrong value.

`config`, `limits` and `registry` call it for what comes from flags, TOML, JSON and the environment.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from trackhub.errors import ConfigError

__all__ = ["convert", "describe"]

_StructT = TypeVar("_StructT", bound=msgspec.Struct)


def convert(values: Mapping[str, Any], into: type[_StructT], root: str) -> _StructT:
    """Return the Struct that these values make. Strings are accepted for numbers and booleans.

    Args:
        values: field name to value.
        into: the Struct's class.
        root: the path to ``values``, for messages.

    Raises:
        ConfigError: a value is wrong. The message starts with the path to it.
    """
    try:
        return msgspec.convert(values, into, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(describe(error, root)) from None


def describe(error: msgspec.ValidationError, root: str) -> str:
    """Return msgspec's message with our path in front: ``wandb.tags[0]: expected `str`, got `int```."""
    message = str(error)
    what, found, path = message.rpartition(" - at `$")
    if not found:
        what, path = message, ""
    return f"{root}{path.rstrip('`')}: {what[:1].lower()}{what[1:]}"
