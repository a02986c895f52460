"""docs/migration.md: the lines run, and do what is said of them."""

import re

import pytest
import torch
from groups.torchvision_stub import torchvision_stub
from snippets import ROOT, run_snippet

from fused_adamw import FusedHygieneAdamW, build_param_groups

from .loops import LR, TOLERANCE, WEIGHT_DECAY, Model, distance, of_apex, of_bitsandbytes, train_epoch

DOCS = "docs/migration.md"


SECTIONS = [
    re.match(".*", section)[0]
    for section in re.split(r"^## ", (ROOT / DOCS).read_text(), flags=re.M)[1:]
    if not section.startswith("Checkpoints with other groups")  # see test_resume
]


def optimizer_of(heading, model):
    """What the first snippet of a section builds."""
    return run_snippet(DOCS, heading, model=model)["optimizer"]


@pytest.mark.parametrize("heading", SECTIONS)
def test_every_line_trains(heading):
    model = Model()
    optimizer = optimizer_of(heading, model)
    assert type(optimizer) is FusedHygieneAdamW
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, WEIGHT_DECAY]
    assert distance(train_epoch(model, optimizer), Model()) > 0


def test_torch_with_the_parameters_changes_nothing_but_the_kernels():
    model, peer = Model(), Model()
    options = {"lr": LR, "weight_decay": WEIGHT_DECAY}
    train_epoch(model, FusedHygieneAdamW(model.parameters(), **options, max_grad_norm=1.0))
    train_epoch(peer, torch.optim.AdamW(peer.parameters(), **options), clip=1.0)
    assert distance(model, peer) < TOLERANCE
    hygiene = Model()
    train_epoch(hygiene, optimizer_of("From torch AdamW and `clip_grad_norm_`", hygiene))
    assert distance(hygiene, peer) > TOLERANCE


def test_timm():
    with torchvision_stub():
        optim = pytest.importorskip("timm.optim")
    model, peer = Model(), Model()
    train_epoch(model, optimizer_of("From timm `create_optimizer`", model))
    theirs = optim.create_optimizer_v2(peer, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    train_epoch(peer, theirs, clip=1.0)
    assert distance(model, peer) < TOLERANCE


def test_optimi():
    optimi = pytest.importorskip("optimi")
    model, peer = Model(), Model()
    train_epoch(model, optimizer_of("From optimi", model))
    groups = build_param_groups(peer, WEIGHT_DECAY)
    for group in groups:
        del group["param_names"]  # it knows no names
    train_epoch(peer, optimi.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY))
    # It computes 1 - beta and the bias correction in other orders: more roundings, of the same size.
    assert distance(model, peer) < 10 * TOLERANCE


def load(heading, optimizer, checkpoint):
    """Run the second snippet of a section: it loads a checkpoint of the other optimizer."""
    run_snippet(DOCS, heading, 1, checkpoint=checkpoint, optimizer=optimizer)


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_checkpoint_with_the_step_in_the_group():
    """In the form of apex: float32 moments beside bfloat16 parameters, `step` in the group."""
    heading = "From apex FusedAdam"
    optimizer = optimizer_of(heading, Model().bfloat16())
    params = params_of(optimizer)
    checkpoint = of_apex(optimizer)
    params, frozen = params[:-1], params[-1]
    for i, p in enumerate(params):
        moment = torch.full(p.shape, 1 + 2.0**-20)  # more digits than bfloat16 has
        checkpoint["state"][i] = {"exp_avg": moment, "exp_avg_sq": moment.clone()}
    load(heading, optimizer, checkpoint)
    for p in params:
        assert torch.equal(optimizer.state[p]["exp_avg"], torch.full(p.shape, 1 + 2.0**-20))
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert {float(optimizer.state[p]["step"]) for p in params} == {101.0}
    assert not optimizer.state.get(frozen)


@pytest.mark.parametrize("nested", [True, False])
def test_a_checkpoint_of_bitsandbytes(nested):
    heading = "From bitsandbytes AdamW"
    model = Model()
    source = optimizer_of(heading, model)
    train_epoch(model, source)
    checkpoint = of_bitsandbytes(source, nested)
    optimizer = optimizer_of(heading, model)
    load(heading, optimizer, checkpoint)
    for p, q in zip(params_of(source), params_of(optimizer), strict=True):
        assert optimizer.state[q].keys() == source.state[p].keys()
        assert all(torch.equal(optimizer.state[q][key], value) for key, value in source.state[p].items())
