# SPDX-License-Identifier: Apache-2.0
"""How a sender process and a receiver process of the fault suite talk: one request and one reply over a Unix socket."""

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
    """Send a request as this site and return the reply. Raises OSError when there is none in time."""
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
            raise ConnectionError("the connection was closed")
        data += part
    return data
