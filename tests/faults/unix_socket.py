# SPDX-License-Identifier: Apache-2.0
"""The channel of the fault suite: a request and its reply over a Unix socket, one connection for each request."""

from __future__ import annotations

import socket
import struct
from pathlib import Path

__all__ = ["receive", "request", "send"]

_SIZE = struct.Struct("<I")


def send(connection: socket.socket, data: bytes) -> None:
    connection.sendall(_SIZE.pack(len(data)) + data)


def receive(connection: socket.socket) -> bytes:
    (size,) = _SIZE.unpack(_exactly(connection, _SIZE.size))
    return _exactly(connection, size)


def request(path: Path, site: str, data: bytes, timeout_s: float) -> bytes:
    """Send a request and return the reply. Blocks up to ``timeout_s``.

    Args:
        path: the receiver's socket.
        site: who sends it.
        data: the request.
        timeout_s: the longest wait for each step.

    Raises:
        OSError: the receiver did not reply in time.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        connection.connect(str(path))
        send(connection, site.encode())
        send(connection, data)
        return receive(connection)


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        part = connection.recv(size - len(data))
        if not part:
            raise ConnectionError(f"the connection was closed after {len(data)} of {size} bytes")
        data += part
    return data
