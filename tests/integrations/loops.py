"""What the tests of frameworks share: a model, its data, the snippets of the docs, the comparison."""

import re
from pathlib import Path

import torch
from torch import nn

from fused_adamw import FusedHygieneAdamW, build_param_groups

DOCS = Path(__file__).parents[2] / "docs" / "integrations.md"
# As in the snippets.
LR, WEIGHT_DECAY, CLIP = 1e-3, 0.1, 1.0
BATCHES, BATCH_SIZE = 12, 4
# Both sides take at most 12 float32 steps from parameters below 1: a rounding is 6e-8, and each may round the
# other way, as may the gradients that follow. Without the clip, parameters must end a thousand times as far.
TOLERANCE = 1e-6


class Model(nn.Module):
    """Two layers with a norm between them, called as transformers calls its models."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.body(x), labels)}


def dataset():
    """Samples for 12 batches; some have gradients below the threshold, some far above, also two by two."""
    generator = torch.Generator().manual_seed(1)
    return [
        {
            "x": torch.randn(6, generator=generator),
            "labels": torch.randn(3, generator=generator)
            * (0.1, 0.2, 30.0, 1.0, 0.3, 8.0)[i // BATCH_SIZE % 6],
        }
        for i in range(BATCHES * BATCH_SIZE)
    ]


def loader():
    return torch.utils.data.DataLoader(dataset(), batch_size=BATCH_SIZE)


def loss_of(model, batch):
    return model(**batch)["loss"]


def torch_adamw(model):
    """The AdamW of torch on the groups that the snippets have."""
    return torch.optim.AdamW(build_param_groups(model, WEIGHT_DECAY), lr=LR)


def train_epoch(model, optimizer, clip=None):
    """One epoch of plain PyTorch; returns the model."""
    for batch in loader():
        loss_of(model, batch).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return model


def run_snippet(section, number=0, **names):
    """Run a snippet of docs/integrations.md.

    Args:
        section: Its heading.
        number: Which one of the section.
        names: What it takes for granted, beside what every snippet does.

    Returns:
        All names afterwards; `logged` has what was given to `log`.
    """
    (text,) = re.findall(rf"^## {section}\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.M | re.S)
    code = re.findall(r"^```python\n(.*?)^```", text, re.M | re.S)[number]
    logged = []
    names = {
        "torch": torch,
        "FusedHygieneAdamW": FusedHygieneAdamW,
        "build_param_groups": build_param_groups,
        "model": Model(),
        "dataset": dataset(),
        "loader": loader(),
        "loss_of": loss_of,
        "log": lambda name, value: logged.append(value),
        "log_every": 2,
        "device": "cpu",
        "logged": logged,
        **names,
    }
    exec(compile(code, f"{DOCS.name}, {section}", "exec"), names)
    return names


def distance(model, other):
    """The largest difference between two parameters."""
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in pairs)


def assert_same(ours, train):
    """Parameters are those of torch's AdamW behind the framework's clip, and would not be without the clip.

    Args:
        ours: The model that our optimizer trained.
        train: Trains another with torch's AdamW and the framework's clipping to a norm, None: no clipping.
    """
    clipped, unclipped = train(CLIP), train(None)
    assert distance(ours, clipped) < TOLERANCE
    assert distance(unclipped, clipped) > 1000 * TOLERANCE


def assert_norms_before_clipping(norms, n):
    """What was logged are norms before the clip: some far above it, some below."""
    assert len(norms) == n
    assert min(norms) < CLIP < max(norms) / 2
    assert len(set(norms)) == n
