# SPDX-License-Identifier: Apache-2.0
"""``trackhub new-backend``: write the distribution of a new backend, which works and passes the contract kit at once.

The files come from the templates in ``templates/new_backend``.
"""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from string import Template

import click

from trackhub import registry
from trackhub.cli.output import print_lines
from trackhub.errors import ConfigError
from trackhub.runnable_commands import command_for

__all__ = ["new_backend", "write_backend"]

CONTRACT = 1
"""Version of the contract kit that the new backend passes. The kit's own constant cannot be imported without pytest."""

_NAME = re.compile(r"[a-z][a-z0-9]*(?:[-_][a-z0-9]+)*")
_FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "src/{module}/__init__.py": "__init__.py.in",
    "src/{module}/backend.py": "backend.py.in",
    "src/{module}/contract.py": "contract.py.in",
    "src/{module}/py.typed": "",
    "tests/test_contract.py": "test_contract.py.in",
}


@click.command()
@click.argument("name")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
def new_backend(name: str, folder: Path | None) -> None:
    """Write a new backend that passes the contract kit.

    It is a complete distribution, which pip installs beside trackhub. NAME is what jobs call it by. DIR is where to
    write it, by default flare-trackhub-NAME. It stores runs in files. Replace this part with your own store.
    """
    target = Path(f"flare-trackhub-{name}") if folder is None else folder
    for path in write_backend(name, target):
        print_lines(f"wrote {path}")
    print_lines(
        "",
        f"{command_for('pip install -e', f'{target}[test]')}   # installs it beside trackhub",
        f"{command_for('trackhub check', name)} --quick     # it passes; run it again after each change",
    )


def write_backend(name: str, folder: Path) -> list[Path]:
    """Write the distribution and return its files.

    Args:
        name: the backend's name.
        folder: where to write it. It must be empty, or not exist yet.

    Raises:
        ConfigError: the name cannot be a backend's, or the folder cannot be used.
    """
    if _NAME.fullmatch(name) is None or len(name) > 64 or name in registry.RESERVED:
        raise ConfigError(
            f"{name!r} cannot be a backend's name; expected at most 64 characters, which are words of a-z and 0-9 "
            f"joined by - or _, start with a letter, and are not one of: {', '.join(sorted(registry.RESERVED))}"
        )
    words = re.split("[-_]", name)
    values = {
        "name": name,
        "module": "trackhub_" + "_".join(words),
        "cls": "".join(word.capitalize() for word in words),
        "distribution": "flare-trackhub-" + "-".join(words),
        "contract": str(CONTRACT),
    }
    templates = resources.files("trackhub.cli") / "templates" / "new_backend"
    written = []
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ConfigError(f"the folder {folder} is not empty; give one that is, or that does not exist yet")
        for path, template in _FILES.items():
            target = folder / path.format_map(values)
            target.parent.mkdir(parents=True, exist_ok=True)
            text = (templates / template).read_text(encoding="utf-8") if template else ""
            target.write_text(Template(text).substitute(values), encoding="utf-8")
            written.append(target)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error}; give another folder") from error
    return written
