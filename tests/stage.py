"""What the code in the documentation takes for granted: a model with the names of GPT-2, and its data."""

import torch
from torch import nn

WIDTH, VOCABULARY, CONTEXT = 128, 64, 16


class Block(nn.Module):
    """A pre-norm block whose two branches share one norm."""

    def __init__(self, width):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.gate = nn.Linear(width, width)
        self.mlp = nn.Linear(width, width)

    def forward(self, x):
        y = self.ln_1(x)
        return x + torch.tanh(self.gate(y)) * self.mlp(y)


class GPT(nn.Module):
    """A language model without attention; its loss is in the result, as in transformers."""

    def __init__(self, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, width),
                "wpe": nn.Embedding(CONTEXT, width),
                "h": nn.ModuleList(Block(width) for _ in range(2)),
                "ln_f": nn.LayerNorm(width),
            }
        )
        self.lm_head = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, tokens, labels=None):
        parts = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = block(x)
        logits = self.lm_head(parts["ln_f"](x))
        if labels is None:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())


def tokens(seed=0):
    """A batch of four."""
    return torch.randint(VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(seed))


def loss(model):
    """Of one batch."""
    return model(tokens(), labels=tokens(1))
