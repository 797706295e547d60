# SPDX-License-Identifier: Apache-2.0
"""Makes the SDK's image of a file, without the decoder that the SDK would call.

``wandb.Image`` opens each file with Pillow. Pillow chooses the decoder by the content: for EPS, it starts ghostscript.
It also refuses images of more than 179 million pixels. W&B needs only the size, which the header says.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from wandb.sdk.data_types.base_types.media import Media

    from trackhub.spi import ImageHeader

__all__ = ["image_of_file"]


def image_of_file(path: Path, header: ImageHeader, caption: str) -> Media:
    """Return the SDK's image of this file, whose suffix says the format.

    Args:
        path: the file.
        header: what its header says.
        caption: a line of text below it, may be empty.
    """
    made: Media = _image_class()(path, header, caption)
    return made


@cache
def _image_class() -> Any:
    import wandb

    class ImageWithoutDecoder(wandb.Image):
        """``wandb.Image``, with the size from the header."""

        _log_type = "trackhub/image-file"  # a new name: under the old one, the SDK must find the base class

        def __init__(self, path: Path, header: ImageHeader, caption: str) -> None:
            super().__init__(str(path), caption=caption or None)
            self._width, self._height = header.width, header.height

        def _initialize_from_path(self, path: str) -> None:
            self._set_file(path, is_tmp=False)
            self.format = path.rpartition(".")[2]

        @property
        def image(self) -> None:
            """None. The SDK's own property opens the file."""

    return ImageWithoutDecoder
