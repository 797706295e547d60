# SPDX-License-Identifier: Apache-2.0
"""What a backend's options mean, and their defaults. ``trackhub backends NAME`` shows it.

The meaning comes from the section ``Attributes:`` in the docstring of the plugin's options, so that nothing is written
twice.
"""

from __future__ import annotations

import inspect
import re

import msgspec

__all__ = ["option_help"]

_ENTRY = re.compile(r"(?P<names>\w+(?:, *\w+)*)(?: \([^)]*\))?: *(?P<text>.*)")
_CODE = re.compile(r"``(.+?)``|`(.+?)`")


def option_help(options: type[msgspec.Struct]) -> dict[str, dict[str, str | None]]:
    """Return ``default`` and ``meaning`` of each option, by name.

    ``default`` is None if the option must be given. ``meaning`` is empty if the docstring does not say it.

    Args:
        options: the backend's ``Options``.
    """
    meanings = _attributes(inspect.getdoc(options) or "")
    return {
        field.encode_name: {"default": _default(field), "meaning": meanings.get(field.name, "")}
        for field in msgspec.structs.fields(options)
    }


def _default(field: msgspec.structs.FieldInfo) -> str | None:
    if field.required:
        return None
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    return "not set" if value is None or value == "" else str(value)


def _attributes(doc: str) -> dict[str, str]:
    """Return the text of each attribute in a Google-style docstring, as plain text in one line."""
    section: list[str] = []
    inside = False
    for line in doc.splitlines():
        if line and not line[0].isspace():
            inside = line.strip() == "Attributes:"
        elif inside:
            section.append(line)
    entries: dict[str, str] = {}
    indent = len(section[0]) - len(section[0].lstrip()) if section else 0
    names: list[str] = []
    for line in section:
        starts = len(line) - len(line.lstrip()) == indent and _ENTRY.fullmatch(line.strip())
        if starts:
            names = [name.strip() for name in starts["names"].split(",")]
        text = starts["text"] if starts else line.strip()
        for name in names:
            entries[name] = _CODE.sub(lambda code: code[1] or code[2], f"{entries.get(name, '')} {text}".strip())
    return entries
