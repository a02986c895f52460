"""The optimizers that are compared: each recipe clips and steps, and says what the gradient norm was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

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


@dataclass(frozen=True)
class Precision:
    """In which dtype a model trains, and what its optimizer is asked for."""

    title: str
    dtype: torch.dtype
    options: dict[str, Any] = field(default_factory=dict)


#: The runs of `--precision`, from the most bytes per parameter to the fewest.
PRECISIONS = {
    "fp32": Precision("float32", torch.float32),
    "bf16-split": Precision(
        "bfloat16, split master",
        torch.bfloat16,
        {"master_weights": "split", "state_dtype": torch.bfloat16},
    ),
    "bf16": Precision("bfloat16, nearest, as in torch", torch.bfloat16, {"stochastic_rounding": False}),
    "bf16-stochastic": Precision("bfloat16, stochastic", torch.bfloat16, {"stochastic_rounding": True}),
    "8bit": Precision(
        "bfloat16, stochastic, 8-bit moments",
        torch.bfloat16,
        {"stochastic_rounding": True, "state_dtype": "8bit"},
    ),
}


def dtype_of(run: str) -> torch.dtype:
    """The dtype of the parameters in one of the runs."""
    return PRECISIONS[run].dtype if run in PRECISIONS else torch.float32


class Recipe(Protocol):
    """One way to turn gradients into an update."""

    @property
    def optimizer(self) -> Optimizer: ...

    def step(self, scaler: GradScaler, loss: Tensor) -> Tensor:
        """Clip the gradients of a loss, step, and return the gradient norm from before the clip."""
        ...


class TorchRecipe:
    """What a careful user writes by hand: unscale, clip, step."""

    def __init__(self, model: nn.Module, lr: float, weight_decay: float, clip: float) -> None:
        self.optimizer = AdamW(build_param_groups(model, weight_decay), lr=lr, betas=BETAS)
        self.parameters = list(model.parameters())
        self.clip = clip

    def step(self, scaler: GradScaler, loss: Tensor) -> Tensor:
        scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        scaler.step(self.optimizer)
        scaler.update()
        return norm


class FusedRecipe:
    """The same with FusedHygieneAdamW: unscaling and clipping happen inside the step."""

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor],
        lr: float,
        weight_decay: float,
        clip: float,
        backend: str,
        **options: Any,
    ) -> None:
        self.optimizer = FusedHygieneAdamW(
            params,  # a model: groups; its parameters: all decay alike
            lr=lr,
            betas=BETAS,
            weight_decay=weight_decay,
            max_grad_norm=clip,
            backend=backend,
            **options,
        )

    def step(self, scaler: GradScaler, loss: Tensor) -> Tensor:
        if self.optimizer.guard is not None:
            self.optimizer.observe(loss)
        scaler.step(self.optimizer)
        scaler.update()
        assert self.optimizer.grad_norm is not None  # there is a clip, so there is a norm
        return self.optimizer.grad_norm


def build_recipe(
    run: str, model: nn.Module, lr: float, weight_decay: float, clip: float, backend: str, **options: Any
) -> Recipe:
    """Build the recipe of one of the runs in `TITLES` and `PRECISIONS`; `options` are what torch's lacks."""
    if run == "torch":
        return TorchRecipe(model, lr, weight_decay, clip)
    params = model.parameters() if run == "uniform" else model
    options |= PRECISIONS[run].options if run in PRECISIONS else {}
    return FusedRecipe(params, lr, weight_decay, clip, backend, **options)
