# SPDX-License-Identifier: Apache-2.0
"""The options of the MLflow backend, and what a tracking URI means.

The core builds `MLflowOptions` when a job is written, and again at the receiver. The backend and its stores read it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import unquote, urlsplit, urlunsplit

import msgspec

from trackhub.spi import OptionMark

__all__ = ["MLflowOptions", "server_url", "shown_uri", "sqlite_path"]

_ANSWER = "leave tracking_uri out for a store in the job's folder, or give sqlite:///FILE or http(s)://HOST:PORT"

_REFUSED = {
    "": f"is a plain path, which MLflow 3 refuses as a store; {_ANSWER}",
    "file": f"is a file store, which MLflow 3 refuses to use; {_ANSWER}",
    "databricks": f"is a Databricks workspace, which this backend does not support; {_ANSWER}",
}

_TagValue = Annotated[str, msgspec.Meta(max_length=8000)]


class MLflowOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where and how runs are written. The receiver's ``MLFLOW_TRACKING_*`` variables hold the login of a server.

    Attributes:
        tracking_uri: a server, ``http(s)://HOST:PORT``, or an SQLite store, ``sqlite:///FILE``, whose artifacts lie in
            the folder ``mlartifacts`` beside it. Left out: the store ``mlflow.db`` in the job's ``mlflow`` folder.
        experiment_name: the MLflow experiment that holds the runs. It is created if there is none.
        run_tags: tags that every run gets, beside those that are logged.
        note: a description in Markdown, shown on the page of every run. Left out: the job's notes.
        timeout_s: longest time in seconds that one request waits for the server. The lane tries again later.
    """

    tracking_uri: Annotated[str, OptionMark.HOST, OptionMark.PATH] = ""
    experiment_name: Annotated[str, msgspec.Meta(min_length=1, max_length=500), OptionMark.SHARED] = "trackhub"
    run_tags: dict[Annotated[str, msgspec.Meta(min_length=1, max_length=250)], _TagValue] = {}
    note: _TagValue = ""
    timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 10.0

    def __post_init__(self) -> None:
        """Check the tracking URI.

        Raises:
            ValueError: it can never work.
        """
        if not self.tracking_uri:
            return
        try:
            parts = urlsplit(self.tracking_uri)
            has_host = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError as error:
            raise ValueError(f"tracking_uri is not a URI: {error}; {_ANSWER}") from None
        scheme = parts.scheme.partition("+")[0]
        problem = None
        if scheme == "sqlite":
            if not sqlite_path(self.tracking_uri, Path()).name or ":memory:" in parts.path:
                problem = f"names no file; {_ANSWER}"
        elif scheme not in ("http", "https"):
            problem = _REFUSED.get(
                scheme,
                f"has the scheme {scheme!r}; to use a database other than SQLite, run "
                f"`mlflow server --backend-store-uri …` in front of it; {_ANSWER}",
            )
        elif not has_host:
            problem = f"names no host; {_ANSWER}"
        if problem:
            raise ValueError(f"tracking_uri {shown_uri(self.tracking_uri)!r} {problem}")

    def __repr__(self) -> str:
        """Show the options that are set. The login in the URI is left out: no traceback or log line may hold it."""
        fields = ((name, getattr(self, name)) for name in self.__struct_fields__)
        shown = (f"{n}={shown_uri(v) if n == 'tracking_uri' else v!r}" for n, v in fields if v)
        return f"{type(self).__name__}({', '.join(shown)})"


def shown_uri(uri: str) -> str:
    """Return the URI without a user and password, so that it can be shown."""
    try:
        parts = urlsplit(uri)
    except ValueError:
        return "(not a URI)"
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def server_url(uri: str) -> tuple[str, tuple[str, str] | None]:
    """Return a server's URL without a trailing slash, and the user and password in it."""
    parts = urlsplit(uri)
    login = (unquote(parts.username), unquote(parts.password or "")) if parts.username else None
    return shown_uri(uri).rstrip("/"), login


def sqlite_path(uri: str, base: Path) -> Path:
    """Return the file of an ``sqlite:`` URI; a relative one is relative to ``base``.

    Source: SQLAlchemy's form, with three slashes before a relative path and four before an absolute one.
    """
    _, _, rest = uri.partition("://")
    path = unquote(rest.partition("?")[0])
    return base / path.removeprefix("/")
