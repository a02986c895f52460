"""FusedHygieneAdamW: arguments, state, step, state_dict. No arithmetic: that is in the backends."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .backends import kernels_for, reference
from .groups import build_param_groups, count_groups
from .plan import STATE_KEYS, Plan, StepInputs, scalar_dtype

logger = logging.getLogger("fused_adamw")

_STATE_DTYPES = (None, torch.float32, torch.bfloat16)
_OWN_ATTRIBUTES = ("_max_grad_norm", "_backend", "_state_dtype", "_status", "_has_norm", "_norm_dtype")


class FusedHygieneAdamW(torch.optim.AdamW):
    """AdamW that decays the right parameters and clips inside the update.

    `FusedHygieneAdamW(model, lr=3e-4, weight_decay=0.1, max_grad_norm=1.0)` followed by `step()` is equivalent to

        optimizer = torch.optim.AdamW(build_param_groups(model, 0.1), lr=3e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    except that gradients are read, never rewritten, and that one launch serves all tensors and groups of a device
    and dtype. State, `state_dict` and `param_groups` have torch's keys and no others: checkpoints of
    `torch.optim.AdamW` load here, and ours there.

    Args:
        params: A module: groups are built by `build_param_groups(params, weight_decay)`. Or whatever
            `torch.optim.AdamW` takes (tensors, named tensors, group dicts): exactly AdamW on those.
        lr: Learning rate; a float, or a one-element tensor, which schedulers fill in place.
        betas: Decay rates of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of the groups that decay.
        amsgrad: Use the running maximum of `exp_avg_sq` (https://arxiv.org/abs/1904.09237).
        maximize: Ascend.
        foreach: Accepted for compatibility; changes nothing.
        capturable: The step may be captured in a CUDA graph.
        differentiable: Refused: the step is not differentiable.
        fused: Accepted for compatibility; changes nothing.
        max_grad_norm: Clip to this global norm over all groups, as `torch.nn.utils.clip_grad_norm_` would. None:
            no clipping, and no pass over the gradients for a norm. `math.inf` measures without clipping.
        state_dtype: Dtype of the moments, `torch.float32` or `torch.bfloat16`; None: that of each parameter, as in
            torch. Kept through `state_dict` and `load_state_dict`.
        backend: "auto", "native" (C++ on CPU, CUDA on GPU), "triton" or "reference" (plain PyTorch).

    Raises:
        ValueError: A hyper-parameter is out of range, a parameter is listed twice or is not floating point, the
            model has no trainable parameter, or the backend is unknown.
        RuntimeError: The backend cannot run on a parameter's device; `fused` and `foreach` are both set.

    Attributes:
        max_grad_norm: May be changed between steps.
        backend: As given.
        state_dtype: As given.
    """

    # GradScaler then leaves unscaling and the decision to skip to step(), through grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: nn.Module | Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        max_grad_norm: float | None = None,
        state_dtype: torch.dtype | None = None,
        backend: str = "auto",
    ) -> None:
        if differentiable:
            raise ValueError(
                "FusedHygieneAdamW does not support differentiable=True: the fused step has no derivative. "
                "Use torch.optim.AdamW to differentiate through the optimizer."
            )
        if state_dtype not in _STATE_DTYPES:
            raise ValueError(f"state_dtype must be None, torch.float32 or torch.bfloat16, got {state_dtype!r}")
        self._backend = backend
        self._state_dtype = state_dtype
        self._plan: Plan | None = None
        self._status: Tensor | None = None  # float64: norm of the last step, steps skipped so far
        self._has_norm = False
        self._norm_dtype = torch.float32
        self.max_grad_norm = max_grad_norm
        kernels_for(backend, torch.device("cpu")) if backend in ("auto", "reference") else None

        groups = build_param_groups(params, weight_decay) if isinstance(params, nn.Module) else params
        super().__init__(
            groups,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            fused=fused,
        )
        if isinstance(params, nn.Module):
            logger.info("[AdamW Groups] %s", count_groups(self.param_groups))
        elif len(self.param_groups) == 1:
            logger.info(
                "[AdamW Groups] %d params in one group, weight_decay=%s for all: no hygiene applied. Pass the "
                "model instead of its parameters to exempt biases, norms and embeddings from decay.",
                len(self.param_groups[0]["params"]),
                weight_decay,
            )

    # Arguments of our own. They live on the optimizer: a group key of ours would end up in checkpoints, and
    # loading torch's would fail on it.

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to; None: no clipping."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        if value is not None:
            value = float(value)
            if not value >= 0.0:
                raise ValueError(f"max_grad_norm must be None or a number >= 0, got {value}")
        self._max_grad_norm = value

    @property
    def backend(self) -> str:
        """The backend asked for."""
        return self._backend

    @property
    def state_dtype(self) -> torch.dtype | None:
        """The dtype asked for the moments; None: that of each parameter."""
        return self._state_dtype

    @property
    def grad_norm(self) -> Tensor | None:
        """Global gradient norm of the last step, before clipping and without any loss scale.

        A new 0-dim tensor on the parameters' device, float32 (float64 where a parameter is float64); None before
        the first step and without `max_grad_norm`. Nothing waits for the device until its value is read.
        """
        if not self._has_norm:
            return None
        if self._status is None:
            return torch.zeros((), dtype=self._norm_dtype)
        return self._status[0].to(self._norm_dtype, copy=True)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        Raises:
            ValueError: A hyper-parameter of the group is out of range, a parameter is listed twice, or is neither
                floating point nor complex.
            RuntimeError: The backend cannot run on a parameter's device.
        """
        before = len(self.param_groups)
        params = param_group.get("params") if isinstance(param_group, dict) else None
        if isinstance(params, Iterator):
            params = param_group["params"] = list(params)
        if isinstance(params, (list, tuple)):
            named = [p if isinstance(p, tuple) else (None, p) for p in params]
            self._check_params([(name or f"number {i}", p) for i, (name, p) in enumerate(named)], before)
        super().add_param_group(param_group)
        try:
            _check_hypers(self.param_groups[-1], before)
        except ValueError:
            del self.param_groups[before:]
            raise

    def _check_params(self, named: list[tuple[str, Any]], group: int) -> None:
        seen: dict[Tensor, str] = {}
        for name, p in named:
            if not isinstance(p, Tensor):
                return  # torch's own message
            if p in seen:
                raise ValueError(
                    f"parameter {name} of group {group} is listed twice (also as {seen[p]}): it would be stepped twice"
                )
            seen[p] = name
            if not (p.is_floating_point() or p.is_complex()):
                raise ValueError(
                    f"parameter {name} of group {group} has dtype {p.dtype}: expected a floating point or complex "
                    "tensor. Leave it out of the optimizer (requires_grad=False, or a buffer)."
                )
            kernels_for(self._backend, p.device)

    @torch._disable_dynamo  # kernels take addresses, which a traced step does not have
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient: mutates them, their moments and step counts.

        Gradients are not changed. Nothing is changed if an error is raised.

        Args:
            closure: Reevaluates the model and returns the loss; run first, with gradients enabled.

        Returns:
            What the closure returned, else None.

        Raises:
            RuntimeError: A gradient is sparse, or a gradient or a moment is on another device than its parameter
                or has another shape.
        """
        self._accelerator_graph_capture_health_check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        params = [p for group in self.param_groups for p in group["params"]]
        grads = [p.grad for p in params]
        plan = self._plan
        if plan is None or not plan.is_current(self.param_groups, params, grads, self.state):
            plan = self._plan = self._new_plan(params, grads)
        plan.prepare(self.param_groups, grads)

        clips = self._max_grad_norm is not None
        sums = plan.sum_of_squares(grads) if clips else {}
        for i, (bucket, _) in enumerate(plan.buckets):
            bucket.update(grads, self._step_inputs(bucket.device, sums.get(bucket.device), first=i == 0))
        self._has_norm = clips
        stepped = [p for p, g in zip(params, grads, strict=True) if g is not None]
        torch.autograd.graph.increment_version(stepped)
        return loss
