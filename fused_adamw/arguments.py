"""The arguments that torch's AdamW does not have: which values they take, and how they are shown."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from .averages import EMA
from .dtensors import is_flattened
from .spikes import SpikeGuard
from .state.precision import Precision, StateDtype
from .step.norm import NormGroup
from .tables import as_number
from .variants import VARIANT, DecayMode, Variant, Variants

# They are attributes of the optimizer, not group keys: those would end up in checkpoints, and torch's
# checkpoints, which lack them, would not load. Each with its default.
OWN: dict[str, Any] = {
    "max_grad_norm": None,
    "skip_nonfinite": False,
    "norm_process_group": None,
    "master_weights": None,
    "stochastic_rounding": None,
    "state_dtype": None,
    "state_roles": None,
    "seed": 0,
    "stats": False,
    "guard": None,
    "ema": None,
    "backend": "auto",
}
_STATE_DTYPES = (torch.float32, torch.bfloat16, "8bit")
_ROLES_AS_CALLED = {"head": "output"}  # what most people call it


def number_of(value: Any) -> float | None:
    """The value as a float; None if it is no number."""
    try:
        return as_number(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def hint_for_string(value: Any) -> str:
    """How to go on from a string that should be a number; "" for anything else."""
    if not isinstance(value, str):
        return ""
    return f": pass float({str(value)!r}). YAML reads 1e-3 as a string, 1.0e-3 as a number."


def checked_max_grad_norm(value: Any) -> float | None:
    """The norm to clip to as a float, or None.

    Raises:
        TypeError: It is not a number.
        ValueError: It is not positive.
    """
    if value is None:
        return None
    if isinstance(value, bool) or (number := number_of(value)) is None:
        raise TypeError(f"max_grad_norm must be None or a number, got {value!r}")
    if number == 0.0:
        raise ValueError(
            "max_grad_norm must be None or a number > 0, got 0, which would scale every gradient to zero: "
            "pass None to switch clipping off"
        )
    if not number > 0.0:
        raise ValueError(f"max_grad_norm must be None or a number > 0, got {number}")
    return number


def checked_flag(name: str, value: Any) -> bool:
    """The value of an argument as a bool.

    Raises:
        ValueError: It is neither True nor False.
    """
    if value not in (False, True):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    return bool(value)


def checked_precision(
    master_weights: Any, stochastic_rounding: Any, state_dtype: Any, state_roles: Any, seed: Any
) -> Precision:
    """What was asked for of formats, as one value.

    Raises:
        ValueError: There is no such format, or it cannot be had together with another.
        TypeError: `state_roles` is no mapping with strings for keys, or `seed` is no integer.
    """
    if master_weights not in (None, "split"):
        raise ValueError(f"master_weights must be None or 'split', got {master_weights!r}")
    if not (stochastic_rounding is None or isinstance(stochastic_rounding, bool)):
        raise ValueError(f"stochastic_rounding must be None, True or False, got {stochastic_rounding!r}")
    if state_dtype is not None and state_dtype not in _STATE_DTYPES:
        raise ValueError(
            f"state_dtype must be None, torch.float32, torch.bfloat16 or '8bit', got {state_dtype!r}"
        )
    roles = _checked_state_roles(state_roles)
    precision = Precision(master_weights, stochastic_rounding, state_dtype, roles, _checked_seed(seed))
    if precision.has_codes and stochastic_rounding is False:
        raise ValueError(
            "stochastic_rounding=False does not go with '8bit': moments that are rounded to the nearest of "
            "256 codes stall. Leave it at None."
        )
    return precision


def _checked_state_roles(value: Any) -> dict[str, StateDtype]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError(
            f"state_roles must be None or map roles, or globs over names, to formats, got {value!r}"
        )
    for key, asked in value.items():
        if asked not in _STATE_DTYPES:
            raise ValueError(
                f"state_roles[{str(key)!r}] must be torch.float32, torch.bfloat16 or '8bit', got {asked!r}"
            )
    return {_ROLES_AS_CALLED.get(str(key), str(key)): asked for key, asked in value.items()}


def _checked_seed(value: Any) -> int:
    try:
        seed = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        seed = None
    if seed is None:
        raise TypeError(f"seed must be an integer, got {value!r}")
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be at least 0 and below 2**64, got {seed}")
    return seed


def check_numbers(lr: Any, betas: Any, eps: Any, weight_decay: Any) -> None:
    """Refuse what torch would compare with 0, and fail on without saying what it is.

    Raises:
        TypeError: A hyper-parameter is not a number.
    """
    named = {"lr": lr, "eps": eps, "weight_decay": weight_decay}
    try:
        named |= {"betas[0]": betas[0], "betas[1]": betas[1]}
    except (TypeError, IndexError):
        raise TypeError(f"betas must be two numbers, got {betas!r}") from None
    for name, value in named.items():
        if isinstance(value, str):
            raise TypeError(f"{name} must be a number, got the string {value!r}{hint_for_string(value)}")
        if not isinstance(value, torch.Tensor) and number_of(value) is None:
            raise TypeError(f"{name} must be a number, got {value!r}")


def _set_options_of(variant: Variant, default: Variant) -> dict[str, Any]:
    """What differs from the default."""
    return {name: value for name, value in variant._asdict().items() if value != getattr(default, name)}


class OwnArguments(torch.optim.AdamW):
    """torch's AdamW with the arguments that it does not have, as properties; `step` gives them meaning."""

    _backend: str
    _max_grad_norm: float | None
    _norm_group: NormGroup | None
    _skip_nonfinite: bool
    _precision: Precision
    _variants: Variants
    _stats: bool
    _guard: SpikeGuard | None
    _ema: EMA | None
    _status: Tensor | None  # float64: struct Status of the last step, and the history of spikes
    _has_norm: bool

    @property
    def max_grad_norm(self) -> float | None:
        """The global norm that gradients are clipped to; None: no clipping."""
        return self._max_grad_norm

    @max_grad_norm.setter
    def max_grad_norm(self, value: float | None) -> None:
        self._max_grad_norm = checked_max_grad_norm(value)
        self._show_options()

    @property
    def norm_process_group(self) -> dist.ProcessGroup | Callable[[Tensor], Tensor] | None:
        """The processes that hold the other parameters, or a callable that sums over them.

        A deep copy shares the group. Pickling an optimizer that has a process group raises TypeError.
        """
        return None if self._norm_group is None else self._norm_group.group

    @norm_process_group.setter
    def norm_process_group(self, value: dist.ProcessGroup | Callable[[Tensor], Tensor] | None) -> None:
        self._norm_group = None if value is None else NormGroup(value)

    @property
    def backend(self) -> str:
        """The backend that was asked for."""
        return self._backend

    @property
    def master_weights(self) -> Literal["split"] | None:
        """How masters of bfloat16 parameters are kept; None: they have none."""
        return self._precision.master_weights

    @property
    def stochastic_rounding(self) -> bool | None:
        """What is rounded stochastically, as it was asked for."""
        return self._precision.stochastic_rounding

    @property
    def state_dtype(self) -> StateDtype | None:
        """How moments are kept; None: in the dtype of each parameter."""
        return self._precision.state_dtype

    @property
    def state_roles(self) -> dict[str, StateDtype] | None:
        """How the moments of single roles and parameters are kept; None: all as `state_dtype` says."""
        return dict(self._precision.state_roles) or None

    @property
    def seed(self) -> int:
        """What the noise of stochastic rounding depends on."""
        return self._precision.seed

    @property
    def stats(self) -> bool:
        """Whether steps find out what `param_stats` tells besides norms of gradients."""
        return self._stats

    @stats.setter
    def stats(self, value: bool) -> None:
        self._stats = checked_flag("stats", value)
        self._show_options()

    @property
    def guard(self) -> SpikeGuard | None:
        """What is done about spikes of the gradient norm; None: nothing."""
        return self._guard

    @property
    def ema(self) -> EMA | None:
        """What averages of the weights are kept; None: none."""
        return self._ema

    @property
    def weight_decay_mode(self) -> DecayMode:
        """How decay follows lr, unless a group says otherwise."""
        return self._variants.default.weight_decay_mode

    @property
    def cautious_weight_decay(self) -> bool:
        """Whether decay acts only where the update shrinks a parameter, unless a group says otherwise."""
        return self._variants.default.cautious_weight_decay

    @property
    def nesterov(self) -> bool:
        """Whether the momentum looks one step ahead, unless a group says otherwise."""
        return self._variants.default.nesterov

    @property
    def lr_ref(self) -> float | None:
        """The peak of lr that decay is relative to; None: what the group says."""
        return self._variants.default.lr_ref

    @property
    def skip_nonfinite(self) -> bool:
        """Whether steps whose gradient norm is not finite are skipped."""
        return self._skip_nonfinite

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Whether a GradScaler leaves unscaling and the decision to skip to step().

        It does so through `grad_scale` and `found_inf`, if `fused`, `max_grad_norm` or `skip_nonfinite` is
        set; if none is, the scaler unscales the gradients itself, as for torch's AdamW by default. Not under
        FSDP1, whose processes learn of an overflow in one of them only if ShardedGradScaler does the
        unscaling; else their loss scales would diverge.
        """
        asked = bool(self.defaults["fused"]) or self._needs_norm()
        return asked and not any(is_flattened(p) for group in self.param_groups for p in group["params"])

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Ignore the value: torch sets True where `fused` is set."""

    def _set_options(self) -> dict[str, Any]:
        """What was set of the arguments that change results."""
        values = {name: getattr(self, name) for name in OWN if name != "backend"}
        options = {
            name: value for name, value in values.items() if value is not OWN[name] and value != OWN[name]
        }
        return options | _set_options_of(self._variants.default, Variant())

    def _show_options(self) -> None:
        """Show the own options that are set in `defaults`, where loggers look; groups do not get them.

        Not the process group: `defaults` are copied and pickled.
        """
        options = self._set_options()
        options.pop("norm_process_group", None)
        for name in (*OWN, *VARIANT):
            self.defaults.pop(name, None)
        self.defaults.update(options)

    def __repr__(self) -> str:
        head, rest = super().__repr__().split("\n", 1)
        lines = [f"{name}: {value}" for name, value in self._set_options().items()]
        for index, group in enumerate(self.param_groups):
            if (variant := self._variants.of(group)) != self._variants.default:
                lines.append(f"of group {index}: {_set_options_of(variant, self._variants.default)}")
        return "\n".join([head, *lines, rest])

    def _needs_norm(self) -> bool:
        return self._max_grad_norm is not None or self._skip_nonfinite or self._guard is not None

    def _check_own(self, group: dict[str, Any], index: int) -> None:
        """Refuse other values of `OWN` in a group; ZeroRedundancyOptimizer copies ours into every one."""
        for name in OWN:
            value, ours = group.get(name), getattr(self, name)
            if value is not None and value is not ours and value != ours:
                raise ValueError(
                    f"{name} in parameter group {index} is {value!r}: it is an argument of the optimizer, "
                    f"which has {ours!r}, and holds for all groups"
                )
        if "norm_process_group" in group:
            group["norm_process_group"] = None  # it would keep the state_dict from being saved

    def _check_amsgrad(self, group: dict[str, Any], index: int) -> None:
        if group["amsgrad"] and self._precision.has_codes:
            raise ValueError(
                f"amsgrad in parameter group {index} does not go with 8-bit moments: the maximum of second "
                "moments that are rounded by chance only grows. Keep them in torch.bfloat16 or torch.float32."
            )
