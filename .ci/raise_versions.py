# SPDX-License-Identifier: Apache-2.0
"""Raises the version of the core and of every backend in one step, and what the backends require of the core.

`make versions TO=0.2.0` calls it. It changes the files below and nothing else.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_VERSION = re.compile(r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?")
_PLACES = (
    re.compile(r'(?m)^((?:__)?version(?:__)? = ")[^"]+(?=")'),
    re.compile(r'("flare-trackhub>=)[^",]+(?=")'),
)


def files(root: Path) -> list[Path]:
    """Return each file that states a version: that of the package or of a project."""
    backends = sorted(root.glob("backends/*/pyproject.toml"))
    return [root / "trackhub" / "__init__.py", root / "pyproject.toml", *backends]


def raise_versions(root: Path, version: str) -> None:
    """Write the version into all files of this checkout.

    Args:
        root: the checkout's folder.
        version: the new version, such as ``0.2.0`` or ``0.2.0rc1``.

    Raises:
        ValueError: it is no version, or a file states none.
    """
    if not _VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is no version; expected one such as 0.2.0 or 0.2.0rc1")
    changed: dict[Path, str] = {}
    for path in files(root):
        text = path.read_text(encoding="utf-8")
        if not _PLACES[0].search(text):
            raise ValueError(f'{path}: there is no line `version = "..."`, so nothing was changed')
        for place in _PLACES:
            text = place.sub(rf"\g<1>{version}", text)
        changed[path] = text
    for path, text in changed.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    try:
        raise_versions(ROOT, *sys.argv[1:])
    except (TypeError, ValueError) as error:
        sys.exit(f"make versions TO=VERSION: {error}")
