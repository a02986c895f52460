"""Small models to train: before each step, backward makes new gradients, as in any training.

They are built like the models that they are named after and are narrow, so that forward and backward take
milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Training:
    """A model and its loss on one batch.

    Attributes:
        model: The parameters to step.
        loss: Runs the forward pass, against targets drawn anew each time: nothing can be learned, and
            gradients stay as large as they are.
    """

    model: nn.Module
    loss: Callable[[], Tensor]

    def backward(self) -> None:
        """Drop the gradients and make new ones."""
        for p in self.model.parameters():
            p.grad = None
        self.loss().backward()


class _Residual(nn.Module):
    """x + f(norm(x)) for each of several layers, so that a deep model trains."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(F.normalize(x, dim=1))
        return x


def linear_layers(depth: int, width: int) -> Training:
    """Many small tensors: a matrix and a bias per layer."""
    model = _Residual([nn.Linear(width, width) for _ in range(depth)])
    x = torch.randn(8, width)
    return Training(model, lambda: F.mse_loss(model(x), torch.randn_like(x)))


def resnet(depth: int, channels: int) -> Training:
    """Convolutions, each followed by a norm, and a classifier: three tensors per layer and two."""
    layers: list[nn.Module] = [
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
        )
        for _ in range(depth)
    ]
    model = nn.Sequential(_Residual(layers), nn.Flatten(), nn.Linear(16 * channels, 100))
    x = torch.randn(2, channels, 4, 4)
    return Training(model, lambda: F.cross_entropy(model(x), torch.randint(100, (len(x),), device=x.device)))


def gpt(depth: int, width: int, context: int = 32) -> Training:
    """An embedding, pre-norm transformer blocks and a head."""
    vocabulary = 32 * width
    blocks = [
        nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
        for _ in range(depth)
    ]
    model = nn.Sequential(nn.Embedding(vocabulary, width), *blocks, nn.Linear(width, vocabulary))
    device = next(model.parameters()).device

    def loss() -> Tensor:
        tokens = torch.randint(vocabulary, (2, context), device=device)
        return F.cross_entropy(model(tokens[:1])[0], tokens[1])

    return Training(model, loss)
