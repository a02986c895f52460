"""The two models of the example: a small GPT on bytes and a small ResNet on 8x8 images.

Both return logits whose last dimension is the class, so one loss and one evaluation serve both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

INITIAL_STD = 0.05  # GPT-2's 0.02 suits widths of a thousand; at a hundred it learns slowly


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of the GPT; `context` is the longest sequence it can read."""

    layers: int = 2
    heads: int = 4
    width: int = 128
    context: int = 64
    vocabulary: int = 256
    dropout: float = 0.0


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of the ResNet: `blocks` residual blocks in each of two stages, `channels` in the first."""

    blocks: int = 2
    channels: int = 16
    classes: int = 10
    dropout: float = 0.0


class Attention(nn.Module):
    """Causal self-attention with all heads in one projection."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, time, width) -> same
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.ln_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width), nn.GELU(), nn.Linear(4 * config.width, config.width)
        )
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.ln_1(x)))
        return x + self.dropout(self.mlp(self.ln_2(x)))


class GPT(nn.Module):
    """A GPT-2 in small: learned positions, pre-norm blocks, output tied to the token embedding."""

    def __init__(self, config: GPTConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self._initialize(config.layers)

    def _initialize(self, layers: int) -> None:
        """GPT-2's initialization: normal weights, those into the residual stream scaled by its depth."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=INITIAL_STD)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for block in self.blocks:
            for projection in (block.attention.out, block.mlp[2]):
                nn.init.normal_(projection.weight, std=INITIAL_STD / math.sqrt(2 * layers))

    def forward(self, tokens: Tensor) -> Tensor:  # bytes (batch, time) -> (batch, time, vocabulary)
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens.long()) + self.positions(positions))
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.ln_f(x))


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm around a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = F.gelu(self.bn1(self.conv1(x)))
        return F.gelu(self.bn2(self.conv2(y)) + self.downsample(x))


@contextmanager
def running_statistics_kept(module: nn.Module) -> Iterator[None]:
    """Let no BatchNorm of `module` move its running statistics inside the `with`."""
    norms = [child for child in module.modules() if isinstance(child, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def _recompute_contexts(
    module: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint`: the second forward must not count the same batch twice in BatchNorm."""
    return nullcontext(), running_statistics_kept(module)


class ResNet(nn.Module):
    """A ResNet for small grey images: a stem and two stages, the second at half the resolution.

    GELU instead of ReLU: a ReLU channel that comes back from the dead takes its first Adam step at full size
    however small its gradient, so that rounding alone would part the curves of two equal optimizers.
    """

    def __init__(self, config: ResNetConfig, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        narrow, wide = config.channels, 2 * config.channels
        self.stem = nn.Sequential(
            nn.Conv2d(1, narrow, 3, padding=1, bias=False), nn.BatchNorm2d(narrow), nn.GELU()
        )
        widths = [narrow] * config.blocks + [wide] * config.blocks
        self.blocks = nn.ModuleList(
            ResidualBlock(inputs, outputs, stride=1 if inputs == outputs else 2)
            for inputs, outputs in zip([narrow, *widths], widths, strict=False)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.fc = nn.Linear(wide, config.classes)

    def forward(self, images: Tensor) -> Tensor:  # (batch, 1, height, width) -> (batch, classes)
        x = self.stem(images)
        for block in self.blocks:
            if self.gradient_checkpointing and self.training:
                contexts = partial(_recompute_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return self.fc(self.dropout(x.mean((-2, -1))))
