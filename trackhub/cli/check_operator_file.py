# SPDX-License-Identifier: Apache-2.0
"""``trackhub backends --check --workspace DIR``: validates the file of a site's operator.

It reads the file by `trackhub.operator_file`, as the receiver does, and asks `trackhub.registry` for the plugins that
are installed here.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from trackhub import registry
from trackhub.cli.output import print_lines, print_table
from trackhub.errors import ConfigError, PluginError, TrackhubError
from trackhub.operator_file import FILE_NAME, BackendRules, OperatorFile, named_hosts, read_operator_file
from trackhub.policy import Policy

__all__ = ["check_operator_file"]


def check_operator_file(workspace: Path) -> None:
    """Check the operator's file in a site's workspace, and show what jobs may do there.

    Args:
        workspace: the FLARE site's workspace, with the folders ``startup`` and ``local``.

    Raises:
        ConfigError: there is no such workspace, or something in the file is wrong. The message has all problems.
    """
    local = workspace / "local"
    if not local.is_dir():
        raise ConfigError(
            f"{workspace} is not the workspace of a FLARE site: it has no folder 'local'; give --workspace DIR"
        )
    operator = read_operator_file(local)
    with contextlib.redirect_stdout(sys.stderr):  # what a plugin prints must not become part of the table
        problems, rows = list(_problems(operator)), list(_rows(operator))
    if problems:
        raise ConfigError("\n".join(f"{local / FILE_NAME}: {problem}" for problem in problems))
    if (local / FILE_NAME).exists():
        print_lines(f"{local / FILE_NAME} is valid.")
    else:
        print_lines(f"There is no {local / FILE_NAME}. The strictest rules hold.")
    print_lines(
        f"state_dir: {operator.state_dir or 'the run folder of each job'}",
        f"keep_days: {'delivered records stay' if operator.keep_days is None else f'{operator.keep_days:g}'}",
        f"limits: {', '.join(f'{name} = {value}' for name, value in operator.limits.items()) or 'those of the job'}",
        f"take_over: {operator.take_over or 'the job decides'}",
        f"forbid_kinds: {', '.join(operator.forbid_kinds) or 'none'}",
        f"policy: {_policy(operator)}",
        "What a job may reach, with the environment of this shell:",
    )
    print_table(["backend", "hosts", "folders outside the job's", "secrets", "fixed"], rows)


def _policy(operator: OperatorFile) -> str:
    rules = {} if operator.policy is None else operator.policy.plain()
    shown = (f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in rules.items())
    return ", ".join(shown) or "that of the job"


def _problems(operator: OperatorFile) -> Iterator[str]:
    yield from _contradictions_of_policy(operator)
    for name in dict.fromkeys([*(operator.backends_allowed or ()), *operator.backends]):
        if operator.backends_allowed is not None and name not in operator.backends_allowed:
            yield f"backends.{name}: {name!r} is not in backends_allowed, so this table has no effect"
        try:
            marks = registry.option_marks(registry.load(name))
            rules = operator.backends.get(name, BackendRules())
            registry.check_options(name, rules.fixed)
        except TrackhubError as error:
            yield str(error)
            continue
        for table, keys in (("options", rules.options or ()), ("values", rules.values)):
            for key in keys:
                if key not in marks:
                    yield f"backends.{name}.{table}: {key!r} is not an option; there are: {', '.join(sorted(marks))}"
        yield from _contradictions_of_backend(name, rules)


def _contradictions_of_policy(operator: OperatorFile) -> Iterator[str]:
    """Yield what one rule for records allows and another one forbids. The strictest rule decides when a job runs."""
    policy = operator.policy or Policy()
    for text in policy.allow or ():
        kind = text.partition(":")[0]
        if text in policy.deny:
            yield f"policy: {text!r} is in allow and in deny, and deny decides; remove it from one of them"
        elif "*" in policy.deny or "*:*" in policy.deny:
            yield f"policy.allow: {text!r} has no effect, since deny has a pattern that matches every key"
        elif ":" in text and kind in operator.forbid_kinds:
            yield f"policy.allow: {text!r} has no effect, since forbid_kinds has {kind!r}"


def _contradictions_of_backend(name: str, rules: BackendRules) -> Iterator[str]:
    """Yield what one rule for a backend's options allows and another one forbids or replaces."""
    where = f"backends.{name}"
    for key, patterns in rules.values.items():
        if rules.options is not None and key not in rules.options:
            yield f"{where}.values: {key!r} is not in {where}.options, so no job may give it; add it there"
        if not patterns:
            yield f"{where}.values: {key!r} has no pattern, so every value is refused; give one, or leave {key} out"
    for key in rules.fixed:
        if key in rules.values or key in (rules.options or ()):
            table = "values" if key in rules.values else "options"
            yield f"{where}.fixed: {key!r} is also in {where}.{table}, but the fixed value is used; remove it there"


def _rows(operator: OperatorFile) -> Iterator[list[str]]:
    for entry in registry.available():
        if entry.state == "ok" and (operator.backends_allowed is None or entry.name in operator.backends_allowed):
            rules = operator.backends.get(entry.name, BackendRules())
            try:
                credentials = registry.load(entry.name).credentials
            except PluginError:
                continue  # no job can use it, and `trackhub backends` says why
            secrets = [*rules.secrets, *credentials.variables]
            columns = (named_hosts(rules, credentials, os.environ), rules.paths, secrets, rules.fixed)
            yield [entry.name, *(" ".join(column) or "-" for column in columns)]
