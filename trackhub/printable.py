# SPDX-License-Identifier: Apache-2.0
"""Escapes text from elsewhere before it goes to a terminal, a log or the text of a report. Only this module does that.

A site's name, a key or a backend's error may contain escape sequences, which a terminal obeys. A line break could
imitate a line of trackhub's own, and other characters reverse the direction of the text.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["printable", "printable_lines"]

_SUSPECT = re.compile("[^ -~]")


def printable(text: str) -> str:
    r"""Return the text in one line, with an escape such as ``\x1b`` for each character that a terminal could obey."""
    return _SUSPECT.sub(_escape, text)


def printable_lines(text: str) -> str:
    """Return the text as `printable` does, but keep its lines."""
    return "\n".join(map(printable, text.split("\n")))


def _escape(match: re.Match[str]) -> str:
    char = match[0]
    # Unicode's categories C* and the separators of lines and paragraphs. A letter, a mark or an emoji stays.
    if unicodedata.category(char) not in ("Zl", "Zp") and unicodedata.category(char)[0] != "C":
        return char
    return char.encode("unicode_escape").decode()
