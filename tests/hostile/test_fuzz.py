# SPDX-License-Identifier: Apache-2.0
"""Random requests of a hostile site against the real receiver: some built from the schema, some real ones with changes.

Whatever it sends, the honest site beside it has each record in each backend, its own records are all confirmed or
rejected by name, the report's sums hold, and memory stays below a bound. This process reads and writes nothing outside
the job's folder, starts no program, and connects to nothing. W&B's service is a process of its own, which is not
watched.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mimetypes
import os
import random
import re
import resource
import site
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.hostile.decoder_rules import no_file, real_requests
from tests.hostile.hostile_site import HONEST, HOSTILE, OTHER_STREAM, Job, batch, frame, metrics, record
from tests.hostile.test_images import EPS, mutated, png
from tests.unit.readers_and_bad_backends import STREAM
from trackhub.delivery import wire
from trackhub.delivery.check_received_batch import Contents, KnownKeys, check_record, examine
from trackhub.framing import scan_frames
from trackhub.image_header import BadImageError, read_image_header
from trackhub.job_and_run_info import JobInfo, Side
from trackhub.records import Kind, Metrics
from trackhub.testing import Point

ROOT = Path(__file__).resolve().parents[2]
MAX_GROWTH_MB = 500

EDGES: list[Any] = [
    0, 1, -1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64 - 1, 0.5, -0.0, 1e308, float("nan"), float("inf"), True, None, "",
    "a", "x" * 1001, "\x00", "\x1b[2J", "\u2028", "\u202e", "../../x", "/etc/passwd", "wandb-artifact://h/_id/x", b"",
    b"\xff\xfe", [], {}, [[]], {"": 0}, {1: 2}, {"a": {"b": {"c": 1}}}, [None] * 50, f"{STREAM}-0", f"{STREAM}-1",
]  # fmt: skip
"""Values at the edges of what a field may be, and beyond."""


class Fuzzer:
    """Makes requests. The same seed makes the same ones."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.seqs: dict[str, int] = {}
        self._real = real_requests()
        self._images = mutated(seed, 1_000_000)
        self._chunks: list[bytes] = []

    def requests(self) -> list[bytes]:
        """Return the bytes of one request, after those of the chunks that it needs."""
        kind: Callable[[], bytes] = self.random.choices(
            [self.batch_of_odd_records, self.other_message, self.changed_bytes, self.changed_structure],
            [6, 2, 2, 3],
        )[0]
        request, chunks = kind(), self._chunks
        self._chunks = []
        return [*chunks, request]

    def batch_of_odd_records(self) -> bytes:
        """Return a batch whose frames are in order, and whose records may hold anything."""
        stream = self.random.choice([STREAM, OTHER_STREAM, f"{self.random.getrandbits(128):032x}"])
        first = self.seqs.get(stream, 0)
        seqs = range(first, first + self.random.randint(1, 8))
        frames = [metrics(seq) if self.random.random() < 0.3 else self.odd_frame(seq, stream) for seq in seqs]
        if self.random.random() < 0.9:
            self.seqs[stream] = first + len(frames)
        return wire.encode(batch(frames, first, stream))

    def odd_frame(self, seq: int, stream: str) -> bytes:
        kind = self.random.choice([*Kind, 42])
        if kind in (Kind.IMAGE, Kind.ARTIFACT) and self.random.random() < 0.7:
            return self.odd_file(kind, seq, f"{stream}-{seq}")
        fields = [self.value() for _ in range(self.random.randint(0, 5))]
        if self.random.random() < 0.5:  # nearly right
            fields = [self.nearly(part) for part in _FIELDS.get(kind, [])]
        parts = {name: self.value() for name in ("time", "step", "round_") if self.random.random() < 0.1}
        body = record(seq, self.random.choice([kind, kind, kind, *Kind]), *fields, **parts)
        if self.random.random() < 0.1:
            body = self.changed(body)
        return frame(kind if kind != Kind.GAP else Kind.METRICS, body)

    def odd_file(self, kind: int, seq: int, name: str) -> bytes:
        """Return the frame of an image or artifact whose file is sent whole, and may hold anything."""
        content = self.random.choice([next(self._images), self.random.choice(_CONTENTS)])
        digest = hashlib.sha256(content).hexdigest()
        self._chunks.append(wire.encode(wire.Chunk(name, len(content), digest, 0, content)))
        try:
            media_type, width, height = read_image_header(io.BytesIO(content))
        except BadImageError:
            media_type, width, height = self.random.choice(["image/png", "image/jpeg", "text/html"]), 8, 8
        blob = [name, len(content) + (self.random.random() < 0.05), digest, media_type]
        key = self.random.choice(["files/a", "files/b", "../x", "con", "a" * 999])
        if kind == Kind.IMAGE:
            width += self.random.random() < 0.05
            return frame(kind, record(seq, kind, key, blob, width, height, self.random.choice(["", "<b>\x00", "a\nb"])))
        return frame(kind, record(seq, kind, key, blob, self.random.choice(_FILENAMES), self.random.choice(_TYPES)))

    def nearly(self, good: Any) -> Any:
        if self.random.random() < 0.3:
            return self.value()
        if isinstance(good, dict) and self.random.random() < 0.5:
            return {**good, self.random.choice(["k", "\x00", 5, ""]): self.value()}
        return good

    def value(self, depth: int = 0) -> Any:
        if depth < 4 and self.random.random() < 0.2:
            items = [self.value(depth + 1) for _ in range(self.random.randint(0, 4))]
            return items if self.random.random() < 0.5 else {str(i): item for i, item in enumerate(items)}
        return self.random.choice(EDGES)

    def other_message(self) -> bytes:
        """Return a message of any tag, with fields of any kind."""
        counts = {name: self.value() for name in wire.SiteCounts.__struct_fields__ if self.random.random() < 0.3}
        parts = self.random.choice([[counts, "s", 1], [counts, False, "s", self.value()], [self.value()] * 5])
        return msgspec.msgpack.encode([self.random.randint(0, 6), *parts])

    def changed_bytes(self) -> bytes:
        return self.changed(self.random.choice(self._real))

    def changed(self, data: bytes) -> bytes:
        out = bytearray(data)
        for _ in range(self.random.randint(1, 4)):
            at = self.random.randrange(len(out) + 1)
            match self.random.randrange(4):
                case 0:
                    out[at : at + 1] = bytes([self.random.getrandbits(8)])
                case 1:
                    out[at:at] = self.random.randbytes(self.random.randint(1, 9))
                case 2:
                    del out[at : at + self.random.randint(1, 9)]
                case 3:
                    out[at : at + 1] = self.random.choice(
                        [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\x7f"]
                    )
        return bytes(out)

    def changed_structure(self) -> bytes:
        """Return a real request with one of its fields replaced."""
        parts = msgspec.msgpack.decode(self.random.choice(self._real))
        parts[self.random.randrange(len(parts))] = self.value()
        return msgspec.msgpack.encode(parts)


_BLOB = [f"{STREAM}-0", 1, "0" * 64, "image/png"]
_FIELDS: dict[int, list[Any]] = {
    Kind.METRICS: [{"a": 1.0}], Kind.PARAMS: [{"a": [1, {"b": "c"}]}], Kind.TAGS: [{"a": "b"}], Kind.TEXT: ["a", "b"],
    Kind.IMAGE: ["a", _BLOB, 1, 1, ""], Kind.HISTOGRAM: ["a", [0.0, 1.0], [1.0]],
    Kind.TABLE: ["a", ["x", "y"], [[1, None]]], Kind.ARTIFACT: ["a", _BLOB, "f", "file"], Kind.GAP: [1, "spool_full"],
    Kind.SUMMARY: [{"a": 1.0, "b": "c"}],
}  # fmt: skip


_CONTENTS = [
    b"", b"x", EPS, png(8, 8), png(13400, 13400), png(8, 8, b"\xff" * 40), bytes(100_000), b"<svg onload='alert(1)'/>",
    b"[Desktop Entry]\nExec=sh\n", b'{"_type": "image-file"}', b"\x80\x04cos\nsystem\n", b"PK\x03\x04" + bytes(60),
]  # fmt: skip
_FILENAMES = [
    "f", "", ".", "..", "a\nb", "a\\b", "~", "*", "x" * 255, "\u00e9" * 200, "con", "m.bin", "wandb-summary.json",
    "\u202ef",
]  # fmt: skip
_TYPES = ["file", "model", "", "job", "run_table", "wandb-history", "x" * 255, "a/b", "../x", "\x00"]


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


_ENDS = (
    sysconfig.get_path("stdlib"),
    sysconfig.get_path("purelib"),
    sysconfig.get_path("platlib"),
    *site.getsitepackages(),
)
_IMPORT_PATHS = {path for path in sys.path if path.endswith(".zip")}  # an SDK's late import looks there
_READ_BY_PYTHON = frozenset(
    {"/dev/null", "/dev/urandom", "/etc/localtime", "/proc/self/status", *mimetypes.knownfiles, *_IMPORT_PATHS}
)
"""Files that Python or an SDK reads for reasons of its own. Each is named. A folder would excuse what a site names."""

_TOUCHES = frozenset(
    {"open", "os.listdir", "os.scandir", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.link", "os.symlink",
     "os.truncate", "os.chmod", "sqlite3.connect"}
)  # fmt: skip
_STARTS = frozenset({"subprocess.Popen", "os.exec", "os.posix_spawn", "os.system", "os.spawn"})


class Watch:
    """Notes what is touched outside a folder, by Python's audit hook. A hook stays, so there is one for all tests."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.outside: set[str] = set()
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        if self.inside is None:
            return
        if event in _STARTS:
            program = os.fsdecode(args[0]) if isinstance(args[0], str | bytes | os.PathLike) else str(args[0])
            if Path(program).name != "wandb-core":
                self.outside.add(f"{event} {program}")
        elif event == "socket.connect" and isinstance(args[1], tuple) and args[1][0] not in ("127.0.0.1", "::1"):
            self.outside.add(f"{event} {args[1]}")
        elif event in _TOUCHES:
            for name in args:
                if isinstance(name, str | bytes | os.PathLike) and name != "r":
                    self._note(event, os.fsdecode(name))

    def _note(self, event: str, name: str) -> None:
        if event == "open" and len(name) <= 3 and set(name) <= set("rwxab+t"):
            return  # the mode
        path = Path(os.path.abspath(name.removeprefix("file:").partition("?")[0]))
        if not path.is_relative_to(self.inside or "/"):
            self.outside.add(str(path))


_watch: list[Watch] = []


def attack(folder: Path, seed: int, requests: int, backends: dict[str, dict[str, Any]], *allowed: Path) -> None:
    """Run a job with a hostile site that sends this many requests, and check the honest site and the report."""
    if not _watch:
        _watch.append(Watch())
    watch = _watch[0]
    job = Job(folder / "run", backends, flush_s=0.1)
    job.log_honestly()
    fuzzer = Fuzzer(seed)
    for _ in range(20):  # what is imported or cached at the first request is not the site's doing
        for request in fuzzer.requests():
            job.receiver.handle(HOSTILE, request)
    before = _peak_mb()
    watch.inside, watch.outside = folder, set()
    every = max(1, requests // 20)
    try:
        for i in range(requests):
            for request in fuzzer.requests():
                wire.decode_reply(job.receiver.handle(HOSTILE, request))
            if i % every == 0:
                job.log_honestly()
        report = job.finish(deadline_s=120)
    finally:
        watch.inside = None
    expect_nothing_outside(watch.outside, allowed)
    assert _peak_mb() - before < MAX_GROWTH_MB
    assert {path.name for path in folder.iterdir()} == {"run"}
    assert report.sites[HOSTILE].refused, "the requests were too kind to show anything"
    for lane, runs in report.lanes.items():
        assert (runs[HOSTILE].pending, runs[HOSTILE].state) == (0, "finished"), (lane, runs[HOSTILE])
        expect_each_honest_record(job, lane)


def expect_nothing_outside(touched: set[str], allowed: Iterable[Path]) -> None:
    """Check that of these paths, all belong to Python, to its packages, or to the folders that are allowed."""
    folders = [*_ENDS, *map(str, allowed), str(ROOT)]
    outside = {name for name in touched - _READ_BY_PYTHON if not any(map(Path(name).is_relative_to, folders))}
    assert not outside, f"outside the job's folder: {sorted(outside)[:20]}"


def expect_each_honest_record(job: Job, lane: str) -> None:
    """Check that a backend has each record of the honest site once, by a reader of its own."""
    from tests.e2e.stores import canonical, read_run, same_points

    logged = [
        Point(key, record.step, value, record.time)
        for record in job.honest_records
        for key, value in cast("Metrics", record.payload).values.items()
    ]
    found = read_run(lane, job.folder, JobInfo("job-1"), HONEST, Side.SERVER)
    same_points(found.points, canonical(lane, logged))


@pytest.mark.parametrize("name", ["/etc/passwd", "/proc/self/environ", "/usr/share/x", "../../x"])
def test_the_watch_sees_what_is_read_outside(tmp_path: Path, name: str) -> None:
    watch = Watch()
    for read in (Path(name).read_bytes, lambda: open(name.encode()).close(), lambda: os.open(name, os.O_RDONLY)):
        watch.inside, watch.outside = tmp_path, set()
        with contextlib.suppress(OSError):
            read()
        with pytest.raises(AssertionError, match="outside the job's folder"):
            expect_nothing_outside(watch.outside, [])
    watch.inside = None


ALL_BACKENDS: dict[str, dict[str, Any]] = {"jsonl": {}, "tensorboard": {}, "mlflow": {}, "wandb": {"mode": "offline"}}
PARTS = 50
"""The long form makes 100,000 requests in as many parts, so that one that fails can run again alone, by its name."""


@pytest.fixture(scope="module")
def sdk_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Folders for temporary files. W&B's SDK has one process for all jobs, which goes on to use that of the first.

    The SDK makes another one when it is imported, which an earlier test may have done.
    """
    folder = tmp_path_factory.mktemp("sdk")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        from wandb.sdk.data_types._private import MEDIA_TMP

        honest = Job(
            folder / "first", ALL_BACKENDS, flush_s=0.1
        )  # what an SDK does once is not the hostile site's doing
        honest.log_honestly()
        honest.finish(deadline_s=120)
        yield [folder, Path(MEDIA_TMP.name)]


@pytest.mark.parametrize("seed", range(3))
def test_random_requests_of_one_site_cost_the_other_nothing(tmp_path: Path, sdk_files: list[Path], seed: int) -> None:
    attack(tmp_path, seed, 400, ALL_BACKENDS, *sdk_files)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 100 + PARTS), ids=lambda seed: f"part-{seed - 99}-of-{PARTS}")
def test_100_000_random_requests_of_one_site_cost_the_other_nothing(
    tmp_path: Path, sdk_files: list[Path], seed: int
) -> None:
    attack(tmp_path, seed, 100_000 // PARTS, ALL_BACKENDS, *sdk_files)


odd_values = st.recursive(
    st.sampled_from([value for value in EDGES if not isinstance(value, list | dict)])
    | st.floats()
    | st.integers(-(2**63), 2**64 - 1)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)
"""What msgpack can hold, and a bit of what a record can."""


@st.composite
def odd_frames(draw: st.DrawFn, seq: int) -> bytes:
    """A frame with the right checksum and number. Its fields are right, or nearly, or anything."""
    kind = draw(st.sampled_from([k for k in Kind if k is not Kind.GAP]))
    fields = [draw(st.just(field) | odd_values) for field in _FIELDS[kind]]
    says = draw(st.sampled_from([kind, kind, Kind.METRICS, 42]))
    return frame(
        says, record(seq, kind, *fields, time=draw(st.just(1.0) | odd_values), step=draw(st.just(1) | odd_values))
    )


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 6))
def test_what_the_gate_lets_pass_it_lets_pass_again_whatever_comes(data: st.DataObject, size: int) -> None:
    frames = [data.draw(odd_frames(seq)) for seq in range(size)]

    found = examine(batch(frames), KnownKeys(), no_file)

    assert isinstance(found, Contents)
    assert found.batch.records + len(found.refused) == size
    passed = [part for seq, part in enumerate(frames) if seq not in dict(found.refused)]
    assert found.batch.frames == b"".join(passed)
    for part in scan_frames(found.batch.frames):
        if part.kind in _FIELDS:
            check_record(STREAM, part.kind, found.batch.frames[part.body : part.end], KnownKeys())
    assert all(re.fullmatch(rf"{STREAM}-\d", name) for name in found.blobs)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400), st.integers(0, 255))
def test_bytes_put_anywhere_into_a_batch_raise_nothing_in_the_gate(extra: bytes, at: int, byte: int) -> None:
    good = b"".join(metrics(seq) for seq in range(5))
    for changed in (good[:at] + extra + good[at:], good[:at] + bytes([byte]) + good[at + 1 :], good[:at]):
        found = examine(wire.Batch(STREAM, 0, 5, 5, changed), KnownKeys(), no_file)
        if changed != good:
            assert isinstance(found, wire.Refused)
