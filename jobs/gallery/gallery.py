# SPDX-License-Identifier: Apache-2.0
"""Logs every kind of record into TensorBoard, MLflow and W&B offline, to see how each of them shows it.

Run it by hand, and open the results with the commands that it prints::

    python jobs/gallery/gallery.py --folder runs
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trackhub

BACKENDS: dict[str, dict[str, Any]] = {"tensorboard": {}, "mlflow": {}, "wandb": {"mode": "offline"}, "jsonl": {}}


def curves(writer: trackhub.Writer, group: str = "train") -> None:
    """Log metrics, a text and histograms at several steps. The keys of the metrics begin with the group."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    for step in range(20):
        writer.log({group: {"loss": math.exp(-step / 6), "accuracy": 1 - math.exp(-step / 8)}}, step)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        if step % 5 == 0:
            writer.log_model_histograms(model, step)
    writer.log_text("notes", "# What was tried\n\n- a *small* model\n- `lr` of **0.1**", 19)


def pictures(writer: trackhub.Writer) -> None:
    """Log images of several ranges, a grid and figures."""
    ramp = np.linspace(0, 1, 64 * 64).reshape(64, 64)
    colours = np.stack([ramp, ramp.T, 1 - ramp], -1)
    writer.log_image("images/colours", colours, 0, "floats in 0..1")
    y, x = np.mgrid[-1:1:64j, -1:1:64j]
    writer.log_image("images/mask", np.hypot(x, y) < 0.7, 0, "a mask")
    writer.log_image("images/sixteen bits", (ramp * 65535).astype(np.uint16), 0, "16 bits")
    writer.log_images("images/grid", [np.rot90(colours, i) for i in range(6)], 0, columns=3)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4, 3))
    axes = figure.subplots()
    axes.imshow([[8, 1], [2, 9]], cmap="Blues")
    names = ["cat", "dog"]
    axes.set(title="Confusion", xlabel="predicted", ylabel="true")
    axes.set_xticks([0, 1], names)
    axes.set_yticks([0, 1], names)
    writer.log_figure("figures/confusion", figure, 0)
    try:
        from plotly import graph_objects
    except ImportError:
        return
    roc = graph_objects.Figure(graph_objects.Scatter(x=[0, 0.1, 0.4, 1], y=[0, 0.6, 0.9, 1], name="ROC"))
    writer.log_figure("figures/roc", roc, 0)


def rest(writer: trackhub.Writer) -> None:
    """Log params, tags, a table, a file and final values."""
    writer.log_params({"optim": {"name": "adam", "lr": 0.1, "betas": (0.9, 0.999)}, "seed": 7, "note": None})
    writer.set_tags({"team": "vision", "stage": "demo"})
    writer.log_table("predictions", {"label": ["cat", "dog", "cat"], "score": [0.9, 0.4, 0.7]}, step=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.pt")
        torch.save({"weight": torch.zeros(100)}, path)
        writer.log_artifact(path, "model/best.pt", "model")
    writer.summarize({"best/accuracy": 0.93, "best/step": 17, "reason": "early stopping"})


def everything(writer: trackhub.Writer, group: str = "train") -> None:
    """Log every kind of record. The group is as for `curves`."""
    rest(writer)
    curves(writer, group)
    pictures(writer)


def main() -> None:
    """Log everything and deliver it. The run says on stderr how to look at it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs", help="where the run's folder is made")
    arguments = parser.parse_args()
    with trackhub.local(BACKENDS, folder=arguments.folder, name="gallery", tags=["gallery"]) as writer:
        everything(writer)


if __name__ == "__main__":
    main()
