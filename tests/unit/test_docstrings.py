# SPDX-License-Identifier: Apache-2.0
"""Docstrings: three arguments or more are described, errors are named, and names in backticks exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted([*ROOT.glob("trackhub/**/*.py"), *ROOT.glob("backends/*/src/**/*.py"), *ROOT.glob("jobs/*/*.py")])
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef
LITERAL, NAME = re.compile(r"``.*?``", re.DOTALL), re.compile(r"`([A-Za-z_][\w.]*)`")
NOT_OURS = {"nvflare.apis"}
NAME_FIELDS = {
    ast.FunctionDef: ("name",),
    ast.ClassDef: ("name",),
    ast.Name: ("id",),
    ast.arg: ("arg",),
    ast.Attribute: ("attr",),
    ast.alias: ("name", "asname"),
}
# The docstring of a command is its help, and click shows the arguments. pytest calls tests and fixtures.
FRAMEWORKS = ("click", "fixture", "overload")


def public_functions(body: list[ast.stmt], class_doc: str = "") -> Iterator[tuple[FUNCTIONS, str]]:
    """Yield each public function with its docstring. A constructor also has the docstring of its class."""
    for node in body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            doc = ast.get_docstring(node) or ""
            if "It implements `" not in doc:  # the docstrings of the protocol say it
                yield from public_functions(node.body, doc)
        elif isinstance(node, FUNCTIONS) and is_ours(node):
            is_constructor = node.name in ("__init__", "__post_init__")
            yield node, (ast.get_docstring(node) or "") + (class_doc if is_constructor else "")


def is_ours(node: FUNCTIONS) -> bool:
    is_public = not node.name.startswith("_") or node.name in ("__init__", "__post_init__")
    is_called_by_framework = node.name.startswith("test_") or any(
        word in ast.unparse(decorator) for decorator in node.decorator_list for word in FRAMEWORKS
    )
    return is_public and not is_called_by_framework


def parameters(node: FUNCTIONS) -> list[str]:
    given = node.args
    found = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [one.arg for one in found if one.arg not in ("self", "cls")]


def raised(nodes: list[ast.AST], caught: frozenset[str] = frozenset()) -> Iterator[str]:
    """Yield the names of the errors that these statements raise and do not catch."""
    for node in nodes:
        if isinstance(node, FUNCTIONS | ast.ClassDef | ast.Lambda):
            continue
        if isinstance(node, ast.Raise) and node.exc is not None:
            error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            name = ast.unparse(error)
            if name[0].isupper() and name != "NotImplementedError" and not caught & {name, "Exception"}:
                yield name
        if isinstance(node, ast.Try):
            here = {
                name.id for each in node.handlers for name in ast.walk(each.type or node) if isinstance(name, ast.Name)
            }
            yield from raised(list(node.body), caught | here)
            yield from raised([*node.handlers, *node.orelse, *node.finalbody], caught)
        else:
            yield from raised(list(ast.iter_child_nodes(node)), caught)


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    """Return each source file's syntax tree."""
    return {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


@pytest.fixture(scope="module")
def functions(trees: dict[Path, ast.Module]) -> list[tuple[str, FUNCTIONS, str]]:
    """Return each public function: where it is, what it is, and its docstring."""
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", node, doc)
        for path, tree in trees.items()
        for node, doc in public_functions(tree.body)
    ]


def test_a_function_with_three_arguments_describes_them(functions: list[tuple[str, FUNCTIONS, str]]) -> None:
    assert len(functions) > 1000

    assert [where for where, node, doc in functions if len(parameters(node)) >= 3 and "Args:" not in doc] == []


def test_a_function_that_raises_says_so(functions: list[tuple[str, FUNCTIONS, str]]) -> None:
    assert [
        f"{where}: {', '.join(sorted(errors))}"
        for where, node, doc in functions
        if (errors := set(raised(list(node.body)))) and "Raises:" not in doc
    ] == []


def test_the_names_in_docstrings_exist(trees: dict[Path, ast.Module]) -> None:
    """A name that is no longer anywhere in the code was left behind by a change."""
    known = {part for path in trees for part in (*path.relative_to(ROOT).parts, path.stem)}
    named: list[tuple[Path, str]] = []
    for path, tree in trees.items():
        for node in ast.walk(tree):
            known.update(getattr(node, field, None) or "" for field in NAME_FIELDS.get(type(node), ()))
            if (
                isinstance(node, ast.Expr)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                named += [(path, name) for name in NAME.findall(LITERAL.sub("", node.value.value))]

    assert len(named) > 500
    assert [
        f"{path.relative_to(ROOT)}: `{name}`"
        for path, name in named
        if name not in NOT_OURS and not set(name.split(".")) <= known
    ] == []
