"""The definition: AdamW in plain PyTorch, on any device and for any dtype that torch allows.

Every kernel is checked against this, and it steps whatever the kernels cannot take. It is written to be read;
like the kernels it never reads a device value on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..formats import Field, element_index, noise_bits, noise_hash, noise_word, plain_format
from ..tables import Entry, Hyper, StepInputs


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for parameters of `dtype`: float32, or float64 for 64-bit ones."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def step_scalars(inputs: StepInputs) -> tuple[Tensor | None, Tensor | float, Tensor | None]:
    """Work out the gradient norm, the factor for the gradients, and whether to skip the step.

    Clips as `torch.nn.utils.clip_grad_norm_` does: `max_norm / (norm + 1e-6)`, at most 1; NaN stays NaN.

    Returns:
        The gradient norm (None without a norm pass); the factor for every gradient, which folds the clip
        coefficient and 1/loss-scale; a bool tensor that says to skip the step (None: never).
    """
    norm: Tensor | None = None
    skip: Tensor | None = None
    loss_scale = 1.0 if inputs.grad_scale is None else inputs.grad_scale.to(inputs.status.dtype)
    grad_scale: Tensor | float = 1.0 / loss_scale
    if inputs.found_inf is not None:
        skip = inputs.found_inf != 0
    if inputs.sums is not None:
        norm = inputs.sums.sum().sqrt() / loss_scale
        grad_scale = grad_scale * (inputs.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        if inputs.skip_nonfinite:
            nonfinite = norm.isfinite().logical_not()
            skip = nonfinite if skip is None else skip | nonfinite
    return norm, grad_scale, skip


def adamw_update(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    v_max: Tensor | None,
    step: Tensor,
    hyper: Hyper,
    grad_scale: Tensor | float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """THE rule: AdamW (https://arxiv.org/abs/1711.05101), in torch.optim.AdamW's order of operations.

    Args:
        p: Parameter. It and the next four have one shape and one real dtype, that of the arithmetic; none of
            them is changed.
        grad: Gradient.
        m: exp_avg.
        v: exp_avg_sq.
        v_max: max_exp_avg_sq; None: no amsgrad.
        step: float64 where the device has it, 0-dim: counts this update, 1 for the first.
        hyper: The group's hyper-parameters.
        grad_scale: Factor for the gradient.

    Returns:
        The new p, m, v and v_max.
    """

    def scalar(x: Tensor | float) -> Tensor | float:
        return x.to(p.dtype) if isinstance(x, Tensor) else x

    lr, beta1, beta2 = hyper.lr, hyper.beta1, hyper.beta2
    bias_correction1 = 1 - beta1**step
    bias_correction2_sqrt = (1 - beta2**step).sqrt()

    g = grad * scalar(-grad_scale if hyper.maximize else grad_scale)
    weight = 1 - beta1
    m = m + weight * (g - m) if weight < 0.5 else g + (weight - 1) * (g - m)  # torch.lerp
    v = v * beta2 + (1 - beta2) * g * g
    if v_max is not None:
        v_max = torch.maximum(v_max, v)
    denom = (v if v_max is None else v_max).sqrt() / scalar(bias_correction2_sqrt) + hyper.eps
    step_size = lr / bias_correction1
    if hyper.nesterov:  # NAdam (Dozat, 2016) with a constant momentum
        next_step_size = lr * beta1 / (1 - beta1 ** (step + 1))
        numerator = scalar(next_step_size) * m + scalar(step_size * weight) * g
    else:
        numerator = scalar(step_size) * m
    decay = scalar(1 - lr**hyper.decay_power * hyper.weight_decay)
    p = p * (torch.where(numerator * p < 0, 1.0, decay) if hyper.cautious else decay)
    p = p - numerator / denom
    return p, m, v, v_max


def sum_of_squares(grads: Sequence[Tensor], out: Tensor) -> list[Tensor]:
    """Write the sum of squares of all elements of `grads`, any dtypes and layouts, to `out` (one element).

    Returns:
        The sum of each gradient, 0-dim.
    """
    total, squares = torch.zeros((), dtype=out.dtype, device=out.device), []
    for grad in grads:
        dtype = torch.promote_types(grad.dtype, out.dtype) if grad.is_complex() else out.dtype
        squares.append(torch.linalg.vector_norm(grad, dtype=dtype).square())
        total = total + squares[-1]
    out.copy_(total.reshape(out.shape))
    return squares


def update(
    entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
) -> None:
    """Step every entry: mutates its parameter, moments and step count, unless the step is skipped."""
    norm, grad_scale, skip = step_scalars(inputs)
    if norm is not None:
        inputs.status[0] = norm
    if skip is not None:
        inputs.status[1] += skip.reshape(())
    # All of them before any is written: a count that parameters share goes on by one, and by two where one
    # parameter is listed twice.
    listed: Counter[int] = Counter()
    steps = []
    for entry in entries:
        listed[id(entry.param.values)] += 1
        steps.append(entry.step + listed[id(entry.param.values)])
    for entry, grad, step in zip(entries, grads, steps, strict=True):
        for old, new in _changes(entry, grad, step, hypers[entry.group], inputs, grad_scale, skip):
            old.copy_(new)


def rehearse(
    entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
) -> None:
    """Compute what `update` would, raise what it would raise, and change nothing."""
    _, grad_scale, skip = step_scalars(inputs)
    for entry, grad in zip(entries, grads, strict=True):
        _changes(entry, grad, entry.step + 1, hypers[entry.group], inputs, grad_scale, skip)


def _changes(
    entry: Entry,
    grad: Tensor,
    step: Tensor,
    hyper: Hyper,
    inputs: StepInputs,
    grad_scale: Tensor | float,
    skip: Tensor | None,
) -> list[tuple[Tensor, Tensor]]:
    """The tensors that a step of one entry changes, each with what they are to hold: load, rule, store."""
    dtype, wide = math_dtype(entry.param.values.dtype), inputs.status.dtype
    fields = {"param": entry.param, "exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}
    if entry.max_exp_avg_sq is not None:
        fields["max_exp_avg_sq"] = entry.max_exp_avg_sq
    noise = _noise(entry, step, inputs.seed, fields)
    if entry.param.values.is_complex():
        fields = {name: _as_real(field) for name, field in fields.items()}
        grad = torch.view_as_real(grad.resolve_conj())
    p, m, v, *maxima = (field.load().to(dtype) for field in fields.values())
    if isinstance(hyper.lr, Tensor):
        hyper = hyper._replace(lr=hyper.lr.to(p.device, wide))
    v_max = maxima[0] if maxima else None
    new = adamw_update(p, grad.to(dtype), m, v, v_max, step.to(wide), hyper, grad_scale)
    changes: list[tuple[Tensor, Tensor]] = []
    for (name, field), x in zip(fields.items(), filter(torch.is_tensor, new), strict=True):
        changes += field.changes(x, noise.get(name), skip)
    return [*changes, (entry.step, step if skip is None else torch.where(skip, entry.step, step))]


def _noise(entry: Entry, step: Tensor, seed: int, fields: Mapping[str, Field]) -> dict[str, Tensor]:
    """Random bits for the fields that are rounded with them."""
    stochastic = [name for name, field in fields.items() if field.format.stochastic]
    if not stochastic:
        return {}
    index = element_index(entry.param.values, entry.window)
    hashed = noise_hash(noise_word(seed, entry.ordinal), step, index)
    return {name: noise_bits(hashed, name) for name in stochastic}


def _as_real(field: Field) -> Field:
    """A complex tensor as the pairs of numbers that it is kept in."""
    values = torch.view_as_real(field.values)
    return Field(plain_format(values.dtype), values)
