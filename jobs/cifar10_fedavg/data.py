# SPDX-License-Identifier: Apache-2.0
"""Images for the CIFAR-10 job: where they come from, which of them a site gets, and batches to train on.

Images are kept as one uint8 tensor ``[N, 3, 32, 32]``, decoded once per machine into memory-mapped files that all
sites on that machine share, and are normalised and augmented batch by batch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import sqlite3
import tempfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

__all__ = [
    "CLASSES",
    "DATASETS",
    "DATA_ROOT_ENV",
    "PARTITIONS",
    "DataError",
    "DataSet",
    "Images",
    "augment",
    "batches",
    "load",
    "normalise",
    "partition",
    "prepare",
    "site_index",
]

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASETS = ("auto", "cifar10", "synthetic")
PARTITIONS = ("same", "iid", "dirichlet")

DATA_ROOT_ENV = "TRACKHUB_DATA_ROOT"
SIZE = 32
SYNTHETIC_TRAIN, SYNTHETIC_TEST = 8000, 2000

_BATCHES_DIR = "cifar-10-batches-py"
_SUFFIXES = (".jpg", ".jpeg", ".png")
_NETWORK_TIMEOUT_S = 5.0
"""Longest wait for a connection and for each piece of the download: a machine without internet should learn it soon."""
_LOCK_TIMEOUT_S = 1800.0
"""Longest wait for another process that downloads (170 MB) or decodes; its death releases the lock at once."""

# Mean and deviation of CIFAR-10's training pixels by channel, 0..255; FLARE's CIFAR-10 examples use the same.
_MEAN = torch.tensor([125.3, 123.0, 113.9]).view(1, 3, 1, 1)
_STD = torch.tensor([63.0, 62.1, 66.7]).view(1, 3, 1, 1)


class DataError(Exception):
    """The images asked for cannot be had, or cannot be divided as asked."""


class Images(NamedTuple):
    """pixels: uint8 [N, 3, 32, 32]; labels: int64 [N], indices into ``CLASSES``."""

    pixels: Tensor
    labels: Tensor

    def subset(self, indices: Tensor) -> Images:
        """Return a copy of these images, in memory."""
        return Images(self.pixels[indices], self.labels[indices])


class DataSet(NamedTuple):
    """name: ``cifar10`` or ``synthetic``; origin: a line for people that says where the images came from."""

    name: str
    origin: str
    train: Images
    test: Images


def load(dataset: str, data_root: Path | None = None, *, seed: int = 0) -> DataSet:
    """Return the images. ``auto`` says in one line on stdout when, and why, it falls back to synthetic ones.

    Args:
        dataset: ``auto``, ``cifar10`` or ``synthetic``.
        data_root: holds torchvision's ``cifar-10-batches-py``, or an image folder ``train/<class>/*`` and
            ``test/<class>/*``. None: ``TRACKHUB_DATA_ROOT``, else a folder in the user's cache.
        seed: of the synthetic images; sites of one job must use the same.

    Raises:
        DataError: ``cifar10`` is neither there nor can be downloaded, or the folder is not in a known layout.
    """
    if dataset == "synthetic":
        return synthetic(seed)
    try:
        root = prepare(data_root)
    except DataError as error:
        if dataset == "cifar10":
            raise
        print(f"Using synthetic images: no CIFAR-10 ({error})", flush=True)
        return synthetic(seed)
    return _load_cifar10(root)


def prepare(data_root: Path | None = None) -> Path:
    """Make sure that CIFAR-10 is there, downloading it if need be, and return its folder.

    Safe when several processes call it at once: one downloads, the others wait for it.

    Raises:
        DataError: it is not there and cannot be downloaded.
    """
    named = data_root or (Path(os.environ[DATA_ROOT_ENV]) if os.environ.get(DATA_ROOT_ENV) else None)
    root = (named or _cache_dir() / "cifar10").expanduser().resolve()
    if root.name == _BATCHES_DIR:
        root = root.parent
    if _layout(root) is None:
        cache = _cache_dir()
        lock = cache / f"download-{hashlib.sha256(str(root).encode()).hexdigest()[:16]}.lock"
        try:
            cache.mkdir(parents=True, exist_ok=True)
            with _locked(lock):
                if _layout(root) is None:
                    _download(root)
        except OSError as error:
            reason = getattr(error, "reason", None) or error
            raise DataError(f"there is none in {root}, and it cannot be downloaded: {reason}") from error
    return root


def synthetic(seed: int, n_train: int = SYNTHETIC_TRAIN, n_test: int = SYNTHETIC_TEST) -> DataSet:
    """Make images in ten classes that a small network can learn, but not at once. The same for the same seed.

    Each class is a smooth pattern of colour. An image shows its class's pattern moved by some pixels, at some
    contrast, mixed with a weaker pattern of another class and with noise.
    """
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.standard_normal((len(CLASSES), 3, 6, 6), dtype=np.float32))
    smooth = functional.interpolate(coarse, size=(SIZE, SIZE), mode="bicubic")
    patterns = (smooth / smooth.std(dim=(1, 2, 3), keepdim=True)).numpy()

    def draw(n: int) -> Images:
        labels = rng.permutation(np.arange(n) % len(CLASSES))
        others = (labels + rng.integers(1, len(CLASSES), n)) % len(CLASSES)
        contrast = rng.uniform(10, 40, (n, 1, 1, 1)).astype(np.float32)
        mixture = contrast * (_shifted(patterns[labels], rng) + 0.7 * _shifted(patterns[others], rng))
        noise = rng.standard_normal(mixture.shape, dtype=np.float32) * 40
        pixels = np.clip(128 + mixture + noise, 0, 255).astype(np.uint8)
        return Images(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))

    return DataSet("synthetic", f"{n_train} + {n_test} synthetic images, seed {seed}", draw(n_train), draw(n_test))


def _shifted(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the images, each rolled by up to 6 pixels in both directions."""
    rows, columns = ((np.arange(SIZE) + rng.integers(-6, 7, (len(pixels), 1))) % SIZE for _ in range(2))
    moved: np.ndarray = pixels[np.arange(len(pixels))[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return moved.transpose(0, 3, 1, 2)


def partition(
    labels: Tensor, n_sites: int, scheme: str = "same", *, alpha: float = 0.5, seed: int = 0, limit: int | None = None
) -> list[Tensor]:
    """Divide a training set among sites; the same division on every site that passes the same arguments.

    Args:
        labels: int64 [N], the classes of all training images.
        scheme: ``same``: every site gets all images, as in FLARE's example. ``iid``: disjoint random shares of equal
            size. ``dirichlet``: each class is shared out in proportions drawn from a Dirichlet distribution.
        alpha: of the Dirichlet distribution; the smaller, the more the sites differ.
        limit: most images per site; a random choice of its share.

    Returns:
        For each site the indices of its images, int64, in random order.

    Raises:
        DataError: the scheme is unknown, or a site would get no image.
    """
    rng = np.random.default_rng(seed)
    n = len(labels)
    if scheme == "same":
        shares = [rng.permutation(n)] * n_sites
    elif scheme == "iid":
        shares = np.array_split(rng.permutation(n), n_sites)
    elif scheme == "dirichlet":
        if not alpha > 0:
            raise DataError(f"alpha is {alpha}; a Dirichlet distribution needs one above 0")
        shares = _dirichlet(labels.numpy(), n_sites, alpha, rng)
    else:
        raise DataError(f"unknown partition {scheme!r}; it is one of {', '.join(PARTITIONS)}")
    if not all(len(share) for share in shares):
        raise DataError(f"{scheme} with {n_sites} sites and {n} images leaves a site without any")
    return [torch.from_numpy(share[:limit].copy()) for share in shares]


def _dirichlet(labels: np.ndarray, n_sites: int, alpha: float, rng: np.random.Generator) -> list[np.ndarray]:
    shares: list[list[np.ndarray]] = [[] for _ in range(n_sites)]
    for label in range(len(CLASSES)):
        members = rng.permutation(np.flatnonzero(labels == label))
        cuts = np.cumsum(rng.dirichlet([alpha] * n_sites))[:-1] * len(members)
        for share, part in zip(shares, np.split(members, cuts.astype(int)), strict=True):
            share.append(part)
    return [rng.permutation(np.concatenate(share)) for share in shares]


def site_index(site: str, n_sites: int) -> int:
    """Return which share is this site's, counted from 0: its name's number less one, as in FLARE's ``site-1``.

    Raises:
        DataError: the name does not end in a number from 1 to ``n_sites``.
    """
    number = re.search(r"\d+$", site)
    if number is None or not 1 <= int(number[0]) <= n_sites:
        raise DataError(
            f"cannot tell the share of site {site!r}: with --partition iid or dirichlet, "
            f"site names must end in a number from 1 to {n_sites}, as site-1"
        )
    return int(number[0]) - 1


def batches(images: Images, batch_size: int, generator: torch.Generator) -> Iterator[Images]:
    """Yield the images once, in random order, in batches; the last one may be smaller."""
    for indices in torch.randperm(len(images.labels), generator=generator).split(batch_size):
        yield images.subset(indices)


def augment(pixels: Tensor, generator: torch.Generator, pad: int = 2) -> Tensor:
    """Return the images, each mirrored with probability one half and moved by up to ``pad`` pixels.

    Args:
        pixels: uint8 [N, 3, 32, 32].
        pad: what enters at the border is mirrored from the inside.
    """
    n = len(pixels)
    span = torch.arange(SIZE)
    rows = torch.randint(2 * pad + 1, (n, 1), generator=generator) + span
    columns = torch.randint(2 * pad + 1, (n, 1), generator=generator) + span
    mirrored = torch.randint(2, (n, 1), generator=generator).bool()
    columns = torch.where(mirrored, columns.flip(1), columns)
    padded = functional.pad(pixels.float(), (pad, pad, pad, pad), mode="reflect").to(torch.uint8)
    picked = padded[torch.arange(n).view(n, 1, 1), :, rows.view(n, SIZE, 1), columns.view(n, 1, SIZE)]
    return picked.permute(0, 3, 1, 2)


def normalise(pixels: Tensor) -> Tensor:
    """Return float32 of the same shape, each channel with about zero mean and unit deviation."""
    return (pixels.float() - _MEAN) / _STD


def _layout(root: Path) -> str | None:
    if (root / _BATCHES_DIR).is_dir():
        return "torchvision"
    return "folder" if (root / "train").is_dir() and (root / "test").is_dir() else None


def _download(root: Path) -> None:
    """Download with torchvision's address, checksum and unpacking, and show the folder only when it is complete.

    The bytes are fetched here because torchvision sets no timeout on its connection.
    """
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    with urllib.request.urlopen(CIFAR10.url, timeout=_NETWORK_TIMEOUT_S) as response:
        print(f"Downloading CIFAR-10 from {CIFAR10.url} to {root}", flush=True)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".downloading-", dir=root) as folder:
            archive = Path(folder) / CIFAR10.filename
            with archive.open("wb") as out:
                shutil.copyfileobj(response, out)
            if not check_integrity(str(archive), CIFAR10.tgz_md5):
                raise DataError(f"what {CIFAR10.url} returned fails its checksum; try again")
            CIFAR10(folder, download=True)
            os.replace(Path(folder) / _BATCHES_DIR, root / _BATCHES_DIR)


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "trackhub"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock between processes. SQLite's lock on the file goes when its holder dies, so none is ever stale."""
    connection = sqlite3.connect(path, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
    try:
        connection.execute("BEGIN EXCLUSIVE")
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"cannot lock {path}: {error}") from error
    finally:
        connection.close()


def _load_cifar10(root: Path) -> DataSet:
    """Return CIFAR-10 from memory-mapped files in the user's cache, made by the first process that needs them."""
    cache = _cache_dir()
    decoded = cache / f"cifar10-{_fingerprint(root)}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / "cifar10.lock"):
            if not decoded.is_dir():
                _decode_into(decoded, root)
    except OSError as error:
        raise DataError(
            f"decoded images cannot be kept in {cache}: {error}; name another folder in XDG_CACHE_HOME"
        ) from error

    def mapped(name: str) -> Tensor:
        # Copy on write: sites on one machine share the pages, and torch takes no tensors that it may not write.
        return torch.from_numpy(np.load(decoded / name, mmap_mode="c"))

    train, test = (Images(mapped(f"{split}-pixels.npy"), mapped(f"{split}-labels.npy")) for split in ("train", "test"))
    return DataSet("cifar10", f"CIFAR-10 from {root}", train, test)


def _fingerprint(root: Path) -> str:
    """Return a hash of the files' names, sizes and times, so that other images are never taken for these."""
    digest = hashlib.sha256(str(root).encode())
    folders = [root / _BATCHES_DIR] if _layout(root) == "torchvision" else _class_folders(root)
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                stat = entry.stat()
                digest.update(f"{folder.name}/{entry.name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _decode_into(target: Path, root: Path) -> None:
    """Write ``{train,test}-{pixels,labels}.npy``; the folder appears when all are complete."""
    print(f"Decoding CIFAR-10 from {root}, once", flush=True)
    read = _read_torchvision if _layout(root) == "torchvision" else _read_folder
    unfinished = Path(tempfile.mkdtemp(prefix=".decoding-", dir=target.parent))
    try:
        for split in ("train", "test"):
            images = read(root, split)
            np.save(unfinished / f"{split}-pixels.npy", images.pixels.numpy())
            np.save(unfinished / f"{split}-labels.npy", images.labels.numpy())
        os.replace(unfinished, target)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _read_torchvision(root: Path, split: str) -> Images:
    from torchvision.datasets import CIFAR10

    try:
        stored = CIFAR10(str(root), train=split == "train")
    except RuntimeError as error:
        raise DataError(f"{root / _BATCHES_DIR} is damaged ({error}); delete it to have it downloaded anew") from error
    pixels = np.ascontiguousarray(stored.data.transpose(0, 3, 1, 2))
    return Images(torch.from_numpy(pixels), torch.tensor(stored.targets))


def _read_folder(root: Path, split: str) -> Images:
    from PIL import Image

    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for folder in _class_folders(root, split):
        for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in _SUFFIXES):
            try:
                with Image.open(path) as image:
                    if image.size != (SIZE, SIZE):
                        width, height = image.size
                        raise DataError(f"{path} is {width} x {height} pixels, expected {SIZE} x {SIZE}")
                    pixels.append(np.asarray(image.convert("RGB")))
            except OSError as error:
                raise DataError(f"{path} cannot be decoded: {error}") from error
            labels.append(CLASSES.index(folder.name))
    return Images(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels))


def _class_folders(root: Path, *splits: str) -> list[Path]:
    folders = [root / split / name for split in splits or ("train", "test") for name in CLASSES]
    for folder in folders:
        if not any(path.suffix.lower() in _SUFFIXES for path in folder.glob("*")):
            raise DataError(
                f"{folder} has no images; an image folder has train/<class>/* and test/<class>/*, "
                f"for the classes {', '.join(CLASSES)}"
            )
    return folders
