# SPDX-License-Identifier: Apache-2.0
"""Divides the training images among the sites: evenly, the same for all, or with other classes at each site."""

import argparse
import re

import numpy as np
from data import CLASSES, DataError
from torch.utils.data import TensorDataset


def share(images: TensorDataset, site: str, args: argparse.Namespace) -> TensorDataset:
    """Return a site's part of the training images, in random order. All sites compute the same division.

    Args:
        images: all training images.
        site: its name. Unless all sites have the same images, it ends in a number from 1 to ``args.n_clients``.
        args: the flags.

    Raises:
        DataError: the name has no such number, or there are too few images.
    """
    number = 1 if args.partition == "same" else int((re.search(r"\d+$", site) or "0")[0])
    if not 1 <= number <= args.n_clients:
        wanted = f"must end in a number from 1 to {args.n_clients}, as site-1"
        raise DataError(f"cannot tell the share of site {site!r}: with --partition {args.partition}, names {wanted}")
    rng = np.random.default_rng(args.seed)
    if args.partition != "dirichlet":
        order = rng.permutation(len(images))
        shares = [order] if args.partition == "same" else np.array_split(order, args.n_clients)
    else:
        classes = []
        for label in range(len(CLASSES)):
            members = rng.permutation(np.flatnonzero(images.tensors[1].numpy() == label))
            cuts = np.cumsum(rng.dirichlet([args.alpha] * args.n_clients))[:-1] * len(members)
            classes.append(np.split(members, cuts.astype(int)))
        shares = [rng.permutation(np.concatenate(parts)) for parts in zip(*classes, strict=True)]
    if not all(len(indices) for indices in shares):
        raise DataError(
            f"{args.n_clients} sites and {len(images)} images leave a site without any; use fewer sites"
            + (", or a larger --alpha" if args.partition == "dirichlet" else "")
        )
    return TensorDataset(*images[shares[number - 1][: args.samples_per_site]])
