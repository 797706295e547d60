# SPDX-License-Identifier: Apache-2.0
"""Images for the CIFAR-10 job: where they come from, and batches of them."""

import argparse
import glob
import hashlib
import os
import tempfile
import urllib.request
from pathlib import Path

import torch
from filelock import FileLock
from synthetic import synthetic
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DATA_ROOT_ENV = "TRACKHUB_DATA_ROOT"
NETWORK_TIMEOUT_S = 5.0
MEAN, STD = [0.491, 0.482, 0.447], [0.247, 0.244, 0.262]  # of CIFAR-10's training pixels, by channel

# Both take a whole batch and move all its images in the same way. That is ten times as fast as one image at a time.
augment = v2.Compose([v2.RandomCrop(32, padding=2, padding_mode="reflect"), v2.RandomHorizontalFlip()])
normalise = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])


class DataError(Exception):
    """The images cannot be loaded, or cannot be divided among the sites."""


def load(args: argparse.Namespace) -> tuple[str, TensorDataset, TensorDataset]:
    """Return the name of the data set, its training and its test images.

    Without CIFAR-10, ``auto`` takes synthetic images and prints that. Pixels are uint8 [N, 3, 32, 32]. Labels are
    int64 [N], indices into ``CLASSES``.

    Raises:
        DataError: there is no CIFAR-10 and it cannot be downloaded, or a file of it cannot be read.
    """
    if args.dataset != "synthetic":
        try:
            root = prepare(args.data_root)
        except DataError as error:
            if args.dataset == "cifar10":
                raise
            print(f"Using synthetic images: {error}", flush=True)
        else:
            return "cifar10", *_decoded(root)
    return "synthetic", *synthetic(args.seed)


def prepare(data_root: Path | None) -> Path:
    """Return the folder with CIFAR-10. Download it first, if the folder has neither of the two layouts.

    Raises:
        DataError: it cannot be downloaded.
    """
    root = Path(data_root or os.environ.get(DATA_ROOT_ENV) or _cache() / "cifar10").expanduser().resolve()
    if root.name == CIFAR10.base_folder:
        root = root.parent
    if (root / "train").is_dir() and (root / "test").is_dir():
        return root
    try:
        with FileLock(_cache() / "cifar10.lock"):
            if not (root / CIFAR10.base_folder).is_dir():
                # torchvision would wait without limit, so ask first whether the server answers.
                urllib.request.urlopen(CIFAR10.url, timeout=NETWORK_TIMEOUT_S).close()
                print(f"Downloading CIFAR-10 from {CIFAR10.url} to {root}", flush=True)
                root.mkdir(parents=True, exist_ok=True)
                # The folder appears when it is complete, so that a killed process leaves no half of it.
                with tempfile.TemporaryDirectory(prefix=".downloading-", dir=root) as partial:
                    CIFAR10(partial, download=True)
                    os.replace(Path(partial, CIFAR10.base_folder), root / CIFAR10.base_folder)
    except (OSError, RuntimeError) as error:
        raise DataError(f"there is no CIFAR-10 in {root}, and it cannot be downloaded: {error}") from error
    return root


def _decoded(root: Path) -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the test images, from a file that the first site on this machine writes."""
    try:
        # Any change to the images changes the name of the file.
        names = glob.glob(f"{CIFAR10.base_folder}/*", root_dir=root) or glob.glob("t*/*/*", root_dir=root)
        stats = [(name, os.stat(f"{root}/{name}")) for name in sorted(names)]
        found = repr([root, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)])
        path = _cache() / f"cifar10-{hashlib.sha256(found.encode()).hexdigest()[:16]}.pt"
        with FileLock(_cache() / "cifar10.lock"):
            if not path.is_file():
                print(f"Decoding CIFAR-10 from {root}, once", flush=True)
                torch.save([_read(root, split) for split in ("train", "test")], path.with_suffix(".new"))
                path.with_suffix(".new").replace(path)
    except (OSError, RuntimeError) as error:
        raise DataError(f"{root} cannot be decoded: {error}") from error
    train, test = torch.load(path, mmap=True)  # all sites share the memory
    return TensorDataset(*train), TensorDataset(*test)


def _read(root: Path, split: str) -> tuple[Tensor, Tensor]:
    if (root / CIFAR10.base_folder).is_dir():
        stored = CIFAR10(root, train=split == "train")
        return torch.from_numpy(stored.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(stored.targets)
    folder = ImageFolder(root / split, loader=_read_image)
    if tuple(folder.classes) != CLASSES:
        raise DataError(f"{root / split} has the classes {folder.classes}, expected {list(CLASSES)}")
    return torch.stack([pixels for pixels, _ in folder]), torch.tensor(folder.targets)


def _read_image(path: str) -> Tensor:
    try:
        image = default_loader(path)
    except OSError as error:
        raise DataError(f"{path} cannot be decoded: {error}") from error
    if image.size != (32, 32):
        raise DataError(f"{path} is {image.width} x {image.height} pixels, expected 32 x 32")
    pixels: Tensor = v2.functional.pil_to_tensor(image)
    return pixels


def _cache() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "trackhub")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"images cannot be kept: {error}; name another folder in XDG_CACHE_HOME") from error
    return folder


def batches(images: TensorDataset, batch_size: int, *, shuffle: bool = False) -> DataLoader[tuple[Tensor, ...]]:
    """Return a loader of batches. It looks up all images of a batch at once, much faster than one by one.

    Args:
        images: the images and their labels.
        batch_size: how many images a batch has. The last one may have fewer.
        shuffle: draw the images in a random order.
    """
    order = RandomSampler(images) if shuffle else SequentialSampler(images)
    return DataLoader(images, sampler=BatchSampler(order, batch_size, drop_last=False), batch_size=None)
