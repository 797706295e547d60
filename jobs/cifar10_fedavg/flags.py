# SPDX-License-Identifier: Apache-2.0
"""The training flags, which job.py takes and hands on to each site's client.py."""

import argparse
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path


def above(limit: int, kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return an argparse type for finite numbers above a limit."""

    def convert(text: str) -> float:
        value = kind(text)
        if not limit < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not a finite number above {limit}")
        return value

    return convert


def training_parser(description: str | None = None) -> argparse.ArgumentParser:
    """Return a parser of the flags that say what each site trains with."""
    count, rate = above(0, int), above(0, float)
    parser = argparse.ArgumentParser(
        description=description, allow_abbrev=False, epilog="Flags may be spelled with hyphens as well."
    )
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=["auto", "cifar10", "synthetic"], default="auto", help="auto: CIFAR-10, else synthetic")
    add("--data_root", type=Path, metavar="DIR", help="CIFAR-10; default: TRACKHUB_DATA_ROOT, else the user's cache")
    add("--partition", choices=["same", "iid", "dirichlet"], default="same", help="how sites share the training images")
    add("--alpha", type=rate, default=0.5, help="for dirichlet: a smaller value makes the shares differ more")
    add("--samples_per_site", type=count, metavar="N", help="the most training images of a site")
    add = parser.add_argument_group("training").add_argument
    add("--n_clients", type=count, default=2, help="number of sites")
    add("--num_rounds", type=count, default=5)
    add("--local_epochs", type=count, default=1, help="epochs per round")
    add("--batch_size", type=count, default=32)
    add("--lr", type=rate, default=0.05, help="highest learning rate")
    add("--seed", type=above(-1, int), default=0)
    add("--torch_threads", type=count, metavar="N", help="threads of each site")
    return parser


def client_args(argv: list[str], description: str | None = None) -> argparse.Namespace:
    """Return the values of the flags of client.py."""
    parser = training_parser(description)
    add = parser.add_argument_group("result").add_argument
    add("--no-send_metrics", dest="send_metrics", action="store_false", help="return weights alone")
    add("--summary_dir", type=Path, metavar="DIR", help="write the last metrics to DIR/<site>.json")
    return parser.parse_args(spelled(argv))


def training_args(args: argparse.Namespace) -> list[str]:
    """Return the command line that gives client.py the same training flags."""
    given = [(name, getattr(args, name)) for name in vars(training_parser().parse_args([]))]
    return [word for name, value in given if value is not None for word in (f"--{name}", str(value))]


def spelled(argv: Iterable[str]) -> list[str]:
    """Return the words, with each flag spelled as it is declared. Hyphens and underscores mean the same."""
    words = [re.sub(r"^--[^=]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    return [re.sub(r"^--no_", "--no-", word) for word in words]
