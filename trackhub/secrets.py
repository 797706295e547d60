# SPDX-License-Identifier: Apache-2.0
"""Secrets in options: refuses literal secrets, and resolves references to secrets at the receiver.

`trackhub.registry` and `trackhub.operator_file` call it for a backend's options. `trackhub.context` and
`trackhub.flare.log_job_context` call it to hide the secrets of a command line and of a recipe's arguments. A job's
options travel through files, archives and other sites, so they may name a secret but never hold one::

    ${secret:WANDB_API_KEY}              an environment variable of the receiver's process
    ${secret:file:/run/secrets/wandb}    a file on the receiver's machine, without its trailing newline

Only an option that the backend marks as a secret may hold a reference. The reference must be the whole value. The
spelling is that of FLARE's own secret references.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from trackhub.conceal import remember_secret
from trackhub.errors import ConfigError, InvalidOptionError

__all__ = [
    "Secret",
    "is_secret_name",
    "may_name_secret",
    "references",
    "refuse_literal_secrets",
    "refuse_references",
    "remember_logins_in_urls",
    "require_reference",
    "resolve_secrets",
    "without_login",
    "without_secrets",
]

_REFERENCE = re.compile(r"\$\{secret:(?:file:(?P<file>[^{}\s\x00]+)|(?P<env>[A-Za-z_][A-Za-z0-9_]*))\}")
_MARKER = "${secret:"

# All patterns take time in proportion to the text, since an argument may have 128 KiB. So a pattern that begins with a
# run of characters begins only where the run begins, and a part that can fail only once is atomic: `(?>...)`, `++`.
#
# Only the end of a key decides: `api_token` holds a secret; `token_file` and `max_tokens` do not.
_SECRET_KEY = re.compile(
    r"(?:^|[_.-])(?:api_?key|access_?key|secret_?key|private_?key|auth_?key|secret|token|password|passwd|passphrase"
    r"|pwd|credentials?|authorization)$"
)
# A text that is only shown is judged more strictly: a value is hidden if its name may be that of a secret, such as
# `wandb_key`. Names of counts, such as `max_token`, are an exception.
_SECRET_WORD = re.compile(
    r"(?:.*(?:key|token|secret|password|passwd|passphrase|credential)s?|pass|pwd|pw|pat|auth|authorization|bearer|creds?"
    r"|login|cookie|jwt|otp|sas|(?:.*[_.-])?sig(?:nature)?)"
)
_COUNT_WORDS = {"max", "min", "n", "num", "number", "count", "total", "per"}
_WORD_END = re.compile(r"[_.-]+")
_INDEX_REVERSED = re.compile(r"\n?(?:\]\d+\[)+")
_CAMEL_HUMP = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
# A git commit has the shape of an old W&B key.
_COMMIT_KEY = re.compile(r"(?:^|[_.-])(?:commit|sha|sha1|revision|rev)$")
_HEX_KEY = re.compile(r"(?:local-)?[0-9a-f]{40}")
_SECRET_SHAPES = (
    ("a W&B API key", re.compile(r"\bwandb_v\d_[A-Za-z0-9_-]{20,}")),
    ("an AWS access key", re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a GitHub token", re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})")),
    ("a GitLab token", re.compile(r"\bglpat-[A-Za-z0-9_-]{20,}")),
    ("a Hugging Face token", re.compile(r"\bhf_[A-Za-z0-9]{30,}")),
    ("a Slack token", re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}|\bhooks\.slack\.com/services/\w+/\w+/\w+")),
    (
        "a JSON web token",
        re.compile(
            r"(?<![A-Za-z0-9_-])(?>[A-Za-z0-9_-]*?\beyJ)[A-Za-z0-9_-]{8,}+\.eyJ[A-Za-z0-9_-]{8,}+\.[A-Za-z0-9_-]*"
        ),
    ),
    ("a private key", re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----")),
)
# A parameter of a URL. A name that is secret as an option is secret here. Some names are secret only in a URL.
_URL_PARAMETER = re.compile(r"([?&;#])([\w.~-]+)=([^&;#\s]+)")
_SECRET_IN_URL = re.compile(r"(?:auth|jwt|(?:.*[_.-])?sig(?:nature)?)")
# A login in a URL is refused even if the password is a reference, since logs, reports and results show URLs. As for
# `urllib`, the login ends at the last "@" before the path: a password may hold an "@". As for SQLAlchemy, it may also
# hold "/", "?" and "#". Then what follows the first colon is not a port.
_URL_LOGIN = re.compile(r"""(?<![\w/.-])//(?:[^/?#\s]*|[^:/?#\s\[@]+:(?!\d*(?:[/?#\s"',;)]|\Z))(?:[^\s/]|/(?!/))*)@""")
_URL_START = re.compile(r"\s*(?:[A-Za-z][A-Za-z0-9+.-]*:)?//")
_LOGIN = re.compile(r"([^/?#]*|[^:/?#\[@]+:(?!\d*(?:[/?#]|\Z))[^@]*)@")
# user:password@host, without a scheme: from the first name with a colon to the last "@" of a word
_BARE_LOGIN = re.compile(r"(?<![^\s/])((?>[^\s/]*?(?<![\w/.-])[\w.-]++:))[^\s/]+@(?=[\w.-])")

# Parts of a longer text that may hold a secret: ``api_key=...``, ``"token": "..."``, ``--password ...``. All that is in
# quotes counts as the secret.
_ANY_REFERENCE = re.compile(r"\$\{secret:[^}\s]*\}?")
_QUOTED = r"""(?:Bearer|Basic|Token)\s+[^\s"']+|"[^"]*"|'[^']*'"""
_NAME = re.compile(r"""(?<![\w.-])([\w.-]++)["']?\s*(?:=|:(?!//))\s*""")
_VALUE = re.compile(rf"""{_QUOTED}|[^\s"',;&}}\])]+""", re.I)
_FLAG = re.compile(r"(?<![\w.-])(--?[A-Za-z][\w.-]*+)\s+")
_VALUE_OF_FLAG = re.compile(rf"{_QUOTED}|[^\s-]\S*", re.I)
_KEY_BLOCK = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*", re.S)
_HEX_WORD = re.compile(r"\b(?:local-)?[0-9a-f]{40}\b")
_NAME_BEFORE = re.compile(r"""[\w.-]*\Z""")
_NAME_CHARS = 20  # the end of a name that says whether it names a commit
_HIDDEN = "***"


class Secret(str):
    """A string that holds a resolved secret. Its ``repr`` does not show the secret.

    A log or a traceback shows the ``repr`` of a Struct of options, and with it the ``repr`` of each string.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


def is_secret_name(name: str) -> bool:
    """Return whether the name of an option, or the path to one, says that it holds a secret: ``wandb.api_key``."""
    return _SECRET_KEY.search(_key_of(name)) is not None


def may_name_secret(name: str) -> bool:
    """Return whether a value of this name should be hidden.

    That holds for each name that `is_secret_name` accepts, and for more, such as ``wandb_key`` and ``pass``.

    Args:
        name: the name of a flag, an argument or a variable, such as ``--wandb-key``.
    """
    *others, last = _WORD_END.split(_key_of(name))
    if is_secret_name(name.lstrip("-").replace("-", "_")):
        return True
    return _SECRET_WORD.fullmatch(last) is not None and _COUNT_WORDS.isdisjoint(others)


def refuse_literal_secrets(path: str, value: Any) -> None:
    """Check that nothing in this value, or nested in it, looks like a secret, and that its references are well formed.

    Args:
        path: the path to the value, for the message, such as ``wandb.api_key``. Its last part counts as the key.
        value: what was configured: plain strings, numbers, lists and mappings.

    Raises:
        InvalidOptionError: the check fails. The message names the path and never the value.
    """
    for where, leaf in _leaves(path, value):
        if isinstance(leaf, str) and _MARKER in _REFERENCE.sub("", leaf):
            raise InvalidOptionError(_malformed(where))
        if isinstance(leaf, str) and _URL_LOGIN.search(leaf):
            raise InvalidOptionError(
                f"{where}: a URL must not hold a user or a password, since URLs are shown in logs and reports. Set the "
                f"login in the environment of the process that runs the backend, or refer to it as ${{secret:NAME}} in "
                f"an option that the backend marks as a secret"
            )
        if (found := _looks_secret(where, leaf)) is not None:
            raise InvalidOptionError(_literal(where, found))


def without_secrets(text: str) -> str:
    """Return a text with ``***`` in place of all that looks like a secret, and of each reference to one.

    It recognises a secret by the name before it, such as ``--api-key`` or ``"token":``, or by its shape. It cannot
    recognise other secrets.
    """
    text = _KEY_BLOCK.sub(_HIDDEN, _ANY_REFERENCE.sub(_HIDDEN, text))
    text = _hide_named(_NAME, _VALUE, text)
    text = _hide_named(_FLAG, _VALUE_OF_FLAG, text)
    text = _URL_PARAMETER.sub(_hide_parameter, text)
    text = _URL_LOGIN.sub(f"//{_HIDDEN}@", text)
    text = _BARE_LOGIN.sub(rf"\1{_HIDDEN}@", text)
    text = _HEX_WORD.sub(_hide_hex, text)
    for _, shape in _SECRET_SHAPES:
        text = shape.sub(_HIDDEN, text)
    return text


def without_login(url: str) -> str:
    """Return a URL without its user and password."""
    return _split_login(url)[0]


def remember_logins_in_urls(environ: Mapping[str, str], names: Iterable[str]) -> None:
    """From now on, conceal the passwords in the URLs of these variables and of the proxy variables.

    Args:
        environ: the environment.
        names: the variables that may hold a URL. The proxy variables need not be among them.
    """
    proxies = (name for name in environ if name.lower().endswith("_proxy"))
    for name in (*names, *proxies):
        _, password = _split_login(environ.get(name, ""))
        remember_secret(password)
        remember_secret(unquote(password))


def _split_login(url: str) -> tuple[str, str]:
    """Return a URL without its login, and the password in it.

    If the URL has a user but no password, the user counts as a token and is returned in place of the password.
    """
    # Not `urlsplit`: it raises for a password with a bracket, and ends one with a slash there.
    start = begin.end() if (begin := _URL_START.match(url)) is not None else 0
    if (match := _LOGIN.match(url, start)) is None:
        return url, ""
    user, colon, password = match[1].partition(":")
    return url[:start] + url[match.end() :], password if colon else user


def _hide_named(name: re.Pattern[str], value: re.Pattern[str], text: str) -> str:
    """Hide each value whose name may be one of a secret. A value may itself be a name and a value.

    Args:
        name: matches a name with what parts it from its value. Its first group is the name.
        value: matches a value. It is tried only behind the name of a secret: texts may hold many names in one value,
            and each value would be read once for each of them.
        text: the text.
    """
    parts, place = [], 0
    while (match := name.search(text, place)) is not None:
        parts.append(text[place : match.end()])
        place = match.end()
        if may_name_secret(match[1]) and (found := value.match(text, place)) is not None:
            parts.append(_HIDDEN)
            place = found.end()
    return "".join([*parts, text[place:]])


def _hide_parameter(match: re.Match[str]) -> str:
    return f"{match[1]}{match[2]}={_HIDDEN}" if may_name_secret(match[2]) else match[0]


def _is_secret_parameter(name: str) -> bool:
    return is_secret_name(name) or _SECRET_IN_URL.fullmatch(_key_of(name)) is not None


def _hide_hex(match: re.Match[str]) -> str:
    text, end = match.string, match.start()
    while end and (text[end - 1] in "=:\"'" or text[end - 1].isspace()):
        end -= 1
    name = _NAME_BEFORE.search(text, max(0, end - _NAME_CHARS), end)
    return match[0] if name is not None and _COMMIT_KEY.search(_key_of(name[0])) else _HIDDEN


def refuse_references(path: str, value: Any, secret_options: Iterable[str]) -> None:
    """Check that an option that is not marked as a secret contains no secret reference.

    Args:
        path: the path to the value, for the message, such as ``mlflow.note``.
        value: what was configured.
        secret_options: the backend's options that may refer to a secret, for the message.

    Raises:
        InvalidOptionError: it has a reference.
    """
    if any(references(value)):
        allowed = ", ".join(sorted(secret_options)) or "none; the backend takes its login from the environment"
        raise InvalidOptionError(
            f"{path}: this option must not refer to a secret, since its value is stored and shown. Options of this "
            f"backend that may: {allowed}"
        )


def require_reference(path: str, value: Any) -> None:
    """Check that the value of an option that is marked as a secret is a reference or empty.

    Args:
        path: the path to the value, for the message, such as ``wandb.api_key``.
        value: what was configured.

    Raises:
        InvalidOptionError: it is a literal. The message names the path and never the value.
    """
    if value and not (isinstance(value, str) and _REFERENCE.fullmatch(value)):
        raise InvalidOptionError(_literal(path, "a secret"))


def references(value: Any) -> Iterator[str]:
    """Yield what the secret references in a value refer to: ``NAME``, or ``file:/path``.

    Args:
        value: what was configured: plain strings, numbers, lists and mappings.
    """
    for _, leaf in _leaves("", value):
        if isinstance(leaf, str):
            for match in _REFERENCE.finditer(leaf):
                yield match["env"] or f"file:{match['file']}"


def resolve_secrets(path: str, value: Any, *, environ: Mapping[str, str] | None = None) -> Any:
    """Return a copy of an option's value in which every secret reference is replaced by what it refers to.

    Call it at the receiver, just before the options are handed to the backend. Do not store or log the result.

    Args:
        path: the path to the value, for messages, such as ``wandb.api_key``.
        value: a string, a number, or lists and mappings of these. It is not changed.
        environ: where to look up variables; None for this process's environment.

    Raises:
        ConfigError: a reference is malformed, or its variable or file is missing or empty.
    """
    return _resolve(path, value, os.environ if environ is None else environ)


def _resolve(path: str, value: Any, environ: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _resolve(f"{path}.{key}", item, environ) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_resolve(f"{path}[{index}]", item, environ) for index, item in enumerate(value)]
    if not isinstance(value, str) or _MARKER not in value:
        return value
    if _MARKER in _REFERENCE.sub("", value):
        raise InvalidOptionError(_malformed(path))
    return Secret(_REFERENCE.sub(lambda match: _look_up(path, match, environ), value))


def _look_up(path: str, match: re.Match[str], environ: Mapping[str, str]) -> str:
    if (name := match["env"]) is not None:
        if secret := environ.get(name, ""):
            remember_secret(secret)
            return secret
        raise ConfigError(
            f"{path}: the environment variable {name} is not set where the backend runs. Set it before the process "
            f"starts, or remove the option"
        )
    file = Path(match["file"])
    if not file.is_absolute():
        raise ConfigError(f"{path}: {match[0]} needs an absolute path, as in ${{secret:file:/run/secrets/wandb}}")
    try:
        secret = file.read_text(encoding="utf-8").rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(f"{path}: the secret file {file} cannot be read where the backend runs: {reason}") from None
    if not secret:
        raise ConfigError(f"{path}: the secret file {file} is empty; write the secret into it")
    remember_secret(secret)
    return secret


def _literal(path: str, found: str) -> str:
    return (
        f"{path}: {found} must not be written into a job or its command line. Set it in the environment of the process "
        f"that runs the backend and refer to it as ${{secret:NAME}}, or as ${{secret:file:/path}} if it is in a file "
        f"there"
    )


def _malformed(path: str) -> str:
    return (
        f"{path}: a secret reference is malformed; expected ${{secret:NAME}} with the name of an environment variable, "
        f"or ${{secret:file:/path}} with a path without spaces or braces"
    )


def _leaves(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}", item)
    elif isinstance(value, list | tuple | set | frozenset):
        for index, item in enumerate(value):
            yield from _leaves(f"{path}[{index}]", item)
    else:
        yield path, value


def _key_of(path: str) -> str:
    if (index := _INDEX_REVERSED.match(path[::-1])) is not None:
        path = path[: -index.end()]
    return _CAMEL_HUMP.sub("_", path).lower()


def _looks_secret(path: str, value: Any) -> str | None:
    """Return what kind of secret the value looks like, or None."""
    if value is None or isinstance(value, bool):
        return None
    text = _REFERENCE.sub("", str(value))
    if is_secret_name(path) and text.strip():
        return "a secret"
    if _HEX_KEY.fullmatch(text) and not _COMMIT_KEY.search(_key_of(path)):
        return "what looks like a W&B API key"
    for what, shape in _SECRET_SHAPES:
        if shape.search(text):
            return f"what looks like {what}"
    if any(_is_secret_parameter(match[2]) for match in _URL_PARAMETER.finditer(text)):
        return "what looks like a URL with a key"
    return None
