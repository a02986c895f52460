"""The optimizer's state of one parameter: torch's keys, and those of the formats that were asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..dtensors import is_dtensor, local_tensors, wrapped
from ..fields import AVERAGE, CODED, MAXIMUM, RESIDUAL, State, keys_of, moments_of, named
from ..formats import FORMATS, Field, Format, RootCode, memory_order, plain_format
from .precision import Kept

_CODE_KEYS = {key for keys in CODED.values() for key in keys if key is not None}


def new_field(p: Tensor, format: Format) -> Field:
    """Zeros laid out and placed as the parameter is; the one place where moments are made.

    Tensor subclasses make them as their `zeros_like` does, as in torch; those that only override functions
    (`__torch_function__`) get plain tensors, which any program can load.
    """
    with torch._C.DisableTorchFunctionSubclass():
        values = torch.zeros_like(
            p, dtype=format.dtype, memory_format=torch.preserve_format, requires_grad=False
        )
        return Field(format, values, new_side(values, format))


def new_side(values: Tensor, format: Format) -> Tensor | None:
    """What a format keeps beside these values if they are zero, or if nothing is known of it."""
    if format.side_dtype is None:
        return None
    (local,) = local_tensors([values.detach()])
    side, shape = format.new_side(local), values.shape
    assert side is not None
    of_side = torch.Size(format.side_shape(shape))
    return wrapped(side, values, None if of_side == shape else of_side)


def new_step(p: Tensor, value: Any = None) -> Tensor:
    """A step count in the form of torch's fused optimizers: 0-dim float32 beside `p`."""
    step = torch.zeros((), dtype=torch.float32, device=p.device)
    if value is None:
        return step
    (value,) = local_tensors([value])
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(value, Tensor):
            step.copy_(value.detach().reshape(()))
        else:
            step.fill_(float(value))
    return step


def missing_state(
    state: Mapping[str, Any], p: Tensor, amsgrad: bool, kept: Kept, average: Format | None = None
) -> dict[str, Tensor]:
    """What a parameter's state lacks before the next step.

    A step count is replaced only where it is no tensor on the parameter's device: others may count with it.

    Args:
        state: The parameter's state; it is not changed.
        p: The parameter.
        amsgrad: Whether there is a `max_exp_avg_sq`.
        kept: The formats of what is new.
        average: The format of a new average, which is what is kept of the parameter; None: there is none.
    """
    missing = {}
    step = state.get("step")
    if not isinstance(step, Tensor) or step.device != p.device:
        missing["step"] = new_step(p, step)
    present = keys_of(state)
    for name, format in _formats(kept):
        if name not in present and (amsgrad or name != MAXIMUM):
            missing |= named(name, new_field(p, format))
    if RESIDUAL not in state and (residual := new_side(p, kept.param)) is not None:
        missing[RESIDUAL] = residual
    if average is not None and AVERAGE not in state:
        field = new_field(p, average)
        with torch._C.DisableTorchFunctionSubclass():
            _copy(_kept_of(p, {**missing, **state}), field, "")
        missing[AVERAGE] = field.values
    return missing


def _kept_of(p: Tensor, state: Mapping[str, Any]) -> Field:
    """A parameter as a field: its master, if it has one."""
    residual = state.get(RESIDUAL)
    format = plain_format(p.dtype) if residual is None else FORMATS["bfloat16_split"]
    return Field(format, p.detach(), residual)


def copied_state(
    saved: Mapping[str, Any], p: Tensor, name: str, kept: Kept, average: Format | None = None
) -> dict[str, Tensor]:
    """Copies of a saved step count, moments, residual and average, made as for the first step.

    Moments are rounded to the nearest that their format can keep; what was in that format stays as it was.

    Args:
        saved: The saved state.
        p: The parameter.
        name: Its name in messages.
        kept: The formats of the copies.
        average: The format of the average; None: it is left out.

    Raises:
        RuntimeError: Moments were in 8 bits, and rounded since.
    """
    state = {}
    if "step" in saved:
        state["step"] = new_step(p, saved["step"])
    present = moments_of({key: value for key, value in saved.items() if isinstance(value, Tensor)})
    for moment, format in _formats(kept):
        if moment in present:
            field = new_field(p, format)
            with torch._C.DisableTorchFunctionSubclass():
                _copy(present[moment], field, f"the saved {moment} of parameter {name}")
            state |= named(moment, field)
    residual = new_side(p, kept.param) if RESIDUAL in saved else None
    if residual is not None:
        state[RESIDUAL] = residual.copy_(saved[RESIDUAL])
    if average is not None and AVERAGE in saved:
        state[AVERAGE] = new_field(p, average).values.copy_(saved[AVERAGE])
    return state


def _formats(kept: Kept) -> Iterator[tuple[str, Format]]:
    """The format of each moment."""
    yield from (("exp_avg", kept.exp_avg), ("exp_avg_sq", kept.exp_avg_sq), (MAXIMUM, kept.exp_avg))


def _copy(saved: Field, field: Field, what: str) -> None:
    """Write a saved moment, of any device, layout and format, into a new one."""
    if saved.side is None and field.side is None:
        field.values.copy_(saved.values)
        return
    source, target = _local(_placed(saved, field.values)), _local(field)
    if source.format == target.format and memory_order(source.values) == memory_order(target.values):
        for to, t in zip(target[1:], source[1:], strict=True):
            if to is not None and t is not None:
                to.copy_(t)
    else:
        target.write(source.load().to(target.values.device))
        if source.side is None and target.side is not None and _was_rounded(source, target):
            raise RuntimeError(
                f"{what} is what 8-bit moments decode to, rounded to {source.values.dtype}, as "
                "torch.optim.Optimizer.load_state_dict rounds them to the parameter's dtype. Load what "
                "state_dict() of FusedHygieneAdamW returned, before another optimizer had it."
            )


def _was_rounded(saved: Field, coded: Field) -> bool:
    """Whether saved moments are values of codes that were rounded to a smaller dtype.

    Others are about a code's width away from the nearest code; many different ones near theirs are no chance.
    """
    if saved.values.dtype not in (torch.bfloat16, torch.float16):
        return False
    limits, format = torch.finfo(saved.values.dtype), coded.format
    assert isinstance(format, RootCode)
    x, code = saved.load().to(coded.values.device), coded.values.int().abs()
    told = (code > 0) & (code < format.levels) & (x.abs() >= limits.tiny)
    x, decoded = x[told], coded.load()[told]
    is_near = ((decoded - x).abs() <= limits.eps * x.abs()).all()
    return bool(is_near) and int(x.sort().values.diff().count_nonzero()) >= 64


def _placed(field: Field, like: Tensor) -> Field:
    """A field distributed as a DTensor is; collective where it was distributed differently."""
    spec = getattr(like, "_spec", None)
    if spec is None or getattr(field.values, "placements", None) == spec.placements:
        return field
    tensors: tuple[Any, ...] = field[1:]
    placed: list[Any] = [t if t is None else t.redistribute(placements=spec.placements) for t in tensors]
    return Field(field.format, *placed)


def _local(field: Field) -> Field:
    return Field(field.format, *local_tensors(field[1:]))


def saved_state(state: Any) -> Any:
    """A parameter's state as it is saved: with torch's keys, moments that are kept as codes in float32.

    Residuals of DTensors are int32: no collective knows int16, so they could not be gathered.

    Returns:
        A new dict; or the state itself if nothing in it is kept otherwise.
    """
    if not isinstance(state, Mapping) or not {*_CODE_KEYS, RESIDUAL} & state.keys():
        return state
    saved = {key: value for key, value in state.items() if key not in _CODE_KEYS}
    for name, field in moments_of(state).items():
        saved[name] = field.values if field.side is None else wrapped(_local(field).load(), field.values)
    if RESIDUAL in saved and is_dtensor(saved[RESIDUAL]):
        saved[RESIDUAL] = saved[RESIDUAL].to(torch.int32)
    return saved


def is_counted(state: State, p: Tensor) -> bool:
    """Whether the state has a step count of a parameter: it has had a gradient."""
    of_p = state.get(p)
    return isinstance(of_p, Mapping) and "step" in of_p
