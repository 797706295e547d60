# SPDX-License-Identifier: Apache-2.0
"""Trains one site alone, without a federation, for as many epochs as in the job. Run it by hand."""

import argparse
import sys

import data
import torch
from client import Site
from flags import spelled, training_parser

import trackhub


def train(args: argparse.Namespace) -> None:
    """Train. When the writer is closed, it delivers what was logged, and says where that is."""
    with trackhub.local(args.backend or ["tensorboard"], site="site-1") as writer:
        site = Site(args, "site-1", writer)
        for round_number in range(args.num_rounds):
            site.validate(round_number)
            site.train(round_number)
        site.validate(args.num_rounds)


def main(argv: list[str]) -> int:
    """Train with these flags. Return the exit status."""
    parser = training_parser(__doc__)
    parser.add_argument("--backend", action="append", metavar="NAME", help="repeatable; default tensorboard")
    args = parser.parse_args(spelled(argv))
    if args.torch_threads is not None:
        torch.set_num_threads(args.torch_threads)
    try:
        train(args)
    except (trackhub.ConfigError, data.DataError) as error:
        print(f"standalone.py: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
