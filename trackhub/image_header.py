# SPDX-License-Identifier: Apache-2.0
"""Reads format and size of a PNG or JPEG file from its header, without a decoder.

The writer, the receiver and backends call it. A decoder such as Pillow's chooses the format by the content, and for
some formats it starts another program. So no decoder may get a site's bytes before this module has read them.
"""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO, NamedTuple

__all__ = ["IMAGE_TYPES", "BadImageError", "ImageHeader", "is_cmyk_jpeg", "read_image_header"]

IMAGE_TYPES = ("image/png", "image/jpeg")
"""The media types of images."""

_PNG = b"\x89PNG\r\n\x1a\n"
_IHDR = b"\x00\x00\x00\x0dIHDR"
_JPEG = b"\xff\xd8"
_MAX_PIXELS_A_SIDE = 2**31 - 1
_MAX_SEGMENTS = 4096
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xD8)})


class BadImageError(ValueError):
    """The bytes do not begin as a PNG or JPEG file does, or a backend's decoder failed."""


class ImageHeader(NamedTuple):
    """What the header of an image file says.

    Attributes:
        media_type: ``image/png`` or ``image/jpeg``.
        width: in pixels, at least 1.
        height: in pixels, at least 1.
    """

    media_type: str
    width: int
    height: int


def read_image_header(file: BinaryIO) -> ImageHeader:
    """Return what the header of a file says. The rest of the file may still be damaged.

    Args:
        file: the file, at its start.

    Raises:
        BadImageError: it does not begin as a PNG or JPEG file does.
        OSError: it cannot be read.
    """
    start = file.read(len(_JPEG))
    if start == _JPEG:
        height, width = struct.unpack_from(">HH", _jpeg_frame(file), 1)
        header = ImageHeader("image/jpeg", width, height)
    elif start + file.read(len(_PNG) - len(start)) == _PNG:
        header = ImageHeader("image/png", *_png_size(file))
    else:
        raise BadImageError("it does not begin as a PNG or JPEG file does")
    if not (0 < header.width <= _MAX_PIXELS_A_SIDE and 0 < header.height <= _MAX_PIXELS_A_SIDE):
        raise BadImageError(f"its header says {header.width} x {header.height} pixels")
    return header


def is_cmyk_jpeg(file: BinaryIO) -> bool:
    """Return whether a JPEG file has four channels: the inks of a printer.

    Args:
        file: the file, at its start.

    Raises:
        BadImageError: it does not begin as a JPEG file does.
        OSError: it cannot be read.
    """
    if file.read(len(_JPEG)) != _JPEG:
        raise BadImageError("it does not begin as a JPEG file does")
    return _jpeg_frame(file)[5:6] == b"\4"


def _png_size(file: BinaryIO) -> tuple[int, int]:
    chunk = file.read(25)
    if len(chunk) < 25 or not chunk.startswith(_IHDR):
        raise BadImageError("a PNG file must begin with the chunk IHDR")
    if zlib.crc32(chunk[4:21]) != int.from_bytes(chunk[21:]):
        raise BadImageError("the checksum of the chunk IHDR is wrong")
    width, height = struct.unpack_from(">II", chunk, 8)
    return width, height


def _jpeg_frame(file: BinaryIO) -> bytes:
    """Walk over the segments of a JPEG file up to its first scan. Return the header of its only frame.

    After one byte come height and width, of two bytes each, and then the number of channels, of one byte.
    """
    found: bytes | None = None
    for _ in range(_MAX_SEGMENTS):
        if file.read(1) != b"\xff":
            raise BadImageError("a segment of the JPEG file does not begin with a marker")
        while (marker := file.read(1)) == b"\xff":  # a marker may have fill bytes before it
            pass
        if not marker:
            break
        code = marker[0]
        if code in _WITHOUT_LENGTH:
            continue
        if code in (_START_OF_SCAN, _END_OF_IMAGE):
            if found is None:
                break
            return found
        length = int.from_bytes(file.read(2))
        if length < 2:
            break
        if code not in _START_OF_FRAME:
            file.seek(length - 2, 1)
            continue
        frame = file.read(length - 2)
        if len(frame) < 5 or found is not None:
            raise BadImageError("the JPEG file has an incomplete frame header, or two headers")
        found = frame
    raise BadImageError("the JPEG file has no frame header before its first scan")
