"""What the optimizer refuses, before anything is changed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _device_dtype_check_for_fused

from ..arguments import hint_for_string, number_of
from ..dtensors import is_partial, local_tensors, misplacement
from ..fields import AVERAGE, CODED, CODES, MOMENTS, RESIDUAL, SCALES, STATE_KEYS, keys_of
from ..formats import FORMATS
from ..layout import lacks_memory

# The format of what a state has under the two keys of codes.
_CODES = {CODED[name]: format for name, format in CODES.items()}


def check_not_differentiable(groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse `differentiable` groups rather than ignore what they ask for."""
    for group in groups:
        if group["differentiable"]:
            raise RuntimeError(
                "`fused` does not support `differentiable`: the step of FusedHygieneAdamW has no derivative. "
                "Use torch.optim.AdamW to differentiate through the optimizer."
            )


def check_hypers(group: dict[str, Any], index: int) -> None:
    """Check a group's hyper-parameters: torch checks the defaults only."""
    check_not_differentiable([group])
    try:
        beta1, beta2 = group["betas"]
    except (TypeError, ValueError):
        raise TypeError(
            f"invalid betas in parameter group {index}: {group['betas']!r}, expected two numbers"
        ) from None
    for name, value, below in (
        ("lr", group["lr"], math.inf),
        ("betas[0]", beta1, 1.0),
        ("betas[1]", beta2, 1.0),
        ("eps", group["eps"], math.inf),
        ("weight_decay", group["weight_decay"], math.inf),
    ):
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                continue  # reading it would synchronise
            value = value.detach()
        number = number_of(value)
        if number is None:
            raise TypeError(
                f"invalid {name} in parameter group {index}: {value!r}, expected a number"
                f"{hint_for_string(value)}"
            )
        if not 0.0 <= number < below:
            limit = f" and below {below}" if below != math.inf else ""
            raise ValueError(
                f"invalid {name} in parameter group {index}: {value}, expected a finite number >= 0{limit}"
            )


def check_no_transform() -> None:
    """Refuse `torch.func`: tensors inside its transforms stand for others, and have no memory to step."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "FusedHygieneAdamW.step() cannot run inside a torch.func transform (grad, vmap, ...): it has no "
            "derivative and no batching rule. Use the functional torch.optim.adamw.adamw there."
        )


def check_fused(p: Tensor, name: str) -> None:
    """Refuse what `fused=True` does not support in torch either, with torch's words."""
    try:
        _device_dtype_check_for_fused(p)
    except RuntimeError as error:
        raise RuntimeError(f"parameter {name}: {error}") from None


def check_state(state: Mapping[str, Any], p: Tensor, name: str, *, saved: bool = False) -> None:
    """Check that a state is AdamW's and complete, or empty: what is missing would start from zero.

    `max_exp_avg_sq` may be missing: the maximum of amsgrad then starts with the next step.

    Args:
        state: The parameter's state.
        p: The parameter.
        name: Its name in messages.
        saved: The state may be on another device.
    """
    if not isinstance(state, Mapping):
        raise RuntimeError(f"the state of parameter {name} is {state!r}, expected a dict")
    missing = [key for key in ("step", *MOMENTS[:2]) if key not in state and key not in keys_of(state)]
    missing += [str(keys.side) for keys in keys_of(state).values() if keys.side and keys.side not in state]
    if state and missing:
        raise RuntimeError(
            f"the state of parameter {name} has no {', '.join(missing)}: expected step, exp_avg and "
            f"exp_avg_sq, or nothing, found {', '.join(map(str, state))}. docs/migration.md tells how to "
            "convert checkpoints of other optimizers."
        )
    step = state.get("step", 0)
    if not _is_number(step):
        found = f"a tensor of shape {tuple(step.shape)}" if isinstance(step, Tensor) else repr(step)
        raise RuntimeError(f"step of parameter {name} is {found}, expected a number")
    if isinstance(step, Tensor) and (step.layout is not torch.strided or (step.is_meta and not p.is_meta)):
        raise RuntimeError(
            f"step of parameter {name} is a {step.layout} tensor on {step.device}: expected a number"
        )
    if isinstance(step, Tensor) and not saved:
        check_writable(step, f"step of parameter {name}")
    for key in STATE_KEYS[1:]:
        if key in state:
            _check_kept(key, state[key], p, name, anywhere=saved)
            if not saved:
                check_writable(state[key], f"{key} of parameter {name}")


def _check_kept(key: str, t: Any, p: Tensor, name: str, *, anywhere: bool) -> None:
    """Check what a state has under a key: its dtype, its shape and where it is."""
    if key in MOMENTS or key == AVERAGE:
        check_like(key, t, p, name, anywhere=anywhere)
        return
    format = FORMATS["bfloat16_split"] if key == RESIDUAL else next(f for k, f in _CODES.items() if key in k)
    is_side = key == RESIDUAL or key in SCALES
    dtype, shape = format.dtype, p.shape
    if is_side:
        assert format.side_dtype is not None
        dtype, shape = format.side_dtype, torch.Size(format.side_shape(p.shape) if p.dim() else ())
    if key == RESIDUAL and p.dtype is not torch.bfloat16:
        raise RuntimeError(
            f"parameter {name} is {p.dtype} and has a {key}, which is the low half of a float32 whose upper "
            "half is a bfloat16 parameter. Was the model converted after the optimizer had state?"
        )
    found = t.dtype if isinstance(t, Tensor) else f"a {type(t).__name__}"
    if found != dtype and not (key == RESIDUAL and anywhere and found == torch.int32):  # saved of a DTensor
        raise RuntimeError(
            f"{key} of parameter {name} is {found}, expected {dtype}. torch.optim.Optimizer.load_state_dict "
            "casts state to the parameter's dtype, by which codes, scales and residuals are lost: load what "
            "was saved before."
        )
    if t.shape != shape or (t.device != p.device and not anywhere):
        raise RuntimeError(
            f"{key} of parameter {name} is {tuple(t.shape)} on {t.device}, expected {tuple(shape)} on "
            f"{p.device}. Was the model moved or resized after the optimizer had state?"
        )


def _is_number(value: Any) -> bool:
    """Whether something is one real number, of whatever library."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and value.dtype is not torch.bool
    return number_of(value) is not None


def check_like(what: str, t: Any, p: Tensor, name: str, *, anywhere: bool = False) -> None:
    """Check that a moment or a gradient is a floating point tensor of the parameter's shape, beside it."""
    kind = "complex" if p.is_complex() else "floating point"
    if not isinstance(t, Tensor) or not (t.is_complex() if p.is_complex() else t.is_floating_point()):
        found = f"a tensor of {t.dtype}" if isinstance(t, Tensor) else f"a {type(t).__name__}"
        raise RuntimeError(f"{what} of parameter {name} is {found}, expected a {kind} tensor")
    if t.shape != p.shape or (t.device != p.device and not anywhere):
        raise RuntimeError(
            f"{what} of parameter {name} is {tuple(t.shape)} on {t.device}, expected {tuple(p.shape)} on "
            f"{p.device} like the parameter. Was the model moved or resized after the optimizer had state?"
        )


def check_writable(t: Tensor, what: str) -> None:
    """Refuse what torch would refuse to write, halfway through a step."""
    reason = None
    if any(stride == 0 and size > 1 for stride, size in zip(t.stride(), t.shape, strict=True)):
        reason = "is an expanded view"
    elif t.is_conj():
        reason = "is a conjugate view"
    elif t._is_zerotensor():
        reason = "is a tensor of zeros without memory"
    elif t.is_inference() and not torch.is_inference_mode_enabled():
        reason = "was made in inference mode"
    if reason is not None:
        raise RuntimeError(f"{what} cannot be changed in place: it {reason}. Clone it first.")


def check_step(state: Mapping[str, Any], p: Tensor, grad: Tensor | None, name: str) -> None:
    """Refuse a parameter that cannot be stepped, before anything is changed.

    Args:
        state: The parameter's state.
        p: The parameter.
        grad: Its gradient.
        name: Its name in messages.
    """
    if not isinstance(state, Mapping) and grad is None:
        return  # not ours
    if is_partial(p):
        raise RuntimeError(
            f"parameter {name} is a Partial DTensor, of which every process has an addend: "
            "expected Shard and Replicate placements"
        )
    if grad is not None and p.layout is not torch.strided:
        raise RuntimeError(
            f"parameter {name} is itself sparse, of layout {p.layout}: expected a dense parameter. Use "
            "torch.optim.SparseAdam, or store its values as a dense parameter."
        )
    if grad is not None and grad.layout is not torch.strided:
        raise RuntimeError(
            "FusedHygieneAdamW does not support sparse gradients, please consider SparseAdam instead: "
            f"parameter {name} has a gradient of layout {grad.layout}"
        )
    if grad is not None and (p.layout is not torch.strided or p.is_nested or grad.is_nested):
        found = f"layout {p.layout}" if p.layout is not torch.strided else "nested tensors"
        raise RuntimeError(f"parameter {name} has {found}: expected a strided tensor, not a nested one")
    if grad is not None:
        check_writable(p, f"parameter {name}")
        check_like("gradient", grad, p, name)
    if grad is not None or "step" in state:
        check_state(state, p, name)
    others = {key: state[key] for key in STATE_KEYS[1:] if key in state}
    if grad is not None:
        others["gradient"] = grad
    for what, t in others.items():
        if reason := misplacement(t, p, can_move=what == "gradient"):
            raise RuntimeError(f"{what} of parameter {name} {reason}")
    if grad is not None:
        mine = {f"{what} of parameter {name}": t for what, t in others.items()} | {f"parameter {name}": p}
        if isinstance(step := state.get("step"), Tensor):
            mine[f"step of parameter {name}"] = step
        for what, t in zip(mine, local_tensors(mine.values()), strict=True):
            if lacks_memory(t):
                raise RuntimeError(f"{what} has no memory: expected it to be back before step()")


def check_saved(state: Mapping[str, Any], p: Tensor, name: str) -> None:
    """Refuse a saved state that is not AdamW's, or is distributed differently from its parameter."""
    for key in STATE_KEYS[1:]:
        kept = state.get(key)
        if isinstance(kept, Tensor) and (reason := misplacement(kept, p, can_move=True)):
            raise ValueError(
                f"the saved {key} of parameter {name} {reason}. Load what others saved through "
                "torch.distributed.checkpoint.state_dict"
            )
    check_state(state, p, name, saved=True)
