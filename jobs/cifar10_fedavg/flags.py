# SPDX-License-Identifier: Apache-2.0
"""Command line flags that the job and its client share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data import DATA_ROOT_ENV, DATASETS, PARTITIONS

__all__ = ["FlagParser", "add_training_flags", "positive_int", "training_args"]

_TRAINING = (
    "dataset",
    "data_root",
    "partition",
    "alpha",
    "samples_per_site",
    "n_clients",
    "local_epochs",
    "batch_size",
    "lr",
    "seed",
    "torch_threads",
)


class FlagParser(argparse.ArgumentParser):
    """Flags are spelled with underscores, as FLARE's are; hyphens mean the same."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parse, after spelling each flag as it was declared."""
        declared = {_squashed(flag): flag for action in self._actions for flag in action.option_strings}
        if args is not None:
            args = [_respelled(word, declared) for word in args]
        return super().parse_known_args(args, namespace)


def _squashed(flag: str) -> str:
    return flag.replace("-", "_")


def _respelled(word: str, declared: dict[str, str]) -> str:
    name, equals, value = word.partition("=")
    return declared.get(_squashed(name), name) + equals + value if word.startswith("--") else word


def positive_int(text: str) -> int:
    """Return the text as an int >= 1; for argparse's ``type``."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Declare what every site trains with."""
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=DATASETS, default="auto", help="auto: CIFAR-10, else synthetic images")
    data.add_argument(
        "--data_root",
        type=Path,
        metavar="DIR",
        help=f"CIFAR-10 in torchvision's layout or as an image folder; default: {DATA_ROOT_ENV}, else the user's cache",
    )
    data.add_argument("--partition", choices=PARTITIONS, default="same", help="how sites share the training images")
    data.add_argument("--alpha", type=_positive_float, default=0.5, help="of dirichlet: the smaller, the more uneven")
    data.add_argument("--samples_per_site", type=positive_int, metavar="N", help="at most so many training images")

    training = parser.add_argument_group("training")
    training.add_argument("--n_clients", type=positive_int, default=2, help="number of sites")
    training.add_argument("--num_rounds", type=positive_int, default=5)
    training.add_argument("--local_epochs", type=positive_int, default=1, help="epochs per round")
    training.add_argument("--batch_size", type=positive_int, default=32)
    training.add_argument("--lr", type=_positive_float, default=0.05, help="highest learning rate")
    training.add_argument("--seed", type=_seed, default=0)
    training.add_argument("--torch_threads", type=positive_int, metavar="N", help="of each site")


def training_args(args: argparse.Namespace) -> list[str]:
    """Return the client's command line for these values of the flags that ``add_training_flags`` declared."""
    given = [(name, getattr(args, name)) for name in _TRAINING]
    return [word for name, value in given if value is not None for word in (f"--{name}", str(value))]
