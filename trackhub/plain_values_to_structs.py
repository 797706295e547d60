# SPDX-License-Identifier: Apache-2.0
"""Converts plain values into Structs. An error message names the path to the wrong value.

The modules that take values from flags, TOML, JSON or the environment call `convert`, such as `trackhub.config`. The
modules whose Structs are decoded in several threads call `prepare`.
"""

from __future__ import annotations

import enum
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from trackhub.errors import ConfigError

__all__ = ["convert", "describe", "one_at_a_time", "prepare"]

_StructT = TypeVar("_StructT", bound=msgspec.Struct)

one_at_a_time = threading.RLock()
"""Hold this lock while a value is converted into a class that `prepare` did not get, such as a plugin's options."""


def prepare(*classes: type) -> None:
    """Let msgspec learn these Structs now, at import. Call it in the module that defines what threads decode.

    msgspec learns a class when it first decodes it. If two threads do that at the same moment, one may use what the
    other has only partly learnt. Then the process dies by SIGSEGV (msgspec 0.22). Only one thread imports a module.

    Args:
        classes: Structs. Those in their fields are learnt as well.
    """
    for cls in classes:
        msgspec.msgpack.Decoder(cls)


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
        with one_at_a_time:  # FLARE's simulator starts its clients in threads
            return msgspec.convert(values, into, strict=False)
    except msgspec.ValidationError as error:
        if isinstance(error.__cause__, ConfigError):
            raise error.__cause__ from None
        raise ConfigError(describe(error, root, into)) from None


def describe(error: msgspec.ValidationError, root: str, into: type[msgspec.Struct]) -> str:
    """Return msgspec's message with our path in front: ``wandb.tags[0]: expected `str`, got `int```.

    If a value is not one of a field's fixed choices, the message lists them: ``wandb.mode: 'onlin' is not one of
    online, offline``.

    Args:
        error: what msgspec raised.
        root: the path to the values, for the message.
        into: the Struct that the values were to make.
    """
    message = str(error)
    what, found, path = message.rpartition(" - at `$")
    if not found:
        what, path = message, ""
    path = path.rstrip("`")
    _, wrong, value = what.partition("nvalid enum value ")
    field = path.removeprefix(".").partition(".")[0].partition("[")[0]
    if wrong and (choices := [str(choice) for choice in _choices(get_type_hints(into).get(field))]):
        what = f"{value} is not one of {', '.join(choices)}"
    return f"{root}{path}: {what[:1].lower()}{what[1:]}"


def _choices(hint: Any) -> Iterator[Any]:
    """Yield the values that a type lists one by one."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif isinstance(hint, type) and issubclass(hint, enum.Enum):
        yield from (member.value for member in hint)
    else:
        for part in get_args(hint):
            yield from _choices(part)
