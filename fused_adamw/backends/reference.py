"""The definition: AdamW in plain PyTorch, on any device and for any dtype that torch allows.

Every kernel is checked against this, and it steps whatever the kernels cannot take. It is written to be read;
like the kernels it never reads a device value on the host.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from ..formats import NOISE_SHIFT, Field, element_index, noise_bits, noise_hash, noise_word, plain_format
from ..tables import WARMUPS, Averaging, Entry, Hyper, StepInputs
from .outcome import record, step_scalars


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic for parameters of `dtype`: float32, or float64 for 64-bit ones."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


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
    lr_power = lr**hyper.decay_power if hyper.decay_power else lr != 0
    decay = scalar(1 - lr_power * hyper.weight_decay)
    decayed = p * decay
    p = torch.where(numerator * p < 0, p, decayed) if hyper.cautious else decayed
    p = p - numerator / denom
    return p, m, v, v_max


def average_weight(averaging: Averaging, step: Tensor) -> Tensor:
    """How much of the way to the parameter its average goes at update number `step`, 1 for the first.

    With n averages made before, decay is as in timm's ModelEmaV3, or as in diffusers' EMAModel.

    Returns:
        Of the dtype of `step`; 0: the average stays as it is.
    """
    updates = step - averaging.start_step
    n = updates / averaging.every - 1.0
    decay = torch.full_like(n, averaging.decay)
    if WARMUPS[averaging.warmup] == "timm":
        decay = (1.0 - (1.0 + n) ** (-2.0 / 3.0)).clamp(max=averaging.decay)
    elif WARMUPS[averaging.warmup] == "diffusers":
        decay = ((1.0 + n) / (10.0 + n)).clamp(max=averaging.decay)
    weight = torch.where(n == n.floor(), 1.0 - decay, 0.0)
    return torch.where(updates <= averaging.every, 1.0, weight)


def average_update(average: Tensor, p: Tensor, weight: Tensor) -> Tensor:
    """The rule of the average, `torch.lerp`: of one real dtype, except for `weight`, float64, 0-dim."""
    is_far = weight >= 0.5
    weight = torch.where(is_far, weight - 1.0, weight)
    return torch.where(is_far, p, average) + weight.to(p.dtype) * (p - average)


def sum_of_squares(grads: Sequence[Tensor], out: Tensor) -> list[Tensor]:
    """Write the sum of squares of all elements of `grads`, any dtypes and layouts, to `out` (one element).

    Returns:
        The sum of each gradient, 0-dim.
    """
    total, squares = torch.zeros((), dtype=out.dtype, device=out.device), []
    for grad in grads:
        real = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
        squares.append(real.to(out.dtype).square().sum())  # in pairs, unlike vector_norm: nothing gets lost
        total = total + squares[-1]
    out.copy_(total.reshape(out.shape))
    return squares


def update(
    entries: Sequence[Entry],
    grads: Sequence[Tensor],
    hypers: Sequence[Hyper],
    inputs: StepInputs,
    stats: Sequence[Tensor] | None = None,
) -> None:
    """Step every entry: mutates its parameter, moments, average and step count, unless the step is skipped.

    Args:
        entries: What to step.
        grads: Their gradients.
        hypers: How each group is stepped.
        inputs: What else is known.
        stats: Written, unless the step is skipped: of each entry the words of struct ChunkStats, float64.
    """
    scalars = step_scalars(inputs)
    # All of them before any is written: a count that parameters share goes on by one, and by two where one
    # parameter is listed twice.
    listed: Counter[int] = Counter()
    steps = []
    for entry in entries:
        listed[id(entry.param.values)] += 1
        steps.append(entry.step + listed[id(entry.param.values)])
    for i, (entry, grad, step) in enumerate(zip(entries, grads, steps, strict=True)):
        changed = _Changed(entry, grad, step, hypers[entry.group], inputs, scalars.grad_scale, scalars.skip)
        if stats is not None:
            found = changed.stats().to(stats[i])
            stats[i].copy_(found if scalars.skip is None else torch.where(scalars.skip, stats[i], found))
        for old, new in changed.tensors:
            old.copy_(new)
    record(inputs, scalars)


def rehearse(
    entries: Sequence[Entry], grads: Sequence[Tensor], hypers: Sequence[Hyper], inputs: StepInputs
) -> None:
    """Compute what `update` would, raise what it would raise, and change nothing."""
    scalars = step_scalars(inputs)
    for entry, grad in zip(entries, grads, strict=True):
        _Changed(
            entry, grad, entry.step + 1, hypers[entry.group], inputs, scalars.grad_scale, scalars.skip
        ).stats()


class _Changed:
    """What a step makes of one entry: load, rule, store.

    Attributes:
        tensors: Those that it changes, each with what they are to hold.
    """

    def __init__(
        self,
        entry: Entry,
        grad: Tensor,
        step: Tensor,
        hyper: Hyper,
        inputs: StepInputs,
        grad_scale: Tensor | float,
        skip: Tensor | None,
    ) -> None:
        dtype, wide = math_dtype(entry.param.values.dtype), inputs.status.dtype
        fields = {"param": entry.param, "exp_avg": entry.exp_avg, "exp_avg_sq": entry.exp_avg_sq}
        if entry.max_exp_avg_sq is not None:
            fields["max_exp_avg_sq"] = entry.max_exp_avg_sq
        noise = _noise(entry, step, inputs.seed)
        if entry.param.values.is_complex():
            fields = {name: _as_real(field) for name, field in fields.items()}
            grad = torch.view_as_real(grad.resolve_conj())
        self._grad, self._format, self._wide = grad, entry.param.format, wide
        p, m, v, *maxima = (field.load().to(dtype) for field in fields.values())
        if isinstance(hyper.lr, Tensor):
            hyper = hyper._replace(lr=hyper.lr.to(p.device, wide))
        v_max = maxima[0] if maxima else None
        new = adamw_update(p, grad.to(dtype), m, v, v_max, step.to(wide), hyper, grad_scale)
        self._old, self._new = p, new[0]
        self.tensors: list[tuple[Tensor, Tensor]] = []
        for (name, field), x in zip(fields.items(), filter(torch.is_tensor, new), strict=True):
            self.tensors += field.changes(x, noise.get(name), skip)
        if entry.average is not None:
            average = _as_real(entry.average) if entry.param.values.is_complex() else entry.average
            kept = fields["param"].stored(new[0], noise.get("param")).load().to(dtype)
            weight = average_weight(inputs.averaging, step.to(wide))
            stays = weight == 0.0 if skip is None else skip | (weight == 0.0)
            moved = average_update(average.load().to(dtype), kept, weight)
            self.tensors += average.changes(moved, noise.get("average"), stays)
        self.tensors.append((entry.step, step if skip is None else torch.where(skip, entry.step, step)))

    def stats(self) -> Tensor:
        """The words of struct ChunkStats, of the status's dtype."""
        grad, update = self._grad.to(self._wide), self._new - self._old
        largest = grad.abs().max() if grad.numel() else grad.new_zeros(())
        lost = grad.new_zeros(())
        if self._format.dtype == torch.bfloat16:
            lost = _is_lost(self._old, update).sum().to(self._wide)
        squares = [x.to(self._wide).square().sum() for x in (grad, update, self._new)]
        return torch.stack([squares[0], largest, squares[1], squares[2], lost])


def _is_lost(p: Tensor, update: Tensor) -> Tensor:
    """Where rounding to bfloat16 would lose an update: it is below half a unit in the last place of p."""
    exponent = (p.view(torch.int32) & 0x7F800000).clamp(min=0x00800000)
    size = update.abs()
    return (size < exponent.view(torch.float32) * 2.0**-8) & (size > 0)


def _noise(entry: Entry, step: Tensor, seed: int) -> dict[str, Tensor]:
    """Random bits for the fields that are rounded with them."""
    fields = {name: getattr(entry, name) for name in NOISE_SHIFT}
    stochastic = [name for name, field in fields.items() if field and field.format.stochastic]
    if not stochastic:
        return {}
    index = element_index(entry.param.values, entry.window)
    hashed = noise_hash(noise_word(seed, entry.ordinal), step, index)
    return {name: noise_bits(hashed, name) for name in stochastic}


def _as_real(field: Field) -> Field:
    """A complex tensor as the pairs of numbers that it is kept in."""
    values = torch.view_as_real(field.values)
    return Field(plain_format(values.dtype), values)
