# SPDX-License-Identifier: Apache-2.0
"""Trains at one site: inside a FLARE job, or alone with ``python client.py --standalone``."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import data
import numpy as np
import torch
from flags import FlagParser, add_training_flags
from model import SmallCNN
from torch import Tensor
from torch.nn import functional

import trackhub

# Usual for SGD on CIFAR-10. The rate rises linearly in the first tenth of all steps, then falls along a cosine.
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
WARMUP_FRACTION = 0.1

# Without a limit, the first steps on a few hundred images go so far astray that five rounds do not mend it.
MAX_GRADIENT_NORM = 2.0

EVALUATION_BATCH = 500
GRID = 4  # images per row and column


class NoTracking:
    """Takes a writer's place where tracking is off, so that the training code is the same."""

    def log(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Record nothing."""

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Record nothing."""

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Record nothing."""

    def log_image(self, key: str, image: Any, step: int | None = None, caption: str = "") -> None:
        """Record nothing."""


class Site:
    """One site's data, model and training.

    Attributes:
        final: the last value of every metric.
    """

    def __init__(
        self, args: argparse.Namespace, name: str, writer: trackhub.Writer | NoTracking, total_rounds: int
    ) -> None:
        """Load the data, and log what this site trains with.

        Raises:
            DataError: this site's images cannot be had.
        """
        dataset = data.load(args.dataset, args.data_root, seed=args.seed)
        print(f"{name} uses {dataset.origin}", flush=True)
        # Where all sites have the same images, any name will do.
        self.index = 0 if args.partition == "same" else data.site_index(name, args.n_clients)
        shares = data.partition(
            dataset.train.labels,
            args.n_clients,
            args.partition,
            alpha=args.alpha,
            seed=args.seed,
            limit=args.samples_per_site,
        )
        self.args = args
        self.name = name
        self.writer = writer
        self.train_images = dataset.train.subset(shares[self.index])
        self.test_images = dataset.test
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = SmallCNN(args.seed).to(memory_format=torch.channels_last).to(self.device)
        self.steps_per_epoch: int = math.ceil(len(self.train_images.labels) / args.batch_size)
        self.total_steps = total_rounds * args.local_epochs * self.steps_per_epoch
        self.final: dict[str, float] = {}
        self._describe(dataset, total_rounds)

    def _describe(self, dataset: data.DataSet, total_rounds: int) -> None:
        args = self.args
        counts = torch.bincount(self.train_images.labels, minlength=len(data.CLASSES)).tolist()
        self.writer.log_params(
            {
                "dataset": dataset.name,
                "train_images": len(self.train_images.labels),
                "test_images": len(self.test_images.labels),
                "partition": args.partition,
                "alpha": args.alpha if args.partition == "dirichlet" else None,
                "n_clients": args.n_clients,
                "num_rounds": total_rounds,
                "local_epochs": args.local_epochs,
                "batch_size": args.batch_size,
                "lr": args.lr,
                "momentum": MOMENTUM,
                "weight_decay": WEIGHT_DECAY,
                "max_gradient_norm": MAX_GRADIENT_NORM,
                "seed": args.seed,
                "model": type(self.model).__name__,
                "model_weights": sum(parameter.numel() for parameter in self.model.parameters()),
            }
        )
        self.writer.set_tags({"dataset": dataset.name, "partition": args.partition, "algorithm": "fedavg"})
        rows = "\n".join(f"| {name} | {n} |" for name, n in zip(data.CLASSES, counts, strict=True))
        self.writer.log_text(
            "note",
            f"{self.name} trains on these images ({dataset.name}):\n\n| class | images |\n| --- | ---: |\n{rows}\n",
        )

    def validate(self, round_number: int) -> float:
        """Evaluate the model as received, log it with the round as its step, and return its accuracy."""
        loss, accuracy, predictions = evaluate(self.model, self.test_images, self.device)
        self._log({"val/loss": loss, "val/accuracy": accuracy}, step=round_number)
        grid, caption = prediction_grid(self.test_images, predictions)
        self.writer.log_image("val/predictions", grid, step=round_number, caption=caption)
        print(f"{self.name}: round {round_number}, model received has accuracy {accuracy:.1%}", flush=True)
        return accuracy

    def train(self, round_number: int) -> int:
        """Train for this round's epochs and return the number of steps taken."""
        optimizer = torch.optim.SGD(
            self.model.parameters(), lr=self.args.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )
        first = round_number * self.args.local_epochs
        epochs = range(first, first + self.args.local_epochs)
        for epoch in epochs:
            self._train_epoch(epoch, optimizer)
        return len(epochs) * self.steps_per_epoch

    def _train_epoch(self, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        self.model.train()
        # Each site and epoch has an order of its own, which does not depend on how the script got here.
        entropy = np.random.SeedSequence([self.args.seed, site_number(self.name), epoch]).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(entropy))
        total_loss, correct = 0.0, 0
        batches = data.batches(self.train_images, self.args.batch_size, generator)
        for step, batch in enumerate(batches, start=epoch * self.steps_per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = self.args.lr * schedule(step, self.total_steps)
            labels = batch.labels.to(self.device)
            scores = self.model(inputs(data.augment(batch.pixels, generator), self.device))
            loss = functional.cross_entropy(scores, labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
            optimizer.step()
            step_loss = loss.item()
            self._log({"train/loss": step_loss}, step=step)
            total_loss += step_loss * len(labels)
            correct += int((scores.argmax(dim=1) == labels).sum())
        n = len(self.train_images.labels)
        self._log({"train/epoch_loss": total_loss / n, "train/accuracy": correct / n}, step=epoch)

    def _log(self, metrics: dict[str, float], step: int) -> None:
        self.writer.log(metrics, step=step)
        self.final.update(metrics)


def site_number(name: str) -> int:
    """Return a number that differs between sites, from the name's characters."""
    return int.from_bytes(name.encode(), "big")


def schedule(step: int, total_steps: int) -> float:
    """Return the factor, 0 to 1, of the highest learning rate at this step, counted from 0."""
    progress = (step + 1) / total_steps
    if progress < WARMUP_FRACTION:
        return progress / WARMUP_FRACTION
    return 0.5 * (1 + math.cos(math.pi * (progress - WARMUP_FRACTION) / (1 - WARMUP_FRACTION)))


def inputs(pixels: Tensor, device: torch.device) -> Tensor:
    """Return what the model takes for uint8 images."""
    return data.normalise(pixels).to(device).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def evaluate(model: torch.nn.Module, images: data.Images, device: torch.device) -> tuple[float, float, Tensor]:
    """Return mean loss, accuracy (0 to 1) and the predicted classes, int64 [N]."""
    model.eval()
    scores = torch.cat([model(inputs(pixels, device)).cpu() for pixels in images.pixels.split(EVALUATION_BATCH)])
    predictions = scores.argmax(dim=1)
    loss = functional.cross_entropy(scores, images.labels).item()
    return loss, (predictions == images.labels).float().mean().item(), predictions


def prediction_grid(images: data.Images, predictions: Tensor) -> tuple[np.ndarray, str]:
    """Return a picture of some test images, framed green where the prediction is right, else red, and a caption.

    Returns:
        uint8 [H, W, 3], and the predicted classes.
    """
    # Evenly spread, since test images may be sorted by class.
    picked = torch.linspace(0, len(images.labels) - 1, GRID * GRID).long()
    right = predictions[picked] == images.labels[picked]
    frame = torch.where(right.view(-1, 1), torch.tensor([0, 160, 0]), torch.tensor([200, 0, 0])).to(torch.uint8)
    tiles = functional.pad(images.pixels[picked], (2, 2, 2, 2))
    border = functional.pad(torch.zeros(data.SIZE, data.SIZE, dtype=torch.bool), (2, 2, 2, 2), value=True)
    tiles = torch.where(border, frame.view(-1, 3, 1, 1), tiles)
    side = data.SIZE + 4
    grid = tiles.view(GRID, GRID, 3, side, side).permute(0, 3, 1, 4, 2).reshape(GRID * side, GRID * side, 3)
    names = [data.CLASSES[prediction] for prediction in predictions[picked].tolist()]
    rows = [", ".join(names[row : row + GRID]) for row in range(0, len(names), GRID)]
    return grid.numpy(), "predicted, by row: " + "; ".join(rows)


def run_in_flare(args: argparse.Namespace) -> None:
    """Train whatever model the FLARE server sends, until it sends no more."""
    # Only here: alone, the script needs no FLARE.
    import nvflare.client as flare

    flare.init()
    name = flare.get_site_name()
    site = None
    with job_writer(args.tracking) as writer:
        while flare.is_running():
            received = flare.receive()
            if received is None:
                break
            if site is None:
                site = Site(args, name, writer, received.total_rounds)
            site.model.load_state_dict(received.params)
            accuracy = site.validate(received.current_round)
            steps = site.train(received.current_round)
            if args.summary_dir is not None:
                write_summary(args.summary_dir, site)
            weights = {key: weight.detach().cpu().contiguous() for key, weight in site.model.state_dict().items()}
            flare.send(
                flare.FLModel(
                    params=weights,
                    # FLARE sends these to the server, where it picks the best model by them.
                    metrics={"accuracy": accuracy} if args.send_metrics else None,
                    meta={"NUM_STEPS_CURRENT_ROUND": steps},
                )
            )


@contextmanager
def job_writer(tracking: bool) -> Iterator[trackhub.Writer | NoTracking]:
    """Give the job's writer; where the job has no tracking, one that records nothing."""
    if not tracking:
        yield NoTracking()
        return
    with trackhub.Writer() as writer:
        yield writer


def run_standalone(args: argparse.Namespace) -> None:
    """Train alone for as many rounds of local epochs as the job would.

    Raises:
        ConfigError: a backend is not there, or cannot be used.
        DataError: the images cannot be had.
    """
    if not args.tracking:
        train_alone(args, NoTracking())
        return
    # Only here: a site of a job needs nothing of the delivery.
    from results import print_reports

    name = "site-1"
    with trackhub.local(backends=args.backend or ["tensorboard"], site=name) as writer:
        train_alone(args, writer)
    if writer.report is not None:
        print_reports({name: writer.report})


def train_alone(args: argparse.Namespace, writer: trackhub.Writer | NoTracking) -> None:
    """Train and validate in turn, without anybody to average with."""
    site = Site(args, "site-1", writer, args.num_rounds)
    for round_number in range(args.num_rounds):
        site.validate(round_number)
        site.train(round_number)
    site.validate(args.num_rounds)


def write_summary(folder: Path, site: Site) -> None:
    """Leave the last metrics for whoever started this site."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{site.name}.json").write_text(json.dumps(site.final, indent=2))


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Return the values of the flags."""
    parser = FlagParser(description=__doc__)
    add_training_flags(parser)
    running = parser.add_argument_group("running")
    running.add_argument("--standalone", action="store_true", help="train alone, without FLARE")
    running.add_argument("--backend", action="append", metavar="NAME", help="standalone: where to; default tensorboard")
    running.add_argument("--no_tracking", dest="tracking", action="store_false", help="log nothing")
    running.add_argument("--no_send_metrics", dest="send_metrics", action="store_false", help="return weights alone")
    running.add_argument("--summary_dir", type=Path, metavar="DIR", help="write the last metrics to DIR/<site>.json")
    return parser.parse_args(argv)


def main() -> None:
    """Run this site."""
    args = parse_args(sys.argv[1:])
    if args.torch_threads is not None:
        torch.set_num_threads(args.torch_threads)
    if not args.standalone:
        run_in_flare(args)
        return
    try:
        run_standalone(args)
    except (trackhub.ConfigError, data.DataError) as error:
        sys.exit(f"client.py: error: {error}")


if __name__ == "__main__":
    main()
