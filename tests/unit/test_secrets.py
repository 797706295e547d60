# SPDX-License-Identifier: Apache-2.0
"""Literal secrets in options are refused without being shown; references are resolved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trackhub.errors import ConfigError, InvalidOptionError
from trackhub.secrets import Secret, refuse_literal_secrets, refuse_references, resolve_secrets

# Assembled here, so that no scanner of the repository takes them for real ones.
HEX_40 = "0123456789abcdef" * 2 + "01234567"
GITHUB = "ghp" + "_" + "a1B2" * 9
AWS = "AKIA" + "ABCDEFGH" * 2
SLACK = "xoxb" + "-123456789012-abcdefghijkl"
JWT = ".".join(["eyJ" + "hbGciOiJIUzI1NiJ9", "eyJ" + "zdWIiOiIxIn0abc", "c2ln"])


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("wandb.api_key", "abc"),
        ("wandb.apiKey", "abc"),
        ("mlflow.tracking_password", "abc"),
        ("mlflow.token", 12345),
        ("x.client-secret", "abc"),
        ("x.settings", {"deep": [{"token": "abc"}]}),
        ("x.note", HEX_40),
        ("x.note", "local-" + HEX_40),
        ("x.note", f"use {GITHUB} here"),
        ("x.note", AWS),
        ("x.note", SLACK),
        ("x.note", JWT),
        ("x.note", "-----BEGIN RSA PRIVATE KEY-----"),
        ("mlflow.tracking_uri", "postgresql://user:pass@db/mlflow"),
        ("mlflow.tracking_uri", "https://host/path?access_token=abc"),
        ("mlflow.tracking_uri", "https://host/path?x=1&X-Amz-Signature=abc"),
        ("mlflow.tracking_uri", "https://host/path#client_secret=abc"),
        *(
            ("mlflow.tracking_uri", f"https://host/?x=1&{name}=abc")
            for name in ("access_key", "secret_key", "pwd", "passphrase", "credential", "accessToken", "auth", "jwt")
        ),
        ("x.tags", ["fine", GITHUB]),
    ],
)
def test_a_literal_secret_is_refused_and_not_shown(path: str, value: Any) -> None:
    with pytest.raises(InvalidOptionError) as caught:
        refuse_literal_secrets(path, value)

    message = str(caught.value)
    assert message.startswith(path)
    assert "${secret:NAME}" in message
    for secret in ("abc", "12345", HEX_40, GITHUB, AWS, SLACK, JWT, ":pass@"):
        assert secret not in message


@pytest.mark.parametrize(
    "value",
    [
        "https://hunter2@h",
        "https://me:hunter2@h/x",
        "https://${secret:A}@h",
        "postgresql://u:${secret:PG}@db/mlflow",
        "http://@h",
    ],
)
def test_a_url_with_a_login_is_refused_even_with_a_reference(value: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"x\.url: a URL must not hold a user or a password") as caught:
        refuse_literal_secrets("x.url", value)

    assert "hunter2" not in str(caught.value)


def test_an_option_that_is_shown_may_not_refer_to_a_secret() -> None:
    refuse_references("x.note", {"a": ["plain"]}, ["key"])
    for value in ("${secret:A}", "see ${secret:A}", {"a": ["${secret:file:/run/a}"]}):
        with pytest.raises(InvalidOptionError, match=r"x\.note: this option must not refer to a secret.*: key"):
            refuse_references("x.note", value, ["key"])


@pytest.mark.parametrize(
    "value",
    ["https://host/x?key=1", "https://host/x?tokens=1", "https://medium.org/@me", "see host and me@example.org"],
)
def test_an_ordinary_url_passes(value: str) -> None:
    refuse_literal_secrets("x.url", value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("wandb.api_key", "${secret:WANDB_API_KEY}"),
        ("wandb.api_key", "${secret:file:/run/secrets/wandb}"),
        ("wandb.api_key", None),
        ("wandb.api_key", ""),
        ("mlflow.tracking_uri", "http://127.0.0.1:5000"),
        ("x.max_tokens", "512"),
        ("x.token_file", "/run/token"),
        ("x.tokenizer", "bert"),
        ("x.commit", HEX_40),
        ("x.notes", "at 12:30 mail me@example.org"),
        ("x.flag", True),
    ],
)
def test_what_only_resembles_a_secret_passes(path: str, value: Any) -> None:
    refuse_literal_secrets(path, value)


@pytest.mark.parametrize("value", ["${secret:}", "${secret:A B}", "${secret:file:}", "x ${secret:A", "${secret:a-b}"])
def test_a_malformed_reference_is_refused(value: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"x\.key: a secret reference is malformed"):
        refuse_literal_secrets("x.key", value)
    with pytest.raises(InvalidOptionError, match="key: a secret reference is malformed"):
        resolve_secrets("x.key", value)


def test_references_are_resolved_wherever_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_text("from-file\n")
    options = {
        "whole": "${secret:A}",
        "part": "pg://u:${secret:A}@h/${secret:B}",
        "file": f"${{secret:file:{file}}}",
        "nested": {"list": ["${secret:B}", 3]},
        "plain": "text",
    }

    resolved = resolve_secrets("x", options, environ={"A": "one", "B": "two"})

    assert resolved == {
        "whole": "one",
        "part": "pg://u:one@h/two",
        "file": "from-file",
        "nested": {"list": ["two", 3]},
        "plain": "text",
    }
    assert options["whole"] == "${secret:A}"
    assert "one" not in repr(resolved)
    assert isinstance(resolved["whole"], Secret)
    assert not isinstance(resolved["plain"], Secret)


def test_a_missing_or_empty_secret_is_an_error_that_says_where_to_put_it(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.write_text("\n")

    with pytest.raises(ConfigError, match="key: the environment variable NOWHERE is not set where the backend runs"):
        resolve_secrets("x", {"key": "${secret:NOWHERE}"}, environ={"NOWHERE": ""})
    with pytest.raises(ConfigError, match=r"nested\.key: the secret file .* cannot be read"):
        resolve_secrets("x", {"nested": {"key": f"${{secret:file:{tmp_path / 'none'}}}"}}, environ={})
    with pytest.raises(ConfigError, match="is empty"):
        resolve_secrets("x", {"key": f"${{secret:file:{empty}}}"}, environ={})
    with pytest.raises(ConfigError, match="absolute path"):
        resolve_secrets("x", {"key": "${secret:file:relative}"}, environ={})
