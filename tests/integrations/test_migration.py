"""docs/migration.md: the lines run, and do what is said of them."""

import copy
import re
import textwrap
from pathlib import Path

import pytest
import torch
from groups.torchvision_stub import torchvision_stub

from fused_adamw import FusedHygieneAdamW, build_param_groups

from .loops import LR, TOLERANCE, WEIGHT_DECAY, Model, distance, train_epoch

DOCS = Path(__file__).parents[2] / "docs" / "migration.md"


def snippets():
    """Section and code; of several snippets in a section, the first."""
    for section in re.split(r"^## ", DOCS.read_text(), flags=re.M)[1:]:
        heading, _, text = section.partition("\n")
        if heading == "Checkpoints with other groups":  # see test_resume
            continue
        yield heading, re.search(r"^```python\n(.*?)^```", text, re.M | re.S)[1]


def optimizer_of(heading, model):
    """What the snippet of a section builds."""
    names = {
        "torch": torch,
        "FusedHygieneAdamW": FusedHygieneAdamW,
        "build_param_groups": build_param_groups,
        "model": model,
    }
    exec(dict(snippets())[heading], names)
    return names["optimizer"]


@pytest.mark.parametrize(("heading", "code"), list(snippets()), ids=lambda text: text.split("\n")[0])
def test_every_line_runs(heading, code):
    assert code.startswith("# optimizer = ")  # what there was
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
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOCS.read_text(), re.M | re.S)
    (code,) = re.findall(r"^  ```python\n(.*?)^  ```", section, re.M | re.S)
    exec(textwrap.dedent(code), {"checkpoint": checkpoint, "optimizer": optimizer})


def params_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def test_a_checkpoint_with_the_step_in_the_group():
    """In the form of apex: float32 moments beside bfloat16 parameters, `step` in the group."""
    heading = "From apex FusedAdam"
    optimizer = optimizer_of(heading, Model().bfloat16())
    params = params_of(optimizer)
    checkpoint = optimizer.state_dict()
    for group in checkpoint["param_groups"]:
        group.update(step=100, bias_correction=True)
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
    """In its form: `step` an int, other names for the moments, in newer versions in a dict of their own."""
    heading = "From bitsandbytes AdamW"
    model = Model()
    source = optimizer_of(heading, model)
    train_epoch(model, source)
    checkpoint = copy.deepcopy(source.state_dict())
    for i, state in checkpoint["state"].items():
        moments = {"state1": state["exp_avg"], "state2": state["exp_avg_sq"]}
        moments = {"__bnb_optimizer_quant_state__": moments} if nested else moments
        checkpoint["state"][i] = {"step": int(state["step"]), **moments}
    optimizer = optimizer_of(heading, model)
    load(heading, optimizer, checkpoint)
    for p, q in zip(params_of(source), params_of(optimizer), strict=True):
        assert optimizer.state[q].keys() == source.state[p].keys()
        assert all(torch.equal(optimizer.state[q][key], value) for key, value in source.state[p].items())
