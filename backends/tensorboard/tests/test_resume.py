# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from backends.tensorboard.tests.conftest import JOB
from trackhub.spi import Entry, Image, Metrics, Params, RunStatus, Text, TransientError

if TYPE_CHECKING:
    from backends.tensorboard.tests.conftest import Rig

Read = Callable[[Path], EventAccumulator]
MakeEntry = Callable[..., Entry]

WRITE_UNTIL_KILLED = """
import sys
from pathlib import Path
from trackhub.spi import BackendContext, Entry, JobInfo, Metrics, RunInfo, Side
from trackhub_tensorboard import TensorBoardBackend, TensorBoardOptions

root, job = Path(sys.argv[1]), JobInfo(*sys.argv[2:])
backend = TensorBoardBackend(TensorBoardOptions(), BackendContext(root, job, Side.SERVER))
run = backend.open_run(RunInfo(job, "site-1", Side.SERVER, 1000.0, 0, root))
position = run.next_position()
while True:
    run.write([Entry(p, 1000.0, p, None, Metrics({"x": float(p)}), "s", p) for p in range(position, position + 200)])
    position += 200
    print(position, flush=True)
"""


def steps(accumulator: EventAccumulator, key: str = "x") -> list[int]:
    return [event.step for event in accumulator.Scalars(key)]


def event_files(rig: Rig) -> list[Path]:
    return sorted(rig.folder().glob("*.trackhub"))


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Make the kernel act as on a full disk: it writes what fits, and fails if nothing does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_new_run_stands_at_zero_and_has_no_file_yet(rig: Rig) -> None:
    run = rig.open()

    assert run.next_position() == 0
    assert list(rig.folder().iterdir()) == []


def test_a_reopened_run_goes_on_after_its_last_record(rig: Rig, entry: MakeEntry, read: Read) -> None:
    run = rig.open()
    run.write([entry(0, Metrics({"x": 0.0})), entry(7, Metrics({"x": 7.0}))])
    run.finish(RunStatus.FINISHED)

    again = rig.open()

    assert again.next_position() == 8
    again.write([entry(8, Metrics({"x": 8.0}))])
    assert steps(read(rig.folder())) == [0, 7, 8]


def test_wherever_a_crash_cuts_the_file_every_record_is_in_it_once_in_the_end(
    make_rig: Callable[..., Rig], entry: MakeEntry, read: Read
) -> None:
    source = make_rig("source")
    entries = [entry(p, Metrics({"x": float(p)}) if p % 5 else Text("note", "n" * p)) for p in range(60)]
    run = source.open()
    for start in range(0, 60, 10):
        run.write(entries[start : start + 10])
    (path,) = event_files(source)
    whole = path.read_bytes()
    generator = random.Random(20)
    cuts = {0, 1, 11, 12, len(whole) - 1, len(whole), *generator.sample(range(len(whole)), 60)}

    for cut in sorted(cuts):
        rig = make_rig(f"cut-{cut}")
        rig.folder().mkdir(parents=True)
        (rig.folder() / path.name).write_bytes(whole[:cut])
        reopened = rig.open()
        stands = reopened.next_position()
        assert stands % 10 == 0
        for rest in (entries[stands : stands + 7], entries[stands + 7 :]):
            if rest:
                reopened.write(rest)
        accumulator = read(rig.folder())
        assert steps(accumulator) == [p for p in range(60) if p % 5], f"cut at {cut}"
        assert [event.step for event in accumulator.Tensors("note")] == list(range(0, 60, 5)), f"cut at {cut}"


@pytest.mark.parametrize("tail", [b"\0" * 4096, b"\xff" * 100, bytes(range(256))], ids=["zeros", "ones", "garbage"])
def test_a_tail_of_garbage_is_cut_off(rig: Rig, entry: MakeEntry, read: Read, tail: bytes) -> None:
    rig.open().write([entry(0, Metrics({"x": 0.0}))])
    (path,) = event_files(rig)
    path.write_bytes(path.read_bytes() + tail)

    run = rig.open()

    assert run.next_position() == 1
    run.write([entry(1, Metrics({"x": 1.0}))])
    assert steps(read(rig.folder())) == [0, 1]


def test_a_killed_process_loses_nothing_that_was_confirmed(rig: Rig, entry: MakeEntry, read: Read) -> None:
    confirmed = 0
    for attempt in range(3):
        command = [sys.executable, "-c", WRITE_UNTIL_KILLED, str(rig.workdir), JOB.id, JOB.name]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                confirmed = int(line)
                if confirmed >= 3000 * (attempt + 1):
                    break
            process.send_signal(signal.SIGKILL)
            for line in process.stdout:
                confirmed = int(line)

    run = rig.open()

    stands = run.next_position()
    assert stands >= confirmed
    assert steps(read(rig.folder())) == list(range(stands))


def test_after_a_full_disk_the_batch_can_be_written_again(rig: Rig, entry: MakeEntry, read: Read) -> None:
    """The file ends with its last whole batch until then."""
    run = rig.open()
    run.write([entry(0, Metrics({"x": 0.0}))])
    (path,) = event_files(rig)
    size = path.stat().st_size
    batch = [entry(p, Metrics({"x": float(p)})) for p in range(1, 500)]

    for limit in (size + 100, size):
        with files_no_larger_than(limit), pytest.raises(TransientError, match=r"cannot write to .*site-1"):
            run.write(batch)
        assert path.stat().st_size == size
    assert run.next_position() == 1

    run.write(batch)
    run.finish(RunStatus.FINISHED)
    assert steps(read(rig.folder())) == list(range(500))
    assert rig.open().next_position() == 500


def test_a_disk_that_was_full_from_the_start_leaves_no_empty_file(rig: Rig, entry: MakeEntry, read: Read) -> None:
    run = rig.open()

    with files_no_larger_than(10), pytest.raises(TransientError):
        run.write([entry(0, Metrics({"x": 0.0}))])

    assert event_files(rig) == []
    run.write([entry(0, Metrics({"x": 0.0}))])
    assert steps(read(rig.folder())) == [0]


def test_a_failure_between_pieces_of_large_images_repeats_no_piece(rig: Rig, entry: MakeEntry, read: Read) -> None:
    large = rig.blob("large", bytes(5 << 20))
    batch = [entry(p, Image("i", large, 1, 1)) for p in range(5)]
    run = rig.open()

    with files_no_larger_than(15 << 20), pytest.raises(TransientError):
        run.write(batch)
    stored = run.next_position()
    run.write(batch)

    assert 0 < stored < 5
    assert [event.step for event in read(rig.folder()).Tensors("i")] == list(range(5))


def test_files_of_others_in_the_folder_are_left_alone(rig: Rig, entry: MakeEntry) -> None:
    rig.folder().mkdir(parents=True)
    foreign = rig.folder() / "events.out.tfevents.1764000000.host.1.0"
    foreign.write_bytes(b"not ours")

    rig.open().write([entry(0, Metrics({"x": 0.0}))])
    rig.open()

    assert foreign.read_bytes() == b"not ours"


def test_params_that_a_crash_interrupted_are_logged_again(rig: Rig, entry: MakeEntry, read: Read) -> None:
    run = rig.open()
    run.write([entry(0, Params({"a": 1}))])
    with files_no_larger_than(2000), pytest.raises(TransientError):
        run.write([entry(1, Params({"b": 2})), entry(2, Text("t", "x" * 5000))])

    again = rig.open()

    assert again.next_position() == 1
    again.write([entry(1, Params({"b": 2})), entry(2, Text("t", "x"))])
    assert [event.step for event in read(rig.folder()).Tensors("params")] == [0, 1]
