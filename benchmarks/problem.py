"""One case's tensors.

All optimizers of a race step the same memory: parameters, gradients and moments. None of them has a luckier
place than another, and a race needs the memory of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .cases import LAYOUTS, Case, Gradients, Layout
from .training import Training

LR, WEIGHT_DECAY = 1e-3, 0.1


def as_real(t: Tensor) -> Tensor:
    """A complex tensor as pairs of reals; others as they are."""
    return torch.view_as_real(t) if t.is_complex() else t


def _memory(t: Tensor) -> Tensor:
    """The part of an expanded tensor that is in memory: all others are in it as a whole."""
    return t[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in t.stride())]


class Problem:
    """The tensors of one case, with a start that can be gone back to."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        self.device = device
        generator = torch.Generator(device).manual_seed(0)
        grad_dtype = case.grad_dtype or case.dtype

        def normal(scale: float, dtype: torch.dtype, layout: Layout) -> list[Tensor]:
            empty = (torch.empty(shape, dtype=dtype, device=device) for shape in case.shapes)
            return [LAYOUTS[layout](t.normal_(0.0, scale, generator=generator)) for t in empty]

        self._training: Training | None = None
        if case.training is None:
            self.params: list[Tensor] = [nn.Parameter(p) for p in normal(0.02, case.dtype, case.layout)]
        else:
            with torch.device(device):
                self._training = case.training(*case.size)
            self.params = list(self._training.model.parameters())
        if case.grad_dtype is not None:
            for p in self.params:
                p.grad_dtype = grad_dtype
        self.start = [p.detach().clone() for p in self.params]
        self.gradients = normal(0.01, grad_dtype, case.grad_layout)
        self.exp_avgs = [torch.zeros_like(p) for p in self.start]
        self.exp_avg_sqs = [torch.zeros_like(p) for p in self.start]
        self._grads = normal(0.01, grad_dtype, case.grad_layout)
        self._spare: list[Tensor] = []
        self._masters: list[Tensor] = []
        self._alike: list[Tensor] = []
        self.set_gradients(1.0)
        reals = map(as_real, self.gradients)
        squares = sum(torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in reals)
        self.norm = float(squares) ** 0.5
        self.max_norm = 0.5 * self.norm

    @torch.no_grad()
    def reset(self) -> None:
        """Go back to the start."""
        for p, start, m, v in zip(self.params, self.start, self.exp_avgs, self.exp_avg_sqs, strict=True):
            p.copy_(start)
            m.zero_()
            v.zero_()
        for master, start in zip(self._masters, self.start, strict=False):
            master.copy_(start)

    def set_gradients(self, scale: float) -> None:
        """Fill the gradients anew; torch's clip has changed them."""
        for p, grad, source in zip(self.params, self._grads, self.gradients, strict=True):
            torch.mul(_memory(source), scale, out=_memory(grad))
            p.grad = grad
        for master, grad in zip(self._masters, self._grads, strict=False):
            master.grad = grad.float()

    def masters(self) -> list[Tensor]:
        """The parameters in float32, with gradients in float32: for peers that train so."""
        if not self._masters:
            self._masters = [start.float().requires_grad_() for start in self.start]
            for master, grad in zip(self._masters, self._grads, strict=True):
                master.grad = grad.float()
        return self._masters

    def params_alike(self) -> list[Tensor]:
        """The parameters, for peers that take no other dtype or layout of gradients: in the same memory.

        Where the case has another, these have gradients of their own, which `convert_gradients` fills.
        """
        if not self.case.has_other_grads:
            return self.params
        if not self._alike:
            self._alike = [nn.Parameter(p.detach()) for p in self.params]
            for p in self._alike:
                p.grad = torch.empty_like(p)
        return self._alike

    def convert_gradients(self) -> None:
        """Copy the gradients to those of `params_alike`."""
        for alike, p in zip(self._alike, self.params, strict=False):
            if alike.grad is not None and p.grad is not None:
                alike.grad.copy_(p.grad)

    def move_gradients(self) -> None:
        """Put every gradient at another address."""
        if not self._spare:
            self._spare = [grad.clone() for grad in self._grads]
        self._grads, self._spare = self._spare, self._grads
        for p, grad in zip(self.params, self._grads, strict=True):
            p.grad = grad

    def backward(self) -> None:
        """Make the gradients anew, by a forward and a backward pass of the case's model."""
        assert self._training is not None
        self._training.backward()

    def before_step(self, gradients: Gradients) -> Callable[[], None] | None:
        """What comes before a step whose gradients are so; None: nothing."""
        return {"kept": None, "moved": self.move_gradients, "new": self.backward}[gradients]

    def param_groups(self, params: Sequence[Tensor] | None = None) -> list[dict[str, Any]]:
        """The groups: layer-wise learning rates, every other group without weight decay.

        Args:
            params: What to step in the place of the parameters.
        """
        params = self.params if params is None else params
        return [
            {
                "params": [params[i] for i in members],
                "lr": LR * 0.9 ** (number // 2),
                "weight_decay": WEIGHT_DECAY * (number % 2 == 0),
            }
            for number, members in enumerate(self.case.groups)
        ]

    def new_step(self) -> Tensor:
        """A step count where the parameters are."""
        return torch.zeros((), device=self.device)

    def share_state(self, optimizer: torch.optim.Optimizer, new_step: Callable[[], object]) -> None:
        """Give an optimizer the problem's moments, and step counts of its own."""
        params = [p for group in optimizer.param_groups for p in group["params"]]
        of_group = (i for members in self.case.groups for i in members)
        for p, i in zip(params, of_group, strict=True):
            state = {"step": new_step(), "exp_avg": self.exp_avgs[i], "exp_avg_sq": self.exp_avg_sqs[i]}
            optimizer.state[p] = state
