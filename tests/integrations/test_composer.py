"""Composer: it finds the optimizer's state in a checkpoint by the name of the optimizer's class."""

import copy
import sys
import warnings

import pytest
import torch
from groups import torchvision_stub as stub

from fused_adamw import FusedHygieneAdamW

from .loops import LR, WEIGHT_DECAY, Model, dataset, distance, loss_of, run_snippet

pytest.importorskip("torchmetrics")  # before the stub, which it would take for torchvision
with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations of what it imports
    patch.setattr(stub, "NAMES", (*stub.NAMES, ".utils", ".models", ".models.segmentation", ".models.resnet"))
    patch.setitem(sys.modules, "mcli", stub._Empty("mcli"))  # the client of a platform
    with stub.torchvision_stub():
        composer = pytest.importorskip("composer")
        from composer import Trainer, algorithms  # noqa: F401  # algorithms import torchvision when first used
        from composer.models import ComposerModel

EPOCH = 12  # batches


class Composed(ComposerModel):
    def __init__(self):
        super().__init__()
        self.model = Model()

    def forward(self, batch):
        return batch

    def loss(self, outputs, batch):
        return loss_of(self.model, batch)


def trained(make, n_batches, **more):
    model = Composed()
    optimizer = make(model)
    trainer = Trainer(
        model=model,
        train_dataloader=torch.utils.data.DataLoader(dataset(), batch_size=4),
        optimizers=optimizer,
        max_duration=f"{n_batches}ba",
        progress_bar=False,
        device="cpu",
        **more,
    )
    before = copy.deepcopy(optimizer.state_dict())
    trainer.fit()
    return model, before


def with_torch(model):
    return torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)


def swapped(model):
    return run_snippet("Composer", model=model)["optimizer"]


def test_the_one_word_swap_resumes_a_run_of_torch():
    trained(with_torch, EPOCH // 2, save_folder="run", save_overwrite=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is not in the state_dict")
        model, before = trained(swapped, EPOCH, load_path="run/latest-rank0.pt")
    assert {state["step"].item() for state in before["state"].values()} == {EPOCH // 2}
    whole, _ = trained(with_torch, EPOCH)
    assert distance(model, whole) < 1e-6


def test_a_class_of_another_name_loses_its_state():
    """Why there is one of torch's name."""
    trained(with_torch, EPOCH // 2, save_folder="run", save_overwrite=True)
    with pytest.warns(UserWarning, match="FusedHygieneAdamW is not in the state_dict"):
        trained(lambda model: FusedHygieneAdamW(model.parameters()), EPOCH, load_path="run/latest-rank0.pt")
