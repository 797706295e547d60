# SPDX-License-Identifier: Apache-2.0
"""Turn what training code calls an image into the bytes of a PNG or JPEG file."""

from __future__ import annotations

import io
import os
from typing import Any, NamedTuple

from trackhub.errors import RecordError

__all__ = ["EncodedImage", "encode_image"]

_MEDIA_TYPES = {"PNG": "image/png", "JPEG": "image/jpeg"}
_CHANNELS = (1, 3, 4)


class EncodedImage(NamedTuple):
    """An image file's bytes, its MIME type and its size in pixels."""

    data: bytes
    media_type: str
    width: int
    height: int


def encode_image(key: str, image: Any) -> EncodedImage:
    """Encode an image; ``key`` is named in errors.

    Args:
        image: a numpy array or torch tensor ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with C = 1, 3 or 4, uint8
            0..255 or float 0..1; a PIL image; the bytes or the path of a PNG or JPEG file.

    Raises:
        RecordError: it is none of these, or Pillow is not installed.
    """
    try:
        from PIL import Image as pil  # lazy: only who logs images needs Pillow
    except ImportError as e:
        raise RecordError(
            f"log_image({key!r}) needs Pillow to encode images; install it with: pip install 'flare-trackhub[images]' "
            "(in a clone: pip install -e '.[images]')"
        ) from e
    if isinstance(image, bytes | bytearray | str | os.PathLike):
        return _read_file(key, pil, image)
    if not isinstance(image, pil.Image):
        image = pil.fromarray(_to_uint8(key, image))
    buffer = io.BytesIO()
    try:
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
            image = image.convert("RGB")
        image.save(buffer, "PNG")
    except Exception as e:  # closed, cut off, of a mode that cannot be converted, ...: Pillow's errors have no root
        raise RecordError(f"log_image({key!r}): the image cannot be encoded: {type(e).__name__}: {e}") from e
    return EncodedImage(buffer.getvalue(), "image/png", image.width, image.height)


def _read_file(key: str, pil: Any, source: Any) -> EncodedImage:
    try:
        if isinstance(source, bytes | bytearray):
            data = bytes(source)
        else:
            with open(source, "rb") as file:
                data = file.read()
        with pil.open(io.BytesIO(data)) as image:
            media_type = _MEDIA_TYPES.get(image.format)
            if media_type is not None:
                return EncodedImage(data, media_type, image.width, image.height)
            return encode_image(key, image.convert("RGBA" if "A" in image.mode else "RGB"))
    except RecordError:
        raise
    except Exception as e:  # not only OSError: SyntaxError for a damaged PNG, DecompressionBombError, ...
        what = "the bytes" if isinstance(source, bytes | bytearray) else f"{os.fspath(source)!r}"
        raise RecordError(f"log_image({key!r}): cannot read {what} as an image: {e}") from e


def _to_uint8(key: str, image: Any) -> Any:
    import numpy as np  # lazy: whoever passes an array has it

    if hasattr(image, "detach"):
        image = image.detach().cpu()
        if image.is_floating_point():
            image = image.float()  # NumPy has no bfloat16
    try:
        array = np.asarray(image)
    except Exception as e:
        raise RecordError(f"log_image({key!r}): cannot make an array of {type(image).__name__}: {e}") from e
    if array.ndim == 3 and array.shape[-1] not in _CHANNELS and array.shape[0] in _CHANNELS:
        array = np.moveaxis(array, 0, -1)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in _CHANNELS) or 0 in array.shape:
        raise RecordError(
            f"log_image({key!r}): shape {list(array.shape)} is no image; expected [H, W], [H, W, C] or [C, H, W] with "
            "1, 3 or 4 channels"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    if not np.issubdtype(array.dtype, np.floating):
        raise RecordError(f"log_image({key!r}): dtype {array.dtype} is not supported; expected uint8, or float in 0..1")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0.0 and high <= 1.0):
        raise RecordError(
            f"log_image({key!r}): floats must lie in 0..1, these lie in {low:g}..{high:g}; scale them, or pass uint8"
        )
    return (array * 255.0 + 0.5).astype(np.uint8)
