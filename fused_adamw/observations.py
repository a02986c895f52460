"""What the last step found: the norm of all gradients and of each, by name, and which were not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .state.loading import Checkpointed
from .step.plan import Plan


class ParamStats(NamedTuple):
    """What the last step found of a parameter, or of several together.

    Attributes:
        grad_norm: Of the gradient, without the loss scale and before clipping; None: not known, as the loss
            scale of a step whose norm is not finite is not kept.
        nonfinite: Whether the gradient holds an infinity or a NaN.
    """

    grad_norm: float | None
    nonfinite: bool


# For each group, the name of each parameter and what was found of it; None: it had no gradient.
_Found: TypeAlias = "list[list[tuple[str, ParamStats | None]]]"


class Observed(Checkpointed):
    """The part of the optimizer that tells what a step found."""

    _plan: Plan | None
    _n_logged: int = 0

    @property
    def grad_norm(self) -> Tensor | Any:
        """Global gradient norm of the last step, before clipping and without any loss scale.

        A new 0-dim tensor on the parameters' device, float32 (float64 where a parameter is float64); None
        before the first step and without a norm pass. Only reading its value waits for the device. Typed so
        that `optimizer.grad_norm.item()` needs no check for None where a norm is known to be there.
        """
        if not self._has_norm:
            return None
        dtypes = {p.dtype for group in self.param_groups for p in group["params"]}
        dtype = torch.float32 if dtypes.isdisjoint((torch.float64, torch.complex128)) else torch.float64
        assert self._status is not None
        return self._status[0].to(dtype, copy=True)

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped so far, by `skip_nonfinite` or a GradScaler: a new 0-dim int64 tensor."""
        if self._status is None:
            return torch.zeros((), dtype=torch.int64, device="cpu")
        return self._status[1].to(torch.int64)

    def param_stats(self) -> dict[str, ParamStats]:
        """What the last step found of each parameter that had a gradient, by name.

        It costs the step nothing, as the norm pass leaves a sum for each piece of each gradient: they are
        copied to the host and added up here, in float64. Parameters without names are called `group 0.3`.
        Of DTensors this is a collective of each mesh: call it on all processes. Other norm processes
        (`norm_process_group`) are not asked: of FSDP1's parameters this is the part of this process.

        Returns:
            By name, in the order of the groups.

        Raises:
            RuntimeError: There was no step yet, or the last one had no norm pass.
        """
        return _of_params(self._found_in_groups())

    def nonfinite_params(self) -> list[str]:
        """The names of the parameters whose gradient held an infinity or a NaN in the last step.

        Raises:
            RuntimeError: As `param_stats`.
        """
        return [name for name, stats in self.param_stats().items() if stats.nonfinite]

    def group_stats(self) -> dict[str, ParamStats]:
        """As `param_stats`, together: by group (`group 0`) and, of a model, by role (`role matrix`).

        Raises:
            RuntimeError: As `param_stats`.
        """
        return self._of_groups(self._found_in_groups())

    def _of_groups(self, found: _Found) -> dict[str, ParamStats]:
        together = {f"group {i}": [stats for _, stats in names] for i, names in enumerate(found)}
        of_all = [stats for names in found for _, stats in names]
        for purpose, stats in zip(self._all_purposes(), of_all, strict=True):
            if purpose.role is not None:
                together.setdefault(f"role {purpose.role}", []).append(stats)
        return {
            name: _together(present)
            for name, stats in together.items()
            if (present := [s for s in stats if s is not None])
        }

    def log_dict(self, prefix: str = "optim/", *, top_k: int = 5, every: int = 1) -> dict[str, float]:
        """Norms as a flat dict for W&B, TensorBoard or Lightning's `log_dict`.

        It holds `grad_norm` and `skipped_steps`; `grad_norm/group 0` and `grad_norm/role matrix` of every
        group and role; `grad_norm/NAME` of the parameters with the largest norms; and 1.0 as
        `nonfinite/NAME` of as many that are not finite.

        Args:
            prefix: Of all names.
            top_k: How many single parameters to name.
            every: Return nothing, without waiting for the device, except at every so many calls.

        Returns:
            Floats by name, for the caller to keep; empty at the calls that `every` leaves out.

        Raises:
            ValueError: `top_k` is negative, or `every` is not positive.
            RuntimeError: As `param_stats`.
        """
        if top_k < 0 or every < 1:
            raise ValueError(f"expected top_k >= 0 and every >= 1, got {top_k} and {every}")
        self._n_logged += 1
        if (self._n_logged - 1) % every:
            return {}
        found = self._found_in_groups()
        of_params, of_groups = _of_params(found), self._of_groups(found)
        finite = [n for n, s in of_params.items() if s.grad_norm is not None and not s.nonfinite]
        largest = sorted(finite, key=lambda name: -(of_params[name].grad_norm or 0.0))[:top_k]
        named = of_groups | {name: of_params[name] for name in largest}
        values = {"grad_norm": float(self.grad_norm), "skipped_steps": float(self.skipped_steps)}
        values |= {f"grad_norm/{n}": s.grad_norm for n, s in named.items() if s.grad_norm is not None}
        bad = [name for name, stats in of_params.items() if stats.nonfinite]
        values |= {f"nonfinite/{name}": 1.0 for name in bad[:top_k]}
        return {f"{prefix}{name}": value for name, value in values.items()}

    def _found_in_groups(self) -> _Found:
        """Ask the plan, once."""
        found = None if self._plan is None else self._plan.grad_norms()
        if found is None:
            raise RuntimeError(
                "no norms are known: they come from the norm pass of the last step(), which runs with "
                "max_grad_norm (math.inf measures and never clips) or skip_nonfinite"
            )
        return [
            [
                (name or f"group {index}.{i}", ParamStats(*found[id(p)]) if id(p) in found else None)
                for i, (name, p) in enumerate(zip(self._param_names.of(group), group["params"], strict=True))
            ]
            for index, group in enumerate(self.param_groups)
        ]


def _of_params(found: _Found) -> dict[str, ParamStats]:
    return {name: stats for names in found for name, stats in names if stats is not None}


def _together(stats: Sequence[ParamStats]) -> ParamStats:
    norms: Iterable[float | None] = [s.grad_norm for s in stats]
    known = [norm for norm in norms if norm is not None]
    total = math.sqrt(math.fsum(norm * norm for norm in known)) if len(known) == len(stats) else None
    return ParamStats(total, any(s.nonfinite for s in stats))
