"""FusedHygieneAdamW: its arguments and its groups. How it steps is in stepping.py."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch.distributed as dist
from torch import Tensor, nn

from .announce import announce
from .arguments import OWN, check_numbers, checked_flag, checked_max_grad_norm, checked_precision
from .averages import EMA, checked_ema
from .backends import check_backend, kernels_for
from .groups import Options, Overrides, Role, decide, decided_groups, is_model, summarize_param_groups
from .names import ParamNames, show_names_to_dcp
from .spikes import SpikeGuard, checked_guard
from .state.checks import check_hypers
from .state.precision import StateDtype
from .state.purposes import Purposes, check_state_roles, summarize_state, warn_of_nearest
from .step.double_clip import DoubleClipDetector
from .step.plan import Plan
from .stepping import Stepping
from .variants import VARIANT, DecayMode, Variant, Variants

# Attributes that a copy of the optimizer keeps. It builds a plan of its own, as a plan is full of addresses.
_COPIED = (
    "_backend",
    "_max_grad_norm",
    "_norm_group",
    "_skip_nonfinite",
    "_precision",
    "_stats",
    "_guard",
    "_ema",
    "_purposes",
    "_status",
    "_has_norm",
    "_names_are_ours",
)


class FusedHygieneAdamW(Stepping):
    """AdamW that decays the right parameters and clips inside the update.

    With `FusedHygieneAdamW(model, lr=3e-4, weight_decay=0.1, max_grad_norm=1.0)`, `step()` is equivalent to

        optimizer = torch.optim.AdamW(build_param_groups(model, 0.1), lr=3e-4)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    except that gradients are read, never rewritten, and that one launch serves all tensors and groups of a
    device and dtype. The rule is that of torch (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101), for a
    gradient g at step t:

        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g^2
        p = p * (1 - lr * weight_decay) - lr * m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

    The state of a parameter is that of torch, too: `step`, a 0-dim float32 tensor, and `exp_avg`,
    `exp_avg_sq` and, with `amsgrad`, `max_exp_avg_sq` of the parameter's shape and layout, in its dtype
    unless `state_dtype` says otherwise. State, `state_dict` and `param_groups` have torch's keys, and no
    others but those of masters and 8-bit moments that were asked for: checkpoints of `torch.optim.AdamW` load
    here, and ours there. Of DTensors (FSDP2, tensor parallelism) the local shards are stepped, and the norm
    is that of the whole model.

    Args:
        params: A module, whose groups are built by `build_param_groups(params, weight_decay)`: several, so a
            learning rate set by hand goes into all of `param_groups`, not into the first. Or whatever
            `torch.optim.AdamW` takes (tensors, an `nn.ParameterList`, named tensors, group dicts), to which
            plain AdamW is applied.
        lr: Learning rate; a float, or a one-element tensor, which schedulers fill in place.
        betas: Decay rates of the running averages of the gradient and of its square.
        eps: Added to the denominator.
        weight_decay: Decoupled decay of the groups that decay.
        amsgrad: Use the running maximum of `exp_avg_sq` (https://arxiv.org/abs/1904.09237).
        maximize: Maximize the objective instead of minimizing it.
        foreach: Accepted for compatibility; changes nothing.
        capturable: The step may be captured in a CUDA graph, after a step without capture that has the same
            options. A replay follows a tensor `lr`, not a float, and steps the tensors that were captured:
            capture again after `load_state_dict`.
        differentiable: Refused: the step is not differentiable.
        fused: Accepted for compatibility; changes nothing.
        max_grad_norm: Clip to this global norm, above 0, as `torch.nn.utils.clip_grad_norm_` would over all
            groups. None: no clipping, and no pass over the gradients for a norm. `math.inf`: measure, never
            clip.
        skip_nonfinite: Skip steps whose gradient norm is infinite or NaN: they change nothing, not even step
            counts, and `skipped_steps` counts them. This is decided on the device, by a norm that is measured
            even without `max_grad_norm`. By default such gradients have the same effect as in torch.
        norm_process_group: The processes that hold the other parameters, over which norm and overflow are
            summed once per step: a `torch.distributed.ProcessGroup`, or a callable that is given
            `[sum of squares, found_inf]`, a float64 tensor, and returns the sum of these tensors over all
            such processes. Needed for FSDP1, `ZeroRedundancyOptimizer` and pipeline stages, but not for
            DTensors (FSDP2, tensor parallel) and DDP: see docs/distributed.md.
        master_weights: "split": bfloat16 parameters keep the low half of a float32 in the state, and are
            updated as float32 parameters would be, bit for bit. Others must be float32 or wider.
        stochastic_rounding: True: bfloat16 parameters without a master and second moments in bfloat16 are
            rounded up or down by chance, right on average; False: to nearest. None: second moments are where
            `state_dtype` or `state_roles` asks for bfloat16 or 8 bits, nothing else.
        state_dtype: How moments are kept: `torch.float32`, `torch.bfloat16`, or "8bit": 8-bit codes for the
            matrices and convolutions that are large enough, bfloat16 for the rest. None: in the dtype of
            each parameter, as in torch. Loading a `state_dict` keeps it.
        state_roles: The same for single roles, and for parameters by a glob over names, which wins:
            `{"embedding": "8bit", "*.head.weight": torch.float32}`.
        seed: Of the noise of stochastic rounding, which is the same on all replicas and after resuming.
        stats: Find out in each step what `param_stats` tells of updates and parameters; an attribute, too.
        guard: Skip, or clip, steps whose gradient norm is far above those before: `SpikeGuard()`. Decided on
            the device.
        ema: Keep averages of the weights: `EMA(decay=0.9999)`, with which `swap_ema` evaluates.
        weight_decay_mode: What parameters lose of themselves in a step: "lr", as torch, lr * weight_decay;
            "schedule", weight_decay * lr / lr_ref; "corrected", weight_decay * lr^2 / lr_ref
            (AdamC, https://arxiv.org/abs/2506.02285); "constant", weight_decay where lr is not 0. This and
            the next three may differ by group: they are options of groups that are passed in, and of
            `overrides`, but never show in `param_groups`, and no checkpoint has them.
        cautious_weight_decay: Decay only where the update shrinks a parameter too
            (https://arxiv.org/abs/2510.12402).
        nesterov: Let the momentum look one step ahead, as `torch.optim.NAdam(decoupled_weight_decay=True)`
            does once its momentum has warmed up.
        lr_ref: The peak of lr that "schedule" and "corrected" refer to; None: the group's `max_lr` or
            `initial_lr`, which schedulers set, or else the lr that it came with.
        backend: "auto", "native" (C++ on CPU, CUDA on GPU), "triton" or "reference" (plain PyTorch).
        overrides: What of a model's groups to change by hand, as in `build_param_groups`.
        example_inputs: What to call a model with, so that its groups are built with evidence by use, as
            `build_param_groups` does. Not kept, and without effect unless `params` is a model.

    Raises:
        ValueError: A hyper-parameter is out of range, a parameter is in two groups or is not floating point,
            the model has no trainable parameter, the backend is unknown, or formats do not go together: a
            float16 parameter with `master_weights`, 8 bits with `amsgrad` or without stochastic rounding.
        RuntimeError: The backend cannot run on a parameter's device; `fused` and `foreach` are both set.
        TypeError: A hyper-parameter is not a number; `norm_process_group` is neither a group of this process
            nor callable.
    """

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
        skip_nonfinite: bool = False,
        norm_process_group: dist.ProcessGroup | Callable[[Tensor], Tensor] | None = None,
        master_weights: Literal["split"] | None = None,
        stochastic_rounding: bool | None = None,
        state_dtype: StateDtype | None = None,
        state_roles: Mapping[Role | str, StateDtype] | None = None,
        seed: int = 0,
        stats: bool = False,
        guard: SpikeGuard | None = None,
        ema: EMA | None = None,
        weight_decay_mode: DecayMode = "lr",
        cautious_weight_decay: bool = False,
        nesterov: bool = False,
        lr_ref: float | None = None,
        backend: str = "auto",
        overrides: Overrides | None = None,
        example_inputs: Any = None,
    ) -> None:
        check_backend(backend)
        check_numbers(lr, betas, eps, weight_decay)
        self._backend = backend
        self._precision = checked_precision(
            master_weights, stochastic_rounding, state_dtype, state_roles, seed
        )
        variant = Variant(weight_decay_mode, cautious_weight_decay, nesterov, lr_ref)
        self._variants = Variants(variant.checked(""))
        self._skip_nonfinite = checked_flag("skip_nonfinite", skip_nonfinite)
        self._stats = checked_flag("stats", stats)
        self._guard, self._ema = checked_guard(guard), checked_ema(ema)
        self._max_grad_norm = checked_max_grad_norm(max_grad_norm)
        self._plan: Plan | None = None
        self._captured_plans: list[Plan] = []  # replaced since, but graphs still read their tables
        self._status: Tensor | None = None  # float64: struct Status of the last step, history of spikes
        self._has_norm = False
        self._double_clip = DoubleClipDetector()
        self.norm_process_group = norm_process_group

        groups: Any = params
        from_model = is_model(params)
        self._names_are_ours = from_model
        self._purposes = Purposes()
        if from_model:
            self._model = weakref.ref(params)
            group_options = Options(weight_decay, overrides=overrides, lr=lr, example_inputs=example_inputs)
            decisions = decide(params, group_options)
            groups = decided_groups(decisions, group_options)
            self._purposes.learn(decisions)
            show_names_to_dcp()
        elif overrides is not None:
            raise TypeError(
                "overrides select parameters of a model: pass the model instead of its parameters"
            )
        self._param_names = ParamNames(self._model)
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
            differentiable=differentiable,
            fused=fused,
        )
        self._show_options()
        self._announce(params if from_model else None, _has_decay_of_its_own(groups))

    def _announce(self, model: nn.Module | None, is_decided: bool) -> None:
        """Log what was made of the parameters, after a last check of the selectors among the arguments."""
        purposes, params = self._all_purposes(), [p for group in self.param_groups for p in group["params"]]
        check_state_roles(self._precision, purposes, model is not None)
        if model is not None:
            announce(f"[AdamW Groups] {summarize_param_groups(self.param_groups, model)}")
        elif len(self.param_groups) == 1 and not is_decided:
            announce(
                f"[AdamW Groups] {len(params)} params in one group, "
                f"weight_decay={self.param_groups[0]['weight_decay']} for all: no hygiene applied. Pass the "
                "model instead of its parameters to exempt biases, norms and embeddings from decay."
            )
        if self._precision.has_codes:
            line = summarize_state(self._precision, params, purposes, model is not None)
            announce(f"[AdamW State] {line}")
        warn_of_nearest(self._precision, self.param_groups, purposes, stacklevel=3)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as `torch.optim.Optimizer.add_param_group`.

        An optimizer that was built from a model names the parameters of a group that comes without names.

        Args:
            param_group: `params`, and the options that differ from the optimizer's; the others are completed,
                as in torch. It becomes one of `param_groups`, or nothing changes.

        Raises:
            ValueError: A hyper-parameter of the group is out of range, a parameter is in another group, or is
                neither floating point nor complex, or cannot be kept as was asked; or the group has its own
                `max_grad_norm` or another argument that belongs to the optimizer, or `amsgrad` with 8 bits.
            TypeError: A hyper-parameter of the group is not a number.
            RuntimeError: The backend cannot run on a parameter's device; the group is `differentiable`.
        """
        index = len(self.param_groups)
        given = set(param_group) if isinstance(param_group, dict) else set()
        of_rule = {name: param_group[name] for name in VARIANT if name in given}
        if of_rule:
            param_group = {**param_group}  # may build other optimizers, too
        if self._names_are_ours and isinstance(param_group, dict):
            self._param_names.correct(self.param_groups)
            self._param_names.complete([*self.param_groups, param_group])
        super().add_param_group(param_group)
        group = self.param_groups[index]
        self._param_names.learn(group)
        for name in OWN:
            if name not in given:
                group.pop(name, None)  # torch completes a group from `defaults`
        for name in VARIANT:
            group.pop(name, None)
        names = group.get("param_names") or [f"number {i}" for i in range(len(group["params"]))]
        names = [f"{name} of group {index}" for name in names]
        try:
            self._check_params(group["params"], names)
            check_hypers(group, index)
            self._check_own(group, index)
            self._variants.take(group, of_rule, index)
            self._check_amsgrad(group, index)
            self._learn_purposes(group)
        except Exception:
            del self.param_groups[index:]
            raise

    def _check_params(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        for name, p in zip(names, params, strict=True):
            if not (p.is_floating_point() or p.is_complex()):
                raise ValueError(
                    f"parameter {name} has dtype {p.dtype}: expected a floating point or complex tensor. "
                    "Leave it out of the optimizer: requires_grad=False, or a buffer."
                )
            if (refusal := self._precision.refusal(p)) is not None:
                raise ValueError(f"parameter {name} {refusal}")
            kernels_for(self._backend, p.device)

    def __getstate__(self) -> dict[str, Any]:
        self._param_names.correct(self.param_groups)
        own = {name: self.__dict__[name] for name in _COPIED}
        return {**super().__getstate__(), **own, "_variants": self._variants.by_position(self.param_groups)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._plan = None
        self._captured_plans = []
        self._double_clip = DoubleClipDetector()
        self.__dict__.setdefault("_param_names", ParamNames())
        is_copy = "_variants" in state  # else a state_dict is being loaded, group by group
        variants = state["_variants"] if is_copy else self._variants.by_position(self.param_groups)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._variants = Variants.from_positions(variants, self.param_groups)
        for group in self.param_groups:
            self._param_names.learn(group)


def _has_decay_of_its_own(groups: Any) -> bool:
    """Whether somebody has decided how much the first of these groups decays."""
    return isinstance(groups, list) and isinstance(groups[0], dict) and "weight_decay" in groups[0]


class AdamW(FusedHygieneAdamW):
    """`FusedHygieneAdamW` under the name of torch's class, for what goes by an optimizer's class name.

    Composer keys the optimizer's state in a checkpoint by it, Lightning its log of the learning rate.
    """
