"""What the tests of frameworks and the snippets of the docs share: a model, its data, the comparison."""

import copy
from functools import partial

import torch
from snippets import run_snippet as run_snippet_of
from torch import nn

from fused_adamw import build_param_groups

run_snippet = partial(run_snippet_of, "docs/integrations.md")
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


def of_apex(optimizer):
    """A checkpoint as apex writes it: `step` in the group, and options that torch lacks."""
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for group in checkpoint["param_groups"]:
        group.update(step=100, bias_correction=True)
    for state in checkpoint["state"].values():
        del state["step"]
    return checkpoint


def of_bitsandbytes(optimizer, nested=True):
    """As bitsandbytes: `step` an int, other names for the moments, in newer versions in a dict within."""
    checkpoint = copy.deepcopy(optimizer.state_dict())
    for i, state in checkpoint["state"].items():
        moments = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        moments = {"__bnb_optimizer_quant_state__": moments} if nested else moments
        checkpoint["state"][i] = {"step": int(state["step"]), **moments}
    return checkpoint


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
