"""What the last step found: the norm of all gradients and of each, by name, and which were not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .guarded import Guarded
from .step.statistics import ParamStats
from .tables import FIRST_SKIPPED, OUTCOMES, StatusStruct, word_of

# For each group, the name of each parameter and what was found of it; None: it had no gradient.
_Found: TypeAlias = "list[list[tuple[str, ParamStats | None]]]"


class Observed(Guarded):
    """The part of the optimizer that tells what a step found."""

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
        self._check_streak()
        return self._status[word_of(StatusStruct, "grad_norm")].to(dtype, copy=True)

    @property
    def skipped_steps(self) -> Tensor:
        """Steps skipped so far, for whatever reason: a new 0-dim int64 tensor.

        With a `guard`, reading it waits for the device.

        Raises:
            RuntimeError: The `guard` has skipped more steps in a row than it may.
        """
        return torch.stack(list(self.skipped_steps_by_reason.values())).sum()

    @property
    def skipped_steps_by_reason(self) -> dict[str, Tensor]:
        """The same by reason: 0-dim int64 tensors.

        "overflow": a GradScaler found one; "nonfinite": the norm or the observed loss was not finite;
        "spike": the norm was above the guard's limit; "loss_spike": the observed loss was.

        Raises:
            RuntimeError: As `skipped_steps`.
        """
        self._check_streak()
        counts = self._counts()
        return {name: counts[i] for i, name in enumerate(OUTCOMES) if i >= FIRST_SKIPPED}

    def _counts(self) -> Tensor:
        """How many steps had each outcome."""
        if self._status is None:
            return torch.zeros(len(OUTCOMES), dtype=torch.int64, device="cpu")
        first = word_of(StatusStruct, "counts")
        return self._status[first : first + len(OUTCOMES)].to(torch.int64)

    def param_stats(self) -> dict[str, ParamStats]:
        """What the last step found of each parameter that had a gradient, by name.

        Norms of gradients cost the step nothing, as the norm pass leaves a sum for each piece of each
        gradient; the rest is found out where `stats` is set. The sums are copied to the host and added up
        here, in float64. Parameters without names are called `group 0.3`.
        Of DTensors this is a collective of each mesh: call it on all processes. Other norm processes
        (`norm_process_group`) are not asked: of FSDP1's parameters this is the part of this process.

        Returns:
            By name, in the order of the groups.

        Raises:
            RuntimeError: There was no step yet, or the last one had neither a norm pass nor `stats`; or as
                `skipped_steps`.
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
        """What the last step found as a flat dict for W&B, TensorBoard or Lightning's `log_dict`.

        It holds `grad_norm` and `skipped_steps`, with a `guard` by reason too; `grad_norm/group 0` and
        `grad_norm/role matrix` of every group and role; `grad_norm/NAME` of the parameters with the largest
        norms; and 1.0 as `nonfinite/NAME` of as many that are not finite. With `stats`, of the same groups,
        roles and parameters also `grad_max`, `update_norm`, `param_norm`, `update_ratio`, which is the one
        over the other, and `lost_updates`.

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
        values = {} if self.grad_norm is None else {"grad_norm": float(self.grad_norm)}
        values["skipped_steps"] = float(self.skipped_steps)
        if self._guard is not None:
            counts = zip(OUTCOMES[1:], self._counts()[1:].tolist(), strict=True)
            values |= {f"skipped_steps/{name}": float(n) for name, n in counts if name != "clipped_spike"}
            values["clipped_spikes"] = float(self._counts()[1])
        for quantity in _QUANTITIES:
            known = {n: value for n, s in named.items() if (value := _QUANTITIES[quantity](s)) is not None}
            values |= {f"{quantity}/{n}": value for n, value in known.items()}
        bad = [name for name, stats in of_params.items() if stats.nonfinite]
        values |= {f"nonfinite/{name}": 1.0 for name in bad[:top_k]}
        return {f"{prefix}{name}": value for name, value in values.items()}

    def _found_in_groups(self) -> _Found:
        """Ask the plan, once."""
        self._check_streak()
        found = None if self._plan is None else self._plan.observe()
        if found is None:
            raise RuntimeError(
                "no norms are known: they come from the last step(), where stats is set, or max_grad_norm "
                "(math.inf measures and never clips), skip_nonfinite or a guard"
            )
        return [
            [
                (name or f"group {index}.{i}", found.get(id(p)))
                for i, (name, p) in enumerate(zip(self._param_names.of(group), group["params"], strict=True))
            ]
            for index, group in enumerate(self.param_groups)
        ]


def _of_params(found: _Found) -> dict[str, ParamStats]:
    return {name: stats for names in found for name, stats in names if stats is not None}


def _together(stats: Sequence[ParamStats]) -> ParamStats:
    """Several parameters as one. Whatever is not known of one is not known of them."""

    def norm(norms: list[float | None]) -> float | None:
        known = [x for x in norms if x is not None]
        return math.sqrt(math.fsum(x * x for x in known)) if len(known) == len(norms) else None

    largest = [s.grad_max for s in stats]
    lost = [s.lost_updates for s in stats if s.lost_updates is not None]
    return ParamStats(
        norm([s.grad_norm for s in stats]),
        None if None in largest else float(torch.tensor(largest, dtype=torch.float64).max()),
        any(s.nonfinite for s in stats),
        norm([s.update_norm for s in stats]),
        norm([s.param_norm for s in stats]),
        sum(lost) if len(lost) == len(stats) else None,
    )


def _update_ratio(s: ParamStats) -> float | None:
    """How large the update was beside the parameter."""
    if s.update_norm is None or not s.param_norm:
        return None
    return s.update_norm / s.param_norm


# What is logged of a parameter, a group or a role.
_QUANTITIES: dict[str, Callable[[ParamStats], float | None]] = {
    "grad_norm": lambda s: s.grad_norm,
    "grad_max": lambda s: s.grad_max,
    "update_norm": lambda s: s.update_norm,
    "param_norm": lambda s: s.param_norm,
    "update_ratio": _update_ratio,
    "lost_updates": lambda s: None if s.lost_updates is None else float(s.lost_updates),
}
