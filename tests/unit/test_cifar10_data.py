# SPDX-License-Identifier: Apache-2.0
"""Where the CIFAR-10 job's images come from, and who gets which."""

from __future__ import annotations

import hashlib
import http.server
import io
import pickle
import socket
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import client
import data
import flags
import numpy as np
import partition
import pytest
import synthetic
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.utils.data import TensorDataset
from torchvision.datasets import CIFAR10

import trackhub


def load(dataset: str, data_root: Path | None = None) -> tuple[str, TensorDataset, TensorDataset]:
    """Return the images that these flags ask for."""
    return data.load(flags.client_args(["--dataset", dataset, *(["--data_root", str(data_root)] if data_root else [])]))


def pixels(images: TensorDataset) -> Tensor:
    """Return the pixels of all images."""
    return images.tensors[0]


def labels(images: TensorDataset) -> list[int]:
    """Return the labels of all images."""
    found: list[int] = images.tensors[1].tolist()
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, and no data root from the environment."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(data.DATA_ROOT_ENV, raising=False)
    return tmp_path / "cache" / "trackhub"


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two training images and one test image per class, with random pixels."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("test", 1)):
        for name in data.CLASSES:
            folder = tmp_path / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:04}.png")
    return tmp_path / "images"


class _Server(http.server.ThreadingHTTPServer):
    body = b""
    requests = 0


class _Handler(http.server.BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests += 1
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.server.body)))
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *_: object) -> None:
        """Keep the test's output clean."""


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Server]:
    """A mirror on loopback of a tiny CIFAR-10 in torchvision's layout, whose address torchvision is given."""
    rng = np.random.default_rng(1)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    files = {
        name: pickle.dumps({"data": rng.integers(0, 256, (10, 3072), dtype=np.uint8), "labels": list(range(10))})
        for name in names
    }
    files["batches.meta"] = pickle.dumps({"label_names": list(data.CLASSES)})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    md5 = {name: hashlib.md5(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(packed.getvalue()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5[name]] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5["batches.meta"]})

    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.body = packed.getvalue()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{server.server_port}/{CIFAR10.filename}")
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make a second of training a minute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torchvision's address is one where nobody listens."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/{CIFAR10.filename}")


def test_synthetic_images_are_the_same_for_the_same_seed_and_differ_for_another() -> None:
    first, again, other = synthetic.synthetic(3), synthetic.synthetic(3), synthetic.synthetic(4)

    assert torch.equal(pixels(first[0]), pixels(again[0]))
    assert labels(first[1]) == labels(again[1])
    assert not torch.equal(pixels(first[0]), pixels(other[0]))


def test_synthetic_images_have_the_shape_of_cifar_10_and_all_ten_classes_equally_often() -> None:
    train, test = synthetic.synthetic(0)

    assert pixels(train).shape == (8000, 3, 32, 32)
    assert pixels(train).dtype == torch.uint8
    assert torch.bincount(train.tensors[1]).tolist() == [800] * 10
    assert torch.bincount(test.tensors[1]).tolist() == [200] * 10


def test_synthetic_images_can_be_learned(monkeypatch: pytest.MonkeyPatch, one_torch_thread: None) -> None:
    train, test = synthetic.synthetic(0)
    monkeypatch.setattr(data, "load", lambda _: ("synthetic", train, TensorDataset(*test[:200])))
    monkeypatch.setenv("TRACKHUB_MODE", "disabled")
    args = flags.client_args(["--num_rounds", "3", "--samples_per_site", "600"])
    site = client.Site(args, "site-1", trackhub.Writer())

    before = site.validate(0)
    for round_number in range(args.num_rounds):
        site.train(round_number)
    after = site.validate(args.num_rounds)

    assert before["val/accuracy"] < 0.25
    assert after["val/accuracy"] > 0.4


def test_an_image_folder_is_read_pixel_by_pixel(image_folder: Path) -> None:
    name, train, test = load("cifar10", image_folder)

    assert name == "cifar10"
    assert labels(train) == [label for label in range(10) for _ in range(2)]
    with Image.open(image_folder / "train" / "cat" / "0001.png") as expected:
        assert np.array_equal(pixels(train)[3 * 2 + 1].permute(1, 2, 0).numpy(), np.asarray(expected))
    with Image.open(image_folder / "test" / "truck" / "0000.png") as expected:
        assert np.array_equal(pixels(test)[9].permute(1, 2, 0).numpy(), np.asarray(expected))


def test_images_are_decoded_once_for_all_sites_that_start_at_the_same_time(
    image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(lambda _: load("cifar10", image_folder), range(4)))

    assert capsys.readouterr().out.count("Decoding") == 1
    assert all(torch.equal(pixels(train), pixels(loaded[0][1])) for _, train, _ in loaded)


def test_a_changed_image_is_decoded_anew(image_folder: Path) -> None:
    load("cifar10", image_folder)
    Image.new("RGB", (32, 32), (1, 2, 3)).save(image_folder / "train" / "airplane" / "0000.png")

    _, train, _ = load("cifar10", image_folder)

    assert pixels(train)[0, :, 5, 5].tolist() == [1, 2, 3]


def test_images_changed_in_memory_do_not_change_for_others(image_folder: Path) -> None:
    _, train, _ = load("cifar10", image_folder)
    original = pixels(train)[0].clone()

    pixels(train)[0] = 0

    assert torch.equal(pixels(load("cifar10", image_folder)[1])[0], original)


def test_the_environment_names_the_data_root(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_ROOT_ENV, str(image_folder))

    assert len(load("auto")[1]) == 20


def test_a_class_without_images_is_named(image_folder: Path) -> None:
    for path in (image_folder / "train" / "ship").iterdir():
        path.unlink()

    with pytest.raises(data.DataError, match=r"images cannot be decoded: .* classes ship"):
        load("cifar10", image_folder)


def test_a_missing_class_is_an_error_and_shifts_no_label(image_folder: Path) -> None:
    for path in (image_folder / "test" / "ship").iterdir():
        path.unlink()
    (image_folder / "test" / "ship").rmdir()

    with pytest.raises(data.DataError, match=r"images/test has the classes .*'horse', 'truck'\], expected .*'ship'"):
        load("cifar10", image_folder)


def test_an_image_of_another_size_is_named(image_folder: Path, cache: Path) -> None:
    Image.new("RGB", (48, 16)).save(image_folder / "test" / "frog" / "0000.png")

    with pytest.raises(data.DataError, match=r"test/frog/0000.png is 48 x 16 pixels, expected 32 x 32"):
        load("cifar10", image_folder)
    assert list(cache.glob("*.pt")) == []


def test_a_damaged_image_is_named(image_folder: Path) -> None:
    (image_folder / "train" / "dog" / "0001.png").write_bytes(b"not an image")

    with pytest.raises(data.DataError, match=r"train/dog/0001.png cannot be decoded"):
        load("cifar10", image_folder)


def test_a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))

    with pytest.raises(data.DataError, match="name another folder in XDG_CACHE_HOME"):
        load("cifar10", image_folder)


@pytest.mark.usefixtures("no_network")
def test_auto_says_in_one_line_that_it_uses_synthetic_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, _, _ = load("auto", tmp_path / "nothing")

    lines = capsys.readouterr().out.splitlines()
    assert name == "synthetic"
    assert len(lines) == 1
    assert lines[0].startswith("Using synthetic images: there is no CIFAR-10 in ")
    assert not (tmp_path / "nothing").exists()


@pytest.mark.usefixtures("no_network")
def test_cifar10_that_cannot_be_had_is_an_error_and_not_synthetic(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"no CIFAR-10 in .*nothing, and it cannot be downloaded: .*refused"):
        load("cifar10", tmp_path / "nothing")


def test_a_server_that_does_not_answer_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "NETWORK_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{silent.getsockname()[1]}/{CIFAR10.filename}")

        with pytest.raises(data.DataError, match="timed out"):
            data.prepare(tmp_path)


def test_several_processes_that_start_at_once_download_once(
    mirror: _Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "new" / "root"

    with ThreadPoolExecutor(4) as pool:
        found = set(pool.map(lambda _: data.prepare(root), range(4)))

    assert found == {root}
    assert capsys.readouterr().out.count("Downloading") == 1
    assert [path.name for path in root.iterdir()] == ["cifar-10-batches-py"]


def test_torchvisions_layout_is_read_as_torchvision_reads_it(mirror: _Server, tmp_path: Path) -> None:
    _, train, test = load("cifar10", tmp_path)

    expected = CIFAR10(str(tmp_path), train=True)
    assert np.array_equal(pixels(train).permute(0, 2, 3, 1).numpy(), expected.data)
    assert labels(train) == expected.targets
    assert len(test) == 10


def test_the_batches_folder_itself_may_be_named(mirror: _Server, tmp_path: Path) -> None:
    root = data.prepare(tmp_path)
    requests = mirror.requests

    assert data.prepare(root / "cifar-10-batches-py") == root
    assert mirror.requests == requests


def test_a_download_that_fails_its_checksum_leaves_nothing(mirror: _Server, tmp_path: Path) -> None:
    mirror.body += b"torn"

    with pytest.raises(data.DataError, match=r"cannot be downloaded: .*corrupted"):
        data.prepare(tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_killed_site_does_not_hold_up_the_others(image_folder: Path, cache: Path) -> None:
    cache.mkdir(parents=True)
    script = (
        f"from filelock import FileLock\n"
        f"with FileLock({str(cache / 'cifar10.lock')!r}):\n    print('held', flush=True); input()"
    )
    with (
        ThreadPoolExecutor(1) as pool,
        subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as holder,
    ):
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        loading = pool.submit(load, "cifar10", image_folder)
        with pytest.raises(TimeoutError):
            loading.result(0.2)
        holder.kill()
        holder.wait()

        assert len(loading.result(60)[1]) == 20


# In place of pixels, an image's number.
NUMBERED = TensorDataset(torch.arange(500), torch.arange(500) % 10)


def shares(n_sites: int, scheme: str, *argv: str) -> list[TensorDataset]:
    """Return every site's share of the numbered images."""
    args = flags.client_args(["--n_clients", str(n_sites), "--partition", scheme, *argv])
    return [partition.share(NUMBERED, f"site-{number}", args) for number in range(1, n_sites + 1)]


def numbers(share: TensorDataset) -> list[int]:
    """Return which images these are."""
    found: list[int] = share.tensors[0].tolist()
    return found


def test_same_gives_every_site_all_images() -> None:
    assert all(sorted(numbers(share)) == list(range(500)) for share in shares(3, "same"))


@settings(max_examples=50, deadline=None)
@given(
    scheme=st.sampled_from(["iid", "dirichlet"]),
    n_sites=st.integers(1, 5),
    alpha=st.floats(0.3, 100),
    seed=st.integers(0, 2**32),
)
def test_iid_and_dirichlet_give_each_image_to_exactly_one_site(
    scheme: str, n_sites: int, alpha: float, seed: int
) -> None:
    divided = shares(n_sites, scheme, "--alpha", str(alpha), "--seed", str(seed))

    assert sorted(number for share in divided for number in numbers(share)) == list(range(500))


def test_iid_shares_are_of_equal_size_and_alike() -> None:
    first, second = shares(2, "iid")

    assert len(first) == len(second) == 250
    assert torch.bincount(first.tensors[1]).min() > 10


def test_a_small_alpha_makes_sites_differ_and_a_large_one_makes_them_alike() -> None:
    def spread(alpha: float) -> float:
        divided = shares(2, "dirichlet", "--alpha", str(alpha))
        counts = torch.stack([torch.bincount(share.tensors[1], minlength=10) for share in divided]).float()
        return float((counts[0] - counts[1]).abs().mean())

    assert spread(0.1) > 25 > 5 > spread(10_000)


def test_every_site_computes_the_same_division() -> None:
    for scheme in ("same", "iid", "dirichlet"):
        once, again = (shares(2, scheme, "--seed", "7") for _ in range(2))
        assert [numbers(share) for share in once] == [numbers(share) for share in again]


def test_a_limit_bounds_each_share_to_a_random_choice_of_it() -> None:
    whole = shares(2, "iid")
    limited = shares(2, "iid", "--samples_per_site", "30")

    assert [len(share) for share in limited] == [30, 30]
    assert all(set(numbers(few)) <= set(numbers(all_)) for few, all_ in zip(limited, whole, strict=True))


def test_an_impossible_division_is_refused() -> None:
    with pytest.raises(data.DataError, match="leave a site without any"):
        shares(501, "iid")


def test_a_sites_share_follows_from_the_number_in_its_name() -> None:
    args = flags.client_args(["--partition", "iid", "--n_clients", "12"])
    divided = shares(12, "iid")

    for name, index in (("site-1", 0), ("hospital_2", 1), ("s12", 11)):
        assert numbers(partition.share(NUMBERED, name, args)) == numbers(divided[index])


@pytest.mark.parametrize("name", ["site-0", "site-3", "hospital", ""])
def test_a_site_name_without_a_usable_number_is_refused(name: str) -> None:
    args = flags.client_args(["--partition", "iid", "--n_clients", "2"])

    with pytest.raises(data.DataError, match=r"must end in a number from 1 to 2"):
        partition.share(NUMBERED, name, args)


def test_any_site_name_will_do_where_all_have_the_same_images() -> None:
    assert len(partition.share(NUMBERED, "hospital", flags.client_args([]))) == 500


def test_batches_hold_every_image_once_in_an_order_that_the_seed_decides() -> None:
    images = TensorDataset(torch.zeros(10, 3, 32, 32, dtype=torch.uint8), torch.arange(10))

    def order(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        return [found.tolist() for _, found in data.batches(images, 4, shuffle=True)]

    assert [len(batch) for batch in order(0)] == [4, 4, 2]
    assert sorted(label for batch in order(0) for label in batch) == list(range(10))
    assert order(0) == order(0) != order(1)
    assert [found.tolist() for _, found in data.batches(images, 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_augmented_images_are_the_originals_moved_and_mirrored() -> None:
    torch.manual_seed(0)
    images = pixels(synthetic.synthetic(0)[0])
    pad, views = 2, set()

    for batch in images[:240].split(8):
        augmented = data.augment(batch)
        assert augmented.shape == batch.shape
        assert augmented.dtype == torch.uint8
        padded = np.pad(batch.numpy(), ((0, 0), (0, 0), (pad, pad), (pad, pad)), mode="reflect")
        (view,) = [
            (y, x, mirrored)
            for y in range(2 * pad + 1)
            for x in range(2 * pad + 1)
            for mirrored in (1, -1)
            if np.array_equal(padded[:, :, y : y + 32, x : x + 32][:, :, :, ::mirrored], augmented.numpy())
        ]
        views.add(view)

    assert len(views) > 15
    assert {mirrored for _, _, mirrored in views} == {1, -1}


def test_normalised_cifar_colours_are_centred() -> None:
    grey = torch.tensor([125, 123, 114], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 32, 32)

    assert data.normalise(grey).abs().max() < 0.02
