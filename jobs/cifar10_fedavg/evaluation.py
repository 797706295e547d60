# SPDX-License-Identifier: Apache-2.0
"""Evaluates a model on the test images, and draws what it predicts for some of them."""

import data
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset
from torchvision.utils import make_grid

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def evaluate(model: nn.Module, images: TensorDataset) -> tuple[float, float, Tensor]:
    """Return mean loss, accuracy (0 to 1) and the predicted classes, int64 [N]."""
    model.eval()
    scores = torch.cat([model(data.normalise(pixels).to(DEVICE)).cpu() for pixels, _ in data.batches(images, 100)])
    labels, predictions = images.tensors[1], scores.argmax(1)
    return functional.cross_entropy(scores, labels).item(), (predictions == labels).float().mean().item(), predictions


def prediction_grid(images: TensorDataset, predictions: Tensor) -> tuple[Tensor, str]:
    """Return 4 x 4 images, framed green where the prediction is right, else red, as uint8 [3, H, W]; and a caption."""
    picked = torch.linspace(0, len(images) - 1, 16).long()  # evenly spread, since they may be sorted by class
    pixels, labels = images[picked]
    right = (predictions[picked] == labels).view(-1, 1)
    frames = torch.where(right, torch.tensor([0, 160, 0]), torch.tensor([200, 0, 0])).to(torch.uint8)
    tiles = frames.view(-1, 3, 1, 1).repeat(1, 1, 36, 36)
    tiles[:, :, 2:-2, 2:-2] = pixels
    names = [data.CLASSES[prediction] for prediction in predictions[picked].tolist()]
    caption = "predicted, by row: " + "; ".join(", ".join(names[row : row + 4]) for row in range(0, 16, 4))
    return make_grid(tiles, nrow=4, padding=0), caption
