# SPDX-License-Identifier: Apache-2.0
"""Trains at one site of a FLARE job, tracked or not. FLARE runs it; ``standalone.py`` trains the same without FLARE."""

import argparse
import json
import sys
import zlib

import data
import partition
import torch
from evaluation import DEVICE, evaluate, prediction_grid
from flags import client_args
from model import SmallCNN
from optimizer import MAX_GRADIENT_NORM, MOMENTUM, WEIGHT_DECAY, sgd_with_schedule
from torch import nn
from torch.nn import functional

import trackhub


class Site:
    """One site's images, model and training.

    Args:
        args: the flags.
        name: of the site.
        writer: takes what the site logs.

    Raises:
        DataError: the images cannot be loaded.
    """

    def __init__(self, args: argparse.Namespace, name: str, writer: trackhub.Writer) -> None:
        self.args, self.name, self.writer = args, name, writer
        dataset, images, self.test_images = data.load(args)
        self.train_images = partition.share(images, name, args)
        self.batches = data.batches(self.train_images, args.batch_size, shuffle=True)
        # Channels last is almost twice as fast on a CPU.
        self.model = SmallCNN(args.seed).to(memory_format=torch.channels_last).to(DEVICE)

        flags = ("partition", "n_clients", "num_rounds", "local_epochs", "batch_size", "lr", "seed")
        writer.log_params(
            {flag: getattr(args, flag) for flag in flags}
            | {"dataset": dataset, "alpha": args.alpha if args.partition == "dirichlet" else None}
            | {"train_images": len(self.train_images), "test_images": len(self.test_images)}
            | {"momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY, "max_gradient_norm": MAX_GRADIENT_NORM}
        )
        writer.set_tags({"dataset": dataset, "partition": args.partition, "algorithm": "fedavg"})
        counts = torch.bincount(self.train_images.tensors[1], minlength=len(data.CLASSES)).tolist()
        rows = "".join(f"| {label} | {n} |\n" for label, n in zip(data.CLASSES, counts, strict=True))
        writer.log_text("note", f"{name} trains on {dataset}:\n\n| class | images |\n| --- | ---: |\n{rows}")

    def validate(self, round_number: int) -> dict[str, float]:
        """Evaluate the model as received. Log the metrics with the round as their step, and return them."""
        loss, accuracy, predictions = evaluate(self.model, self.test_images)
        print(f"{self.name}: round {round_number}, model received has accuracy {accuracy:.1%}", flush=True)
        metrics = {"val/loss": loss, "val/accuracy": accuracy}
        self.writer.log(metrics, round_number)
        grid, caption = prediction_grid(self.test_images, predictions)
        self.writer.log_image("val/predictions", grid, round_number, caption)
        return metrics

    def train(self, round_number: int) -> dict[str, float]:
        """Train for this round's epochs. Log each step and each epoch, and return the last metrics."""
        first_epoch, steps = round_number * self.args.local_epochs, len(self.batches)
        total_steps = self.args.num_rounds * self.args.local_epochs * steps
        optimizer, scheduler = sgd_with_schedule(self.model, self.args.lr, first_epoch * steps, total_steps)
        self.model.train()
        for epoch in range(first_epoch, first_epoch + self.args.local_epochs):
            # Each site and epoch has random numbers of its own, whatever was drawn before.
            torch.manual_seed(zlib.crc32(f"{self.args.seed} {self.name} {epoch}".encode()))
            total_loss, correct = 0.0, 0
            for step, (pixels, labels) in enumerate(self.batches, start=epoch * steps):
                scores = self.model(data.normalise(data.augment(pixels)).to(DEVICE))
                loss = functional.cross_entropy(scores, labels.to(DEVICE))
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
                optimizer.step()
                scheduler.step()
                step_loss = loss.item()
                self.writer.log({"train/loss": step_loss}, step)
                total_loss += step_loss * len(labels)
                correct += int((scores.argmax(1).cpu() == labels).sum())
            n = len(self.train_images)
            metrics = {"train/epoch_loss": total_loss / n, "train/accuracy": correct / n}
            self.writer.log(metrics, epoch)
        return {"train/loss": step_loss, **metrics}


def train_in_flare(args: argparse.Namespace) -> None:
    """Train whatever model the FLARE server sends, until it sends no more."""
    import nvflare.client as flare  # only here: standalone.py needs no FLARE

    flare.init()
    with trackhub.Writer() as writer:
        site = None
        while flare.is_running():
            received = flare.receive()
            if received is None:
                break
            args.num_rounds = received.total_rounds
            site = site or Site(args, flare.get_site_name(), writer)
            site.model.load_state_dict(received.params)
            validated = site.validate(received.current_round)
            trained = site.train(received.current_round)
            if args.summary_dir is not None:
                args.summary_dir.mkdir(parents=True, exist_ok=True)
                (args.summary_dir / f"{site.name}.json").write_text(json.dumps(validated | trained))
            weights = {name: tensor.cpu().contiguous() for name, tensor in site.model.state_dict().items()}
            # FLARE sends the metrics to the server, where it picks the best model by them.
            metrics = {"accuracy": validated["val/accuracy"]} if args.send_metrics else None
            steps = args.local_epochs * len(site.batches)
            flare.send(flare.FLModel(params=weights, metrics=metrics, meta={"NUM_STEPS_CURRENT_ROUND": steps}))


if __name__ == "__main__":
    parsed = client_args(sys.argv[1:], __doc__)
    if parsed.torch_threads is not None:
        torch.set_num_threads(parsed.torch_threads)
    train_in_flare(parsed)
