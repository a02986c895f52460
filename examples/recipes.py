"""The optimizers that are compared: each recipe clips and steps, and says what the gradient norm was."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import AdamW, Optimizer

from fused_adamw import FusedHygieneAdamW, build_param_groups

BETAS = (0.9, 0.98)

#: The runs, by the name they have in the metrics, and how they are called in tables and plots.
TITLES = {
    "torch": "torch AdamW + clip",
    "fused": "FusedHygieneAdamW",
    "uniform": "FusedHygieneAdamW, uniform decay",
}


class Recipe(Protocol):
    """One way to turn gradients into an update."""

    @property
    def optimizer(self) -> Optimizer: ...

    def step(self, scaler: GradScaler) -> Tensor:
        """Clip the gradients, step, and return the gradient norm from before the clip."""
        ...


class TorchRecipe:
    """What a careful user writes by hand: unscale, clip, step."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, clip: float) -> None:
        self.optimizer = AdamW(build_param_groups(model, weight_decay), lr=lr, betas=BETAS)
        self.parameters = list(model.parameters())
        self.clip = clip

    def step(self, scaler: GradScaler) -> Tensor:
        scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        scaler.step(self.optimizer)
        scaler.update()
        return norm


class FusedRecipe:
    """The same with FusedHygieneAdamW: unscaling and clipping happen inside the step."""

    def __init__(
        self, model: nn.Module, lr: float, weight_decay: float, clip: float, backend: str, hygiene: bool
    ) -> None:
        self.optimizer = FusedHygieneAdamW(
            model if hygiene else model.parameters(),  # the model: groups; its parameters: all decay alike
            lr=lr,
            betas=BETAS,
            weight_decay=weight_decay,
            max_grad_norm=clip,
            backend=backend,
        )

    def step(self, scaler: GradScaler) -> Tensor:
        scaler.step(self.optimizer)
        scaler.update()
        assert self.optimizer.grad_norm is not None  # there is a clip, so there is a norm
        return self.optimizer.grad_norm


def build_recipe(
    run: str, model: nn.Module, lr: float, weight_decay: float, clip: float, backend: str
) -> Recipe:
    """Build the recipe of one of the runs in `TITLES`."""
    if run == "torch":
        return TorchRecipe(model, lr, weight_decay, clip)
    return FusedRecipe(model, lr, weight_decay, clip, backend, hygiene=run == "fused")
