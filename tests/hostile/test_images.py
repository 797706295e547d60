# SPDX-License-Identifier: Apache-2.0
"""Images of a hostile site: their headers are checked before any decoder sees them, and one costs only itself."""

from __future__ import annotations

import hashlib
import io
import os
import random
import resource
import struct
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image as Pillow

from tests.hostile.hostile_site import HOSTILE, Job, batch, frame, metrics, record
from tests.unit.readers_and_bad_backends import STREAM
from trackhub.delivery import wire
from trackhub.delivery.report import DeliveryReport
from trackhub.image_header import BadImageError, ImageHeader, read_image_header
from trackhub.records import MAX_IMAGE_BYTES, Kind

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


def png(width: int, height: int, data: bytes | None = None) -> bytes:
    """Return a PNG file with one bit a pixel, or with these bytes where its pixels should be."""
    packed = zlib.compressobj(1)
    row = bytes(1 + (width + 7) // 8)
    if data is None:
        data = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pillow_file(form: str, mode: str = "RGB", **how: Any) -> bytes:
    buffer = io.BytesIO()
    Pillow.linear_gradient("L").resize((16, 12)).convert(mode).save(buffer, form, **how)
    return buffer.getvalue()


class Case(NamedTuple):
    """One image of a site.

    Attributes:
        content: the bytes of its file.
        refused: the reason by which the receiver refuses it; None if it takes it.
        mlflow: whether MLflow's backend, which decodes images, rejects it.
        media_type: what the record says.
        size: the width and height that the record says.
        bytes: the length that the record says; None for the right one.
    """

    content: bytes
    refused: str | None = None
    mlflow: bool = False
    media_type: str = "image/png"
    size: tuple[int, int] = (8, 8)
    bytes: int | None = None


CASES = {
    "a good PNG": Case(png(8, 8)),
    "a good JPEG": Case(pillow_file("JPEG"), media_type="image/jpeg", size=(16, 12)),
    "an honest image of 180 million pixels": Case(png(13400, 13400), size=(13400, 13400)),
    "EPS called PNG": Case(EPS, "bad_image"),
    "EPS called PostScript": Case(EPS, "bad_image", media_type="application/postscript", size=(10, 10)),
    "SVG called PNG": Case(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "bad_image"),
    "PNG called JPEG": Case(png(8, 8), "bad_image", media_type="image/jpeg"),
    "a size that is not the header's": Case(png(13400, 13400), "bad_image"),
    "a length that is not the file's": Case(png(8, 8), "bad_blob", bytes=70),
    "an empty file": Case(b"", "bad_image", bytes=0),
    "no pixels": Case(png(0, 8), "bad_image", size=(0, 8)),
    "pixels that are no zlib": Case(png(8, 8, b"\xff" * 40), mlflow=True),
    "half a JPEG": Case(pillow_file("JPEG")[:-20], mlflow=True, media_type="image/jpeg", size=(16, 12)),
    "too few pixels": Case(png(8, 8, zlib.compress(b"")), mlflow=True),
}  # fmt: skip


def send_images(job: Job, cases: list[Case]) -> None:
    """Send images, with a metric before and after each."""
    frames = [metrics(0)]
    for case in cases:
        seq, digest = len(frames), hashlib.sha256(case.content).hexdigest()
        name, size = f"{STREAM}-{seq}", len(case.content) if case.bytes is None else case.bytes
        job.ask(wire.Chunk(name, len(case.content), digest, 0, case.content))
        body = record(seq, Kind.IMAGE, f"image{seq}", [name, size, digest, case.media_type], *case.size, "")
        frames += [frame(Kind.IMAGE, body), metrics(seq + 1)]
    for i, one in enumerate(frames):  # one record a batch, so that the lanes write them in many turns
        assert isinstance(job.ask(batch([one], first=i)), wire.Accepted)


def expect_images_cost_only_themselves(report: DeliveryReport, cases: list[Case]) -> None:
    """Check that all metrics are confirmed, and that each image is, too, unless it is refused or rejected by name."""
    refused = [case.refused for case in cases if case.refused]
    assert report.sites[HOSTILE].refused == {reason: refused.count(reason) for reason in refused}
    for lane, runs in report.lanes.items():
        run, bad = runs[HOSTILE], sum(case.mlflow for case in cases) if lane == "mlflow" else 0
        assert run.rejected == ({"invalid_image": bad} if bad else {}), (lane, run)
        assert (run.pending, run.state) == (0, "finished"), (lane, run)
        assert run.confirmed == 2 * len(cases) + 1 - len(refused) - bad, (lane, run)


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A program ``gs`` that leaves a file when it is started."""
    started, folder = tmp_path / "started", tmp_path / "bin"
    folder.mkdir()
    (folder / "gs").write_text(f'#!/bin/sh\necho "$@" >> {started}\n[ "$1" = --version ] && echo 10.0\n')
    (folder / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    yield started
    assert not started.exists(), started.read_text()


@pytest.mark.parametrize("backend", ["jsonl", "tensorboard", pytest.param("mlflow", marks=pytest.mark.long)])
def test_an_image_of_any_content_costs_only_itself_and_starts_no_program(
    tmp_path: Path, ghostscript: Path, backend: str
) -> None:
    cases = list(CASES.values())
    job = Job(tmp_path / "run", {backend: {}}, flush_s=0.1)
    job.log_honestly()

    send_images(job, cases)

    expect_images_cost_only_themselves(job.finish(), cases)


@pytest.mark.long
def test_an_image_of_any_content_costs_only_itself_in_wandb(tmp_path: Path, ghostscript: Path) -> None:
    cases = list(CASES.values())
    job = Job(tmp_path / "run", {"wandb": {"mode": "offline"}}, flush_s=0.1)
    job.log_honestly()

    send_images(job, cases)

    expect_images_cost_only_themselves(job.finish(), cases)
    stored = [path.read_bytes() for path in (tmp_path / "run" / "wandb").glob("*/files/media/images/*")]
    assert sorted(stored) == sorted(case.content for case in cases if not case.refused)


def mutated(seed: int, number: int) -> Iterator[bytes]:
    """Yield PNG and JPEG files with a few changed bytes behind their first eight, most PNGs with right checksums."""
    rng = random.Random(seed)
    good = [pillow_file("PNG", mode) for mode in ("RGB", "L", "P", "RGBA")]
    good += [pillow_file("JPEG", mode) for mode in ("RGB", "L", "CMYK")]
    good.append(pillow_file("JPEG", progressive=True))
    for _ in range(number):
        data = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(8, len(data))
            match rng.randrange(3):
                case 0:
                    data[at] = rng.getrandbits(8)
                case 1:
                    del data[at : at + rng.randint(1, 20)]
                case 2:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
        yield _with_checksums(data) if data.startswith(b"\x89PNG") and rng.random() < 0.7 else bytes(data)


def _with_checksums(data: bytearray) -> bytes:
    out, at = data[:8], 8
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4])
        body = bytes(data[at + 4 : at + 8 + length])
        out += struct.pack(">I", max(0, len(body) - 4)) + body + struct.pack(">I", zlib.crc32(body))
        at += 12 + length
    return bytes(out)


def header_of(data: bytes) -> ImageHeader | None:
    try:
        return read_image_header(io.BytesIO(data))
    except BadImageError:
        return None


def test_mutated_images_raise_only_that_they_are_bad() -> None:
    """A decoder raises anything: AssertionError for one of some thousand such files."""
    from trackhub_mlflow.media_and_table_files import _versions

    outcomes = {"good": 0, "bad": 0}
    for data in mutated(1, 1500):
        header_of(data)
        try:
            _versions(data)
            outcomes["good"] += 1
        except BadImageError:
            outcomes["bad"] += 1
    assert min(outcomes.values()) > 100


@pytest.mark.long
@pytest.mark.parametrize("backend", ["wandb", "mlflow", "tensorboard"])
def test_mutated_images_hold_up_no_other_record(tmp_path: Path, ghostscript: Path, backend: str) -> None:
    cases = []
    for data in mutated(2, 150):
        header = header_of(data)
        media_type, *size = header or ("image/png", 16, 12)
        cases.append(Case(data, None if header else "bad_image", media_type=media_type, size=(size[0], size[1])))
    options: dict[str, dict[str, Any]] = {backend: {"mode": "offline"} if backend == "wandb" else {}}
    job = Job(tmp_path / "run", options, flush_s=0.1)
    job.log_honestly()

    send_images(job, cases)

    report = job.finish()
    run = report.lanes[backend][HOSTILE]
    assert (run.pending, run.state, set(run.rejected) <= {"invalid_image"}) == (0, "finished", True)
    refused = sum(case.refused is not None for case in cases)
    assert run.confirmed + sum(run.rejected.values()) == 2 * len(cases) + 1 - refused
    assert sum(run.rejected.values()) < len(cases)


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_the_header_of_what_pillow_writes_says_what_pillow_says(form: str, mode: str) -> None:
    for how in ({}, {"progressive": True}, {"exif": b"Exif\0\0" + bytes(70)}, {"icc_profile": bytes(200_000)}):
        data = pillow_file(form, mode, **how)
        assert header_of(data) == (f"image/{form.lower()}", 16, 12)


MEMORY_OF_THE_LARGEST = """
    import os, resource, sys
    from pathlib import Path
    from tests.hostile.test_images import Case, png
    from tests.hostile import test_images
    from tests.hostile.hostile_site import Job
    from trackhub.records import MAX_IMAGE_BYTES

    job = Job(Path(sys.argv[1]), {sys.argv[2]: {}})
    good = png(8, 8)
    test_images.send_images(job, [Case(good)])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    test_images.send_large(job, good + bytes(MAX_IMAGE_BYTES - len(good)), 3)
    job.log_honestly()
    report = job.finish()
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
    print(report.lanes[sys.argv[2]]["site-hostile"].confirmed)
"""


def send_large(job: Job, content: bytes, seq: int) -> None:
    """Send one image in chunks, and its record with this number."""
    name, digest, step = f"{STREAM}-{seq}", hashlib.sha256(content).hexdigest(), 4 << 20
    for at in range(0, len(content), step):
        job.ask(wire.Chunk(name, len(content), digest, at, content[at : at + step]))
    body = record(seq, Kind.IMAGE, "large", [name, len(content), digest, "image/png"], 8, 8, "")
    assert job.ask(batch([frame(Kind.IMAGE, body)], first=seq)) == wire.Accepted()


@pytest.mark.long
@pytest.mark.parametrize("backend", ["tensorboard", "mlflow", "jsonl"])
def test_the_largest_image_takes_bounded_memory(tmp_path: Path, backend: str) -> None:
    """In a process of its own, since a process's peak never falls. Nothing larger passes the gate."""
    command = [sys.executable, "-c", textwrap.dedent(MEMORY_OF_THE_LARGEST), str(tmp_path / "run"), backend]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)

    grown_mb, confirmed = map(int, done.stdout.split())

    assert confirmed == 4
    assert grown_mb < 8 * (MAX_IMAGE_BYTES >> 20)


def test_an_image_above_the_limit_is_refused_before_its_file_is_read(tmp_path: Path) -> None:
    job = Job(tmp_path / "run")
    job.log_honestly()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in (MAX_IMAGE_BYTES + 1, 400 << 20, 2**53 - 1):
        body = record(0, Kind.IMAGE, "a", [f"{STREAM}-0", size, "0" * 64, "image/png"], 8, 8, "")
        assert job.ask(batch([frame(Kind.IMAGE, body)])) == wire.Accepted(refused={"too_large": 1})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10
    job.finish()
