# SPDX-License-Identifier: Apache-2.0
"""Images for the CIFAR-10 job: where they come from, which of them a site gets, and batches of them."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
import urllib.request
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from torch.nn import functional
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.io import decode_image
from torchvision.transforms import v2

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATASETS = ("auto", "cifar10", "synthetic")
PARTITIONS = ("same", "iid", "dirichlet")
DATA_ROOT_ENV = "TRACKHUB_DATA_ROOT"
NETWORK_TIMEOUT_S = 5.0

# They take whole batches, which is ten times as fast as image by image; all images of a batch are moved alike.
augment = v2.Compose([v2.RandomCrop(32, padding=2, padding_mode="reflect"), v2.RandomHorizontalFlip()])
normalise = v2.Compose(
    [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean=[0.491, 0.482, 0.447], std=[0.247, 0.244, 0.262])]
)


class DataError(Exception):
    """The images cannot be had, or cannot be divided among the sites."""


class Images(NamedTuple):
    """Two sets of pixels, uint8 [N, 3, 32, 32], and labels, int64 [N], which are indices into ``CLASSES``."""

    name: str
    origin: str
    train: TensorDataset
    test: TensorDataset


def load(dataset: str, data_root: Path | None = None, *, seed: int = 0) -> Images:
    """Return the images. Where ``auto`` finds no CIFAR-10, it says so in one line and takes synthetic ones.

    Args:
        dataset: one of ``DATASETS``.
        data_root: as for `prepare`.
        seed: of the synthetic images; all sites of a job must use the same.

    Raises:
        DataError: there is no CIFAR-10 and it cannot be downloaded, or a file of it cannot be read.
    """
    if dataset != "synthetic":
        try:
            root = prepare(data_root)
        except DataError as error:
            if dataset == "cifar10":
                raise
            print(f"Using synthetic images: no CIFAR-10 ({error})", flush=True)
        else:
            return Images("cifar10", f"CIFAR-10 from {root}", *decoded(root))
    return synthetic(seed)


def prepare(data_root: Path | None = None) -> Path:
    """Return the folder with CIFAR-10, and download it first if need be.

    Args:
        data_root: has torchvision's ``cifar-10-batches-py``, or an image folder ``train/<class>/*`` and
            ``test/<class>/*``. None: ``TRACKHUB_DATA_ROOT``, else a folder in the user's cache.

    Raises:
        DataError: CIFAR-10 is not there and cannot be downloaded.
    """
    root = Path(data_root or os.environ.get(DATA_ROOT_ENV) or cache() / "cifar10").expanduser().resolve()
    if root.name == CIFAR10.base_folder:
        root = root.parent
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    try:
        with FileLock(cache() / "cifar10.lock"):
            if not (root / CIFAR10.base_folder).is_dir():
                download(root)
    except (OSError, RuntimeError) as error:
        raise DataError(f"there is none in {root}, and it cannot be downloaded: {error}") from error
    return root


def download(root: Path) -> None:
    """Download CIFAR-10. The folder appears when it is complete, so that a site that is killed leaves no half of it."""
    # torchvision waits without limit, so this asks first whether the server answers at all.
    urllib.request.urlopen(CIFAR10.url, timeout=NETWORK_TIMEOUT_S).close()
    print(f"Downloading CIFAR-10 from {CIFAR10.url} to {root}", flush=True)
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".downloading-", dir=root) as partial:
        CIFAR10(partial, download=True)
        os.replace(Path(partial) / CIFAR10.base_folder, root / CIFAR10.base_folder)


def decoded(root: Path) -> list[TensorDataset]:
    """Return training and test images from a file of tensors that the first site on this machine writes."""
    # The file's name changes with any image, so that other images are never taken for these.
    names = glob.glob(f"{CIFAR10.base_folder}/*", root_dir=root) or glob.glob("t*/*/*", root_dir=root)
    stats = [(root / name, os.stat(root / name)) for name in sorted(names)]
    known = repr([(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats])
    path = cache() / f"cifar10-{hashlib.sha256(known.encode()).hexdigest()[:16]}.pt"
    try:
        with FileLock(cache() / "cifar10.lock"):
            if not path.is_file():
                print(f"Decoding CIFAR-10 from {root}, once", flush=True)
                torch.save([read(root, split) for split in ("train", "test")], path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot prepare {root} in {path.parent}: {error}") from error
    # Mapped, so that all sites on this machine share the memory.
    return [TensorDataset(*tensors) for tensors in torch.load(path, mmap=True)]


def read(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Return pixels and labels of the split ``train`` or ``test``."""
    if (root / CIFAR10.base_folder).is_dir():
        stored = CIFAR10(root, train=split == "train")
        return torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored.targets)
    folder = ImageFolder(root / split, loader=read_image)
    if tuple(folder.classes) != CLASSES:
        raise DataError(f"{root / split} has the classes {folder.classes}, expected {list(CLASSES)}")
    return torch.stack([pixels for pixels, _ in folder]), torch.tensor(folder.targets)


def read_image(path: str) -> Tensor:
    """Return the pixels of an image file, uint8 [3, 32, 32]."""
    try:
        pixels: Tensor = decode_image(path, mode="RGB")
    except RuntimeError as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    if pixels.shape != (3, 32, 32):
        raise DataError(f"{path} is {pixels.shape[2]} x {pixels.shape[1]} pixels, expected 32 x 32")
    return pixels


def cache() -> Path:
    """Return the folder for what is kept between jobs."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trackhub"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def synthetic(seed: int) -> Images:
    """Make 8,000 + 2,000 images that a small network learns, but not at once. The same for the same seed.

    Each class is a smooth pattern. An image is its class's pattern, moved, a weaker one of another class, and noise.
    """
    random = torch.Generator().manual_seed(seed)
    patterns = functional.interpolate(torch.randn(10, 3, 6, 6, generator=random), size=(32, 32), mode="bicubic")
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)

    def moved(labels: Tensor) -> Tensor:
        shifts = torch.randint(-6, 7, (len(labels), 2), generator=random).tolist()
        return torch.stack([patterns[label].roll(shift, (1, 2)) for label, shift in zip(labels, shifts, strict=True)])

    def draw(n: int) -> TensorDataset:
        labels = torch.randperm(n, generator=random) % 10
        others = (labels + torch.randint(1, 10, (n,), generator=random)) % 10
        contrast = 10 + 30 * torch.rand(n, 1, 1, 1, generator=random)
        noise = 40 * torch.randn(n, 3, 32, 32, generator=random)
        pixels = 128 + contrast * (moved(labels) + 0.7 * moved(others)) + noise
        return TensorDataset(pixels.clamp(0, 255).to(torch.uint8), labels)

    return Images("synthetic", f"synthetic images, seed {seed}", draw(8000), draw(2000))


def partition(
    labels: Tensor, n_sites: int, scheme: str = "same", *, alpha: float = 0.5, seed: int = 0, limit: int | None = None
) -> list[Tensor]:
    """Divide the training images among the sites. All sites compute the same division.

    Args:
        labels: int64 [N], the classes of the training images.
        n_sites: number of sites.
        scheme: ``same``: each site gets all images. ``iid``: random shares of equal size. ``dirichlet``: each class
            is shared out in proportions drawn from a Dirichlet distribution.
        alpha: of the Dirichlet distribution; the smaller, the more the sites differ.
        seed: of the division.
        limit: most images of a site, a random choice of its share; None for no limit.

    Returns:
        For each site the indices of its images, int64, in random order.

    Raises:
        DataError: a site would get no image.
    """
    rng = np.random.default_rng(seed)
    if scheme == "same":
        shares = [rng.permutation(len(labels))] * n_sites
    elif scheme == "iid":
        shares = np.array_split(rng.permutation(len(labels)), n_sites)
    else:
        classes = []
        for label in range(len(CLASSES)):
            members = rng.permutation(np.flatnonzero(labels.numpy() == label))
            cuts = np.cumsum(rng.dirichlet([alpha] * n_sites))[:-1] * len(members)
            classes.append(np.split(members, cuts.astype(int)))
        shares = [rng.permutation(np.concatenate(parts)) for parts in zip(*classes, strict=True)]
    if not all(len(share) for share in shares):
        raise DataError(f"{scheme} with {n_sites} sites and {len(labels)} images leaves a site without any")
    return [torch.from_numpy(share[:limit].copy()) for share in shares]


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


def batches(images: TensorDataset, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, Tensor]]:
    """Load batches, each with one look-up of many indices, which is faster than collating single images."""
    order = RandomSampler(images) if shuffle else SequentialSampler(images)
    return DataLoader(images, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
