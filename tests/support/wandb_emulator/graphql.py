# SPDX-License-Identifier: Apache-2.0
"""A small GraphQL engine for the emulator: one operation, fragments, arguments, variables, ``@include``.

A type is a plain dict from field name to value; a field with arguments is a `Call`. A field that the dict does not
have, and an argument that the `Call` does not take, raise `GraphQLError`. The emulator then fails the test; it does not
guess what a real server would answer.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "GraphQLError", "Operation", "parse"]

_TOKEN = re.compile(r'[\s,]+|#[^\n]*|(\.\.\.|[!$():=@\[\]{}|]|[A-Za-z_]\w*|-?\d+(?:\.\d+)?|"(?:[^"\\]|\\.)*")')


class GraphQLError(Exception):
    """The document cannot be parsed, or asks for something that the schema does not have."""


@dataclass(frozen=True)
class Call:
    """A field that takes arguments.

    Attributes:
        run: returns the field's value; called with the arguments of the document.
        takes: the names of all arguments that the field has.
    """

    run: Callable[[dict[str, Any]], Any]
    takes: frozenset[str] = frozenset()


@dataclass
class _Field:
    name: str
    alias: str
    arguments: dict[str, Any]
    include: Any
    selections: list[Any]


@dataclass
class _Spread:
    name: str


@dataclass(frozen=True)
class _Variable:
    name: str


@dataclass
class Operation:
    """A parsed document.

    Attributes:
        kind: ``query`` or ``mutation``.
        name: the operation's name.
    """

    kind: str
    name: str
    _selections: list[Any]
    _fragments: dict[str, list[Any]]
    _defaults: dict[str, Any] = field(default_factory=dict)

    def execute(self, root: Mapping[str, Any], variables: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``data`` of the answer.

        Raises:
            GraphQLError: a field, an argument or a variable is unknown.
        """
        if unknown := set(variables) - set(self._defaults):
            raise GraphQLError(f"{self.name}: variables {sorted(unknown)} are not declared")
        return self._select(root, self._selections, {**self._defaults, **variables}, self.name)

    def _select(
        self, value: Mapping[str, Any], selections: list[Any], variables: dict[str, Any], at: str
    ) -> dict[str, Any]:
        answer: dict[str, Any] = {}
        for selection in selections:
            if isinstance(selection, _Spread):
                if selection.name not in self._fragments:
                    raise GraphQLError(f"{at}: fragment {selection.name} is not defined")
                answer.update(self._select(value, self._fragments[selection.name], variables, at))
                continue
            if not _resolve(selection.include, variables):
                continue
            where = f"{at}.{selection.name}"
            if selection.name not in value:
                raise GraphQLError(f"{where}: no such field")
            held = value[selection.name]
            arguments = _resolve(selection.arguments, variables)
            if isinstance(held, Call):
                if extra := set(arguments) - held.takes:
                    raise GraphQLError(f"{where}: no such arguments {sorted(extra)}")
                held = held.run(arguments)
            elif arguments:
                raise GraphQLError(f"{where}: takes no arguments")
            answer[selection.alias] = self._descend(held, selection.selections, variables, where)
        return answer

    def _descend(self, value: Any, selections: list[Any], variables: dict[str, Any], at: str) -> Any:
        if value is None:
            return None
        if isinstance(value, list) and selections:
            return [self._descend(item, selections, variables, at) for item in value]
        if isinstance(value, Mapping) != bool(selections):
            raise GraphQLError(f"{at}: selects fields of a scalar, or none of an object")
        return self._select(value, selections, variables, at) if selections else value


def _resolve(value: Any, variables: Mapping[str, Any]) -> Any:
    if isinstance(value, _Variable):
        if value.name not in variables:
            raise GraphQLError(f"variable ${value.name} is not declared")
        return variables[value.name]
    if isinstance(value, dict):
        return {key: _resolve(item, variables) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, variables) for item in value]
    return value


def parse(document: str) -> Operation:
    """Parse a document and return its operation.

    Raises:
        GraphQLError: the document is malformed, or has no operation or more than one.
    """
    parser = _Parser(document)
    operations: list[Operation] = []
    fragments: dict[str, list[Any]] = {}
    while parser.peek() is not None:
        kind = parser.take()
        if kind == "fragment":
            name = parser.take()
            parser.expect("on")
            parser.take()
            fragments[name] = parser.selections()
        elif kind in ("query", "mutation"):
            name = parser.take()
            defaults = parser.variable_definitions()
            operations.append(Operation(kind, name, parser.selections(), fragments, defaults))
        else:
            raise GraphQLError(f"expected an operation or a fragment, got {kind!r}")
    if len(operations) != 1:
        raise GraphQLError(f"expected one operation, got {len(operations)}")
    return operations[0]


class _Parser:
    def __init__(self, document: str) -> None:
        self._tokens: list[str] = []
        at = 0
        while at < len(document):
            match = _TOKEN.match(document, at)
            if match is None:
                raise GraphQLError(f"unexpected character {document[at]!r}")
            if match[1]:
                self._tokens.append(match[1])
            at = match.end()
        self._at = 0

    def peek(self) -> str | None:
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise GraphQLError("the document ends too early")
        self._at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self._at += 1
        return True

    def expect(self, token: str) -> None:
        if not self.accept(token):
            raise GraphQLError(f"expected {token!r}, got {self.peek()!r}")

    def variable_definitions(self) -> dict[str, Any]:
        defaults: dict[str, Any] = {}
        if self.accept("("):
            while not self.accept(")"):
                self.expect("$")
                name = self.take()
                self.expect(":")
                self._type()
                defaults[name] = self._value() if self.accept("=") else None
        return defaults

    def selections(self) -> list[Any]:
        self.expect("{")
        found: list[Any] = []
        while not self.accept("}"):
            found.append(_Spread(self.take()) if self.accept("...") else self._field())
        return found

    def _field(self) -> _Field:
        alias = name = self.take()
        if self.accept(":"):
            name = self.take()
        arguments = self._arguments() if self.peek() == "(" else {}
        include: Any = True
        if self.accept("@"):
            self.expect("include")
            include = self._arguments()["if"]
        return _Field(name, alias, arguments, include, self.selections() if self.peek() == "{" else [])

    def _arguments(self) -> dict[str, Any]:
        self.expect("(")
        found: dict[str, Any] = {}
        while not self.accept(")"):
            name = self.take()
            self.expect(":")
            found[name] = self._value()
        return found

    def _type(self) -> None:
        if self.accept("["):
            self._type()
            self.expect("]")
        else:
            self.take()
        self.accept("!")

    def _value(self) -> Any:
        token = self.take()
        if token == "$":
            return _Variable(self.take())
        if token == "[":
            items = []
            while not self.accept("]"):
                items.append(self._value())
            return items
        if token == "{":
            fields: dict[str, Any] = {}
            while not self.accept("}"):
                name = self.take()
                self.expect(":")
                fields[name] = self._value()
            return fields
        if token[0] == '"':
            return token[1:-1]
        if token in ("true", "false", "null"):
            return {"true": True, "false": False, "null": None}[token]
        return float(token) if re.fullmatch(r"-?\d+(\.\d+)?", token) else token
