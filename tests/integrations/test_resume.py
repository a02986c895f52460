"""Files of other optimizers' runs, continued with the optimizer of a model: none of their state is lost."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from groups.torchvision_stub import torchvision_stub
from snippets import ROOT, run_snippet
from torch import nn

from fused_adamw import FusedHygieneAdamW, build_param_groups

from .loops import LR, TOLERANCE, WEIGHT_DECAY, Model, dataset, distance, loader, loss_of, train_epoch
from .test_migration import DOCS


class Larger(Model):
    """With what policies disagree on: an embedding, and a norm that the Trainer does not recognise."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(5, 6)
        self.gain = nn.BatchNorm1d(6)

    def forward(self, x, labels):
        return super().forward(self.gain(x) + self.table.weight.sum(0), labels)


def nanogpt(model, path):
    """What nanoGPT's train.py saves, with the groups of its configure_optimizers."""
    params = [p for _, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95))
    train_epoch(model, optimizer)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "iter_num": 12}
    torch.save(checkpoint, path)
    return torch.load(path, weights_only=True)["optimizer"]


def trainer(model, path):
    """What transformers' Trainer saves beside the model."""
    transformers = pytest.importorskip("transformers")
    args = transformers.TrainingArguments(
        output_dir=str(path),
        num_train_epochs=1,
        per_device_train_batch_size=4,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.Trainer(model, args, train_dataset=dataset()).train()
    (file,) = Path(path).glob("checkpoint-*/optimizer.pt")
    return torch.load(file, weights_only=True)


def timm(model, path):
    """What timm's CheckpointSaver saves of an optimizer that timm made."""
    with torchvision_stub():
        optim = pytest.importorskip("timm.optim")
    optimizer = optim.create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY)
    train_epoch(model, optimizer)
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    return torch.load(path, weights_only=True)["optimizer"]


def plain(model, path):
    """One group, as in most scripts."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    train_epoch(model, optimizer)
    torch.save(optimizer.state_dict(), path)
    return torch.load(path, weights_only=True)


RUNS = {
    "nanogpt": nanogpt,
    "huggingface": trainer,
    "timm": timm,
    "all": plain,
}


def calls_of(message):
    """What the message tells to do: by name, or with the checkpoint's groups."""
    (by_name,) = re.findall(r"(optimizer\.load_state_dict_by_name\(.*?\)\)?) takes", message)
    (rebuilt,) = re.findall(r"(FusedHygieneAdamW\(.*?), \.\.\.\) loads it as it is", message)
    return by_name, f"{rebuilt}, lr=0.5)"


@pytest.mark.parametrize("policy", RUNS)
def test_a_run_goes_on(tmp_path, policy):
    trained = Larger()
    saved = RUNS[policy](trained, tmp_path / "file")
    model = copy.deepcopy(trained)
    optimizer = FusedHygieneAdamW(model, lr=0.5, weight_decay=WEIGHT_DECAY)
    with pytest.raises(
        ValueError, match=f"policy '{policy}'" if policy != "all" else "torch.optim.AdamW"
    ) as e:
        optimizer.load_state_dict(saved)
    names = {
        "optimizer": optimizer,
        "state_dict": saved,
        "model": model,
        "build_param_groups": build_param_groups,
        "FusedHygieneAdamW": FusedHygieneAdamW,
    }
    by_name, rebuilt = calls_of(str(e.value))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(by_name, names)

    # The same order of parameters, told independently: by the state's shapes and order.
    groups = [{"params": list(trained.parameters())}]
    if policy != "all":
        groups = build_param_groups(trained, WEIGHT_DECAY, policy=policy)
        assert [len(group["params"]) for group in groups] == [len(g["params"]) for g in saved["param_groups"]]
    theirs = torch.optim.AdamW(groups)
    theirs.load_state_dict(copy.deepcopy(saved))
    steps = set()
    for p, q in zip(trained.parameters(), model.parameters(), strict=True):
        a, b = theirs.state[p], optimizer.state[q]
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        steps.add(b["step"].item())
    assert steps == {12}
    lr = saved["param_groups"][0]["lr"]
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (lr, WEIGHT_DECAY),
        (lr, 0.0),
    ]
    before = copy.deepcopy(model)
    train_epoch(model, optimizer)
    assert distance(model, before) > 0 or lr == 0

    same = copy.deepcopy(trained)
    optimizer = eval(rebuilt, {**names, "model": same})
    optimizer.load_state_dict(saved)
    train_epoch(same, optimizer)
    train_epoch(trained, theirs)
    assert distance(same, trained) < TOLERANCE


def test_the_lines_in_the_docs():
    heading = "Checkpoints with other groups"
    optimizer = run_snippet(DOCS, heading)["optimizer"]
    assert {state["step"].item() for state in optimizer.state.values()} == {12}
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", (ROOT / DOCS).read_text(), re.M | re.S)[1]
    assert set(re.findall(r'policy="(\w+)"', section)) == set(RUNS) - {"all"}  # each of them is tested above


@pytest.mark.parametrize(
    "make",
    [
        lambda o, **k: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10, **k),
        lambda o, **k: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step, **k),
    ],
    ids=["cosine", "lambda"],
)
def test_a_scheduler_goes_on_with_other_groups(make):
    """Built anew: its own checkpoint has one entry per group."""
    trained = Larger()
    optimizer = torch.optim.AdamW(trained.parameters(), lr=LR)
    scheduler = make(optimizer)
    for batch in list(loader())[:4]:
        loss_of(trained, batch).backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    model = copy.deepcopy(trained)
    ours = FusedHygieneAdamW(model, lr=0.5)
    ours.load_state_dict_by_name(optimizer.state_dict(), model.named_parameters())
    resumed = make(ours, last_epoch=scheduler.state_dict()["last_epoch"] - 1)
    for _ in range(3):
        assert [group["lr"] for group in ours.param_groups] == pytest.approx(scheduler.get_last_lr() * 2)
        for o, s in ((optimizer, scheduler), (ours, resumed)):
            o.step()
            s.step()
