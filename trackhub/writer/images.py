# SPDX-License-Identifier: Apache-2.0
"""Reads the image that training code logs, and encodes it as a PNG unless it is a PNG or JPEG file already.

`Writer.log_image` calls it. It imports Pillow with the first image, and NumPy only for arrays of pixels.
"""

from __future__ import annotations

import io
import operator
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from trackhub.errors import RecordError
from trackhub.fork_without_signals import FORK_LOCK
from trackhub.image_header import BadImageError, is_cmyk_jpeg, read_image_header
from trackhub.open_without_links import open_plain
from trackhub.records import MAX_CAPTION_CHARS, MAX_IMAGE_BYTES, Blob, Image
from trackhub.spool.writing import NewBlob
from trackhub.writer.bad_values import BadValues
from trackhub.writer.plain_values import array_of, holds_numbers, masked_arrays, plain_text, shown
from trackhub.writer.values import read_key

__all__ = ["grid_of", "read_image"]

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")
_NUMBER_MODES = ("F", "I", "I;16B", "I;16L", "I;16N")  # Pillow would reduce all pixels above 255 to 255
_ALPHA_MODES = {"La": "LA", "RGBa": "RGBA", "PA": "RGBA"}
_CHANNELS = (1, 2, 3, 4)
_MAX_16_BITS = 65535
_GRID_GAP = 2  # pixels between two images
_ROUNDING = 0.001  # how far floats may lie outside 0..1; less than one of a pixel's 256 steps
_MAX_GRID_PIXELS = 100_000_000  # 400 MB of memory, and seconds to encode
_MAX_OPEN_FILE_BYTES = 256 << 20  # of an open file, which is read into memory. Pillow reads a path in parts.
_pillow: Any = None  # the module ``PIL.Image``, once it is imported


class _EncodedImage(NamedTuple):
    """An image file's bytes, its MIME type and its size in pixels."""

    data: bytes
    media_type: str
    width: int
    height: int


def read_image(key: Any, image: Any, caption: Any) -> NewBlob:
    """Encode the image and return how to store it in the spool.

    Args:
        key: the image's key.
        image: as `Writer.log_image` describes it.
        caption: a line of text below it.

    Raises:
        RecordError: an argument is not accepted, or Pillow is not installed.
    """
    import hashlib  # imported late: it loads OpenSSL, which takes a tenth of the time of `import trackhub`

    key = read_key(key)
    caption = "" if caption is None else caption
    if not isinstance(caption, str):
        raise RecordError(f"log_image({key!r}): caption {shown(caption)} is a {type(caption).__name__}; expected a str")
    caption = plain_text("caption of image", key, caption)
    if len(caption) > MAX_CAPTION_CHARS:
        raise RecordError(
            f"log_image({key!r}): the caption has {len(caption):,} characters; expected at most {MAX_CAPTION_CHARS:,}. "
            "Log a long text with log_text"
        )
    data, media_type, width, height = _encode_image(key, image)
    _require_size(key, len(data))
    digest = hashlib.sha256(data).hexdigest()

    def write(path: Path) -> None:
        path.write_bytes(data)

    def payload(blob: str) -> Image:
        return Image(key, Blob(blob, len(data), digest, media_type), width, height, caption)

    return NewBlob(key, len(data), write, payload)


def grid_of(key: str, images: Sequence[Any], columns: int, bad: BadValues) -> Any:
    """Return images as one PIL image, in rows. All cells have the width of the widest and the height of the highest.

    The cell of an image that is not accepted stays empty.

    Args:
        key: the key of the grid, for messages.
        images: each as `Writer.log_image` describes it.
        columns: how many are in a row, 1 or more.
        bad: gets the images that are not accepted.

    Raises:
        RecordError: no image is accepted, the grid would be too large, or Pillow is not installed.
    """
    pil = _load_pillow(key)
    columns = min(max(1, operator.index(columns)), len(images))
    rows = -(-len(images) // columns)
    cells: list[Any] = []
    width = height = 0  # of a cell
    for i, image in enumerate(images):
        try:
            cells.append(_cell_of(key, pil, image))
        except Exception as e:  # noqa: BLE001  # a foreign image may raise anything
            bad.add("image", f"{key}/{i}", e)
            cells.append(None)
            continue
        width, height = max(width, cells[-1].width + _GRID_GAP), max(height, cells[-1].height + _GRID_GAP)
        if columns * width * rows * height > _MAX_GRID_PIXELS:  # before the other images take memory
            raise RecordError(
                f"log_images({key!r}): the grid has at least {columns * width} x {rows * height} pixels, since each of "
                f"{len(images)} cells is as large as the largest image; expected at most {_MAX_GRID_PIXELS:,}. Log "
                "fewer or smaller images, or leave out columns"
            )
    if not any(cells):
        raise bad.found[0][1]
    grid = pil.new("RGBA", (columns * width - _GRID_GAP, rows * height - _GRID_GAP))
    for i, cell in enumerate(cells):
        if cell:
            grid.paste(cell, (i % columns * width, i // columns * height))
    return grid


def _cell_of(key: str, pil: Any, image: Any) -> Any:
    with pil.open(io.BytesIO(_encode_image(key, image).data)) as cell:
        return (pil.fromarray(_narrow(cell)) if cell.mode.startswith("I") else cell).convert("RGBA")


def _narrow(image: Any) -> Any:
    """Return the pixels of a 16-bit image, reduced to 8 bits."""
    import numpy as np

    return (np.asarray(image).astype(np.uint32) // 257).astype(np.uint8)


def _encode_image(key: str, image: Any) -> _EncodedImage:
    """Return the image as the bytes of a PNG or JPEG file.

    Args:
        key: the image's key, for messages.
        image: as `Writer.log_image` describes it.

    Raises:
        RecordError: the image is not as described there, or Pillow is not installed.
    """
    pil = _load_pillow(key)
    if isinstance(image, bytes | bytearray | str | os.PathLike) or callable(getattr(image, "read", None)):
        return _read_file(key, pil, image)
    buffer = io.BytesIO()
    try:
        if not isinstance(image, pil.Image):
            image = pil.fromarray(_to_pixels(key, image))
        elif image.mode in _NUMBER_MODES:
            image = pil.fromarray(_pixels_of_numbers(key, image))
        elif image.mode not in _PNG_MODES:
            image = image.convert(_ALPHA_MODES.get(image.mode, "RGB"))
            image.info.pop("icc_profile", None)  # it describes the colours of the old mode
        image.save(buffer, "PNG")
    except RecordError:
        raise
    except Exception as e:  # Pillow's errors share no base class: a closed image, one cut off, a mode it cannot convert
        raise RecordError(f"log_image({key!r}): the image cannot be encoded: {type(e).__name__}: {e}") from e
    return _EncodedImage(buffer.getvalue(), "image/png", image.width, image.height)


def _load_pillow(key: str) -> Any:
    """Return the module ``PIL.Image``. The first call imports it, and all of Pillow's formats."""
    global _pillow
    if _pillow is not None:
        return _pillow
    try:
        with FORK_LOCK:
            from PIL import Image as pil  # imported late: only a script that logs images needs Pillow

            # Otherwise Pillow loads its formats with the first image. If two threads then open an image at the same
            # time, Pillow fails in one of them: it "cannot identify" a good image (Pillow 13.0).
            pil.init()
            _pillow = pil
    except ImportError as e:
        raise RecordError(
            f"log_image({key!r}) needs Pillow to encode images; install it with: pip install 'flare-trackhub[images]' "
            "(in a clone: pip install -e '.[images]')"
        ) from e
    return _pillow


def _require_size(key: str, size_bytes: int) -> None:
    if size_bytes > MAX_IMAGE_BYTES:
        raise RecordError(
            f"log_image({key!r}): the image file has {size_bytes:,} bytes; expected at most {MAX_IMAGE_BYTES:,}. Log a "
            "smaller version, or the file with log_artifact"
        )


def _read_file(key: str, pil: Any, source: Any) -> _EncodedImage:
    try:
        with _opened(key, source) as file:
            try:
                header = read_image_header(file)
            except BadImageError:
                header = None
            file.seek(0)
            # Other formats become PNG. A JPEG in CMYK becomes an RGB PNG, since many viewers do not show CMYK.
            if header is not None and (header.media_type != "image/jpeg" or not is_cmyk_jpeg(file)):
                _require_size(key, file.seek(0, os.SEEK_END))
                file.seek(0)
                return _EncodedImage(file.read(MAX_IMAGE_BYTES), *header)
            file.seek(0)
            with pil.open(file) as image:  # Pillow reads no more of the file than it needs
                return _encode_image(key, image)
    except RecordError:
        raise
    except Exception as e:  # more than OSError: SyntaxError for a damaged PNG, DecompressionBombError, ...
        what = shown(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the bytes"
        raise RecordError(f"log_image({key!r}): cannot read {what} as an image: {e}") from e


def _opened(key: str, source: Any) -> BinaryIO:
    """Return an image file, at its beginning. It is given as bytes, as a path or as an open file.

    An open file is read from its present position, and a `BytesIO` from its beginning.

    Raises:
        RecordError: an open file has too many bytes.
        OSError: a path leads to no ordinary file, or to one that cannot be read.
    """
    if isinstance(source, bytes | bytearray):
        return io.BytesIO(source)
    if isinstance(source, io.BytesIO):
        return io.BytesIO(source.getvalue())
    if isinstance(source, str | os.PathLike):
        return open(os.path.realpath(os.fsdecode(source)), "rb", opener=open_plain)
    copy = io.BytesIO()
    while data := source.read(1 << 20):
        copy.write(data)
        if copy.tell() > _MAX_OPEN_FILE_BYTES:
            raise RecordError(
                f"log_image({key!r}): the open file has more than {_MAX_OPEN_FILE_BYTES:,} bytes; expected an image. "
                "Log it by its path, or as a file with log_artifact"
            )
    copy.seek(0)
    return copy


def _pixels_of_numbers(key: str, image: Any) -> Any:
    """Return the pixels of a PIL image whose mode says nothing about their range: 0..1, 0..255 or 0..65535."""
    import numpy as np

    array = np.asarray(image)
    if image.mode == "F" and array.size and 1.0 + _ROUNDING < array.max() <= 255.0 + _ROUNDING:
        array = array / 255.0  # what convert("F") makes of an image of 8 bits
    elif image.mode != "F" and (image.mode != "I" or image.format == "PPM"):  # Pillow reads a PGM of 16 bits as 32
        array = array.astype(np.uint16)
    return _to_pixels(key, array)


def _to_pixels(key: str, image: Any) -> Any:
    """Return the pixels of an array or tensor, ``[H, W]`` or ``[H, W, C]``. Only ``[H, W]`` may have 16 bits."""
    import numpy as np  # imported late: a script that passes an array has NumPy

    try:
        array = masked_arrays().filled(array_of(image), 0)
    except Exception as e:
        raise RecordError(f"log_image({key!r}): cannot make an array of {type(image).__name__}: {e}") from e
    array = _with_channels_last(key, array)
    if holds_numbers(array) and not issubclass(array.dtype.type, np.number | np.bool_ | np.object_):  # of ml_dtypes
        array = array.astype(np.int64 if np.can_cast(array.dtype, np.int64) else np.float32)
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if np.issubdtype(array.dtype, np.integer):
        return _pixels_of_ints(key, array)
    if not np.issubdtype(array.dtype, np.floating):
        raise RecordError(f"log_image({key!r}): dtype {array.dtype} is not supported; expected ints, or floats in 0..1")
    low, high = float(array.min()), float(array.max())
    if not (low >= -_ROUNDING and high <= 1.0 + _ROUNDING):
        raise RecordError(
            f"log_image({key!r}): expected floats in 0..1, got {low:g}..{high:g}; scale them, or pass uint8"
        )
    return (np.clip(array, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def _pixels_of_ints(key: str, array: Any) -> Any:
    """Return ints as pixels. A mask of 0 and 1 becomes black and white, unless it is uint16.

    Ints above 255, and uint16, make a grey image one of 16 bits. In other images, they are reduced to 8 bits.
    """
    import numpy as np

    low, high = int(array.min()), int(array.max())
    if low < 0 or high > _MAX_16_BITS:
        raise RecordError(
            f"log_image({key!r}): expected ints in 0..255 or 0..{_MAX_16_BITS}, got {low}..{high}; scale them"
        )
    if array.dtype == np.uint16 or high > 255:
        wide = np.ascontiguousarray(array.astype(np.uint16))
        return wide if wide.ndim == 2 else (wide // 257).astype(np.uint8)  # Pillow writes 16 bits for grey images only
    return np.ascontiguousarray(array.astype(np.uint8)) * (255 if high == 1 else 1)


def _with_channels_last(key: str, array: Any) -> Any:
    """Return the array as ``[H, W]`` or ``[H, W, C]``."""
    import numpy as np

    while array.ndim > 3 and array.shape[0] == 1:  # a batch of one
        array = array[0]
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in _CHANNELS) or 0 in array.shape:
        raise RecordError(
            f"log_image({key!r}): shape {list(array.shape)} is not an image; expected [H, W], [H, W, C] or [C, H, W] "
            "with 1 to 4 channels, or a batch of one such image"
        )
    return array
