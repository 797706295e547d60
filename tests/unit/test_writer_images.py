# SPDX-License-Identifier: Apache-2.0
"""Images of every kind that training code has: each is stored with the pixels that a person would expect."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import textwrap
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Pillow

from tests.unit.readers_and_bad_backends import new_spool, read_spool, spool_of
from trackhub.errors import RecordError
from trackhub.records import Image
from trackhub.spool.layout import blob_file
from trackhub.writer.plain_values import array_of
from trackhub.writer.summary_writer import SummaryWriter
from trackhub.writer.writer import Writer

torch = pytest.importorskip("torch")

RAMP = np.linspace(0, 1, 64).reshape(8, 8)
MASK = RAMP > 0.5


def stored(tmp_path: Path, image: Any) -> Any:
    """Return the pixels of the file that the spool holds of this image."""
    return np.asarray(stored_image(tmp_path, image))


def stored_image(tmp_path: Path, image: Any) -> Any:
    """Return the file that the spool holds of this image, opened by Pillow."""
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    writer.log_image("i", image)
    ((record,),) = read_spool(spool_of(writer).folder).values()
    assert isinstance(record.payload, Image)
    path = blob_file(spool_of(writer).folder, record.payload.blob.name)
    found = Pillow.open(io.BytesIO(path.read_bytes()))
    found.load()
    assert found.size == (record.payload.width, record.payload.height)
    return found


GREY = (RAMP * 255 + 0.5).astype(np.uint8)
WIDE = (RAMP * 65535).astype(np.uint16)
AS_GREY: dict[str, Any] = {
    "PIL's mode F in 0..1": Pillow.fromarray(RAMP.astype(np.float32)),
    "PIL's mode F in 0..255": Pillow.fromarray(GREY).convert("F"),
    "PIL's mode I in 0..255": Pillow.fromarray(GREY.astype(np.int32)),
    "ints of 64 bits": GREY.astype(np.int64),
    "a tensor of ints": torch.from_numpy(GREY.astype(np.int32)),
    "a batch of one": torch.from_numpy(RAMP)[None, None],
    "a batch of one, channels last": RAMP[None, :, :, None],
    "a tensor with a gradient": torch.from_numpy(RAMP).requires_grad_(),
}


@pytest.mark.parametrize("what", AS_GREY)
def test_each_range_of_grey_pixels_becomes_the_same_image(tmp_path: Path, what: str) -> None:
    np.testing.assert_array_equal(stored(tmp_path, AS_GREY[what]), GREY)


def as_file(image: Any, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image if isinstance(image, Pillow.Image) else Pillow.fromarray(image)).save(buffer, form, **options)
    return buffer.getvalue()


FILES: dict[str, tuple[Any, str, Any]] = {
    "TIFF of bytes": (GREY, "TIFF", GREY),
    "TIFF of 16 bits": (WIDE, "TIFF", WIDE),
    "TIFF of 16 bits that is dark": (WIDE // 257, "TIFF", WIDE // 257),
    "TIFF of 32 bits": (WIDE.astype(np.int32), "TIFF", WIDE),
    "TIFF of 32 bits in 0..255": (GREY.astype(np.int32), "TIFF", GREY),
    "TIFF of floats in 0..1": (RAMP.astype(np.float32), "TIFF", GREY),
    "TIFF of floats in 0..255": (Pillow.fromarray(GREY).convert("F"), "TIFF", GREY),
    "TIFF of bits": (MASK, "TIFF", MASK),
    "PGM of 16 bits": (WIDE, "PPM", WIDE),
    "PGM of 16 bits that is dark": (WIDE // 257, "PPM", WIDE // 257),
    "PFM of floats": (RAMP.astype(np.float32), "PPM", GREY),
    "JPEG 2000 of 16 bits": (WIDE, "JPEG2000", WIDE),
    "PNG of 16 bits": (WIDE, "PNG", WIDE),
    "BMP": (np.stack([GREY] * 3, -1), "BMP", np.stack([GREY] * 3, -1)),
    "TIFF with alpha": (np.stack([GREY, 255 - GREY], -1), "TIFF", np.stack([GREY, 255 - GREY], -1)),
}


@pytest.mark.parametrize("what", FILES)
def test_an_image_file_keeps_its_pixels_whatever_its_format(tmp_path: Path, what: str) -> None:
    image, form, expected = FILES[what]
    data = as_file(image, form)
    np.testing.assert_array_equal(stored(tmp_path / "bytes", data), expected)
    (tmp_path / "file").write_bytes(data)
    np.testing.assert_array_equal(stored(tmp_path / "path", tmp_path / "file"), expected)


def test_a_transparent_gif_stays_transparent(tmp_path: Path) -> None:
    image = Pillow.new("P", (2, 1))
    image.putdata([0, 1])
    image.putpalette([255, 0, 0, 0, 255, 0])
    image = stored_image(tmp_path, as_file(image, "GIF", transparency=1)).convert("RGBA")
    assert [image.getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0, 255), (0, 255, 0, 0)]


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_in_cmyk_becomes_a_png_that_every_backend_takes(tmp_path: Path, progressive: bool) -> None:
    """PNG has no CMYK, so a backend that stores PNG only would reject the file."""
    ink = Pillow.new("CMYK", (9, 7), (0, 255, 255, 0))
    found = stored_image(tmp_path, as_file(ink, "JPEG", progressive=progressive, icc_profile=b"a profile for CMYK"))
    assert (found.format, found.mode, found.size, found.info.get("icc_profile")) == ("PNG", "RGB", (9, 7), None)
    red, green, blue = found.getpixel((4, 3))
    assert red > 250
    assert max(green, blue) < 5


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_any_other_jpeg_is_stored_as_it_is(tmp_path: Path, mode: str) -> None:
    assert stored_image(tmp_path, as_file(Pillow.new(mode, (9, 7)), "JPEG")).format == "JPEG"


@pytest.mark.parametrize("image", [WIDE, Pillow.fromarray(WIDE), Pillow.fromarray(WIDE.astype(np.int32))])
def test_sixteen_bits_of_grey_are_kept(tmp_path: Path, image: Any) -> None:
    np.testing.assert_array_equal(stored(tmp_path, image), WIDE)


def test_sixteen_bits_of_colour_become_eight(tmp_path: Path) -> None:
    found = stored(tmp_path, np.stack([WIDE] * 3, -1))
    np.testing.assert_array_equal(found[..., 1], WIDE // 257)


@pytest.mark.parametrize("mask", [MASK, MASK.astype(np.int64), torch.from_numpy(MASK.astype(np.int32))])
def test_a_mask_is_black_and_white(tmp_path: Path, mask: Any) -> None:
    np.testing.assert_array_equal(stored(tmp_path, mask), MASK * 255)


@pytest.mark.parametrize("channels_first", [False, True])
def test_grey_with_alpha_keeps_both_channels(tmp_path: Path, channels_first: bool) -> None:
    image = np.stack([GREY, 255 - GREY], 0 if channels_first else -1)
    np.testing.assert_array_equal(stored(tmp_path, image), np.stack([GREY, 255 - GREY], -1))


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "CMYK", "YCbCr", "HSV", "LAB"]
)
def test_every_mode_of_pillow_is_stored_and_keeps_its_alpha(tmp_path: Path, mode: str) -> None:
    found = stored(tmp_path, Pillow.new(mode, (4, 4)))
    assert (found.ndim == 3 and found.shape[-1] in (2, 4)) == ("a" in mode.lower() and mode != "LAB")


def test_masked_pixels_are_black(tmp_path: Path) -> None:
    np.testing.assert_array_equal(stored(tmp_path, np.ma.masked_array(GREY, mask=MASK)), np.where(MASK, 0, GREY))


@pytest.mark.parametrize("image", [RAMP * 2 - 1, RAMP * 255, GREY.astype(int) - 5, GREY.astype(int) * 9999, 1j * RAMP])
def test_a_range_that_nobody_can_know_is_refused_by_name(tmp_path: Path, image: Any) -> None:
    with pytest.raises(RecordError, match="expected"):
        stored(tmp_path, image)


def test_a_masked_batch_of_an_adapter_has_black_pixels_too(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    adapter = SummaryWriter(writer=writer)
    masked = np.ma.masked_array(GREY, mask=MASK)
    adapter.add_image("one", masked[None])
    adapter.add_images("batch", masked[None, None])
    writer.log_images("list", [list(masked)])
    folder = spool_of(writer).folder
    (records,) = read_spool(folder).values()
    assert len(records) == 3
    for record in records:
        assert isinstance(record.payload, Image)
        pixels = np.asarray(Pillow.open(blob_file(folder, record.payload.blob.name)))
        np.testing.assert_array_equal(pixels, np.where(MASK, 0, GREY))


def test_an_open_file_of_any_class_is_read_and_stays_open(tmp_path: Path) -> None:
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        file.write(as_file(GREY, "PNG"))
        file.seek(0)
        np.testing.assert_array_equal(stored(tmp_path, file), GREY)
        file.seek(0)
        assert file.read(4) == b"\x89PNG"


def test_no_method_of_an_object_is_called_because_of_its_name_alone() -> None:
    class Stream:
        def detach(self) -> None:
            raise AssertionError

    assert array_of(Stream()).shape == ()


def sparse_file(path: Path, begin: bytes) -> Path:
    """Return a file of 8 GiB that takes no disk."""
    with open(path, "wb") as file:
        file.write(begin)
        file.truncate(8 << 30)
    return path


@pytest.mark.parametrize("begin", [b"\0\0\0\x1cftypisom", as_file(GREY, "PNG")], ids=["a video", "a PNG file"])
@pytest.mark.parametrize("as_open_file", [False, True], ids=["a path", "an open file"])
def test_a_file_that_is_too_large_for_an_image_is_not_read_whole(
    tmp_path: Path, begin: bytes, as_open_file: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trackhub.writer.images._MAX_OPEN_FILE_BYTES", 4 << 20)
    path = sparse_file(tmp_path / "large", begin)
    tracemalloc.start()
    try:
        with open(path, "rb") as file, pytest.raises(RecordError, match="log_image"):
            stored(tmp_path, file if as_open_file else path)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most_bytes < 32 << 20


def test_a_fifo_is_no_image_and_blocks_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RecordError, match=r"cannot read .* as an image"):
        stored(tmp_path, tmp_path / "fifo")


def test_a_path_that_is_a_link_leads_to_its_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(as_file(GREY, "PNG"))
    (tmp_path / "latest.png").symlink_to("a.png")
    np.testing.assert_array_equal(stored(tmp_path, str(tmp_path / "latest.png")), GREY)


def test_a_grid_that_one_large_image_would_make_huge_is_refused(tmp_path: Path) -> None:
    writer = Writer(new_spool(tmp_path / "spool"), strict=True)
    with pytest.raises(RecordError, match=r"each of 200 cells is as large as the largest image; expected at most"):
        writer.log_images("grid", [np.zeros((2000, 2000), np.uint8), *[GREY] * 199], columns=20)


def test_a_child_forked_while_another_thread_imports_pillow_can_log_images(tmp_path: Path) -> None:
    code = """
        import os, signal, sys, threading
        import numpy as np
        from trackhub.writer import Writer

        importing = threading.Event()

        class Slow:
            def find_spec(self, name, path=None, target=None):
                if name == "PIL.Image":
                    importing.set()
                    threading.Event().wait(0.3)  # the fork comes now, or waits until Pillow is imported

        sys.meta_path.insert(0, Slow())
        writer = Writer(sys.argv[1])
        thread = threading.Thread(target=writer.log_image, args=("a", np.zeros((4, 4))))
        thread.start()
        importing.wait()
        child = os.fork()
        if not child:
            signal.alarm(30)
            writer.log_image("b", np.zeros((4, 4)))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        thread.join()
        sys.exit(status)
    """
    spool = new_spool(tmp_path / "spool")
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(spool)], check=True, timeout=120)
    found = [record.payload.key for records in read_spool(spool).values() for record in records]  # type: ignore[union-attr]
    assert sorted(found) == ["a", "b"]
