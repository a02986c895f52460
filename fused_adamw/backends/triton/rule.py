"""The rule in Triton: twin of csrc/adamw.h, in the same order of operations. Knows no tables, no formats."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl


class Hyper(NamedTuple):
    """How one parameter group is stepped, in float64."""

    lr: tl.tensor
    beta1: tl.tensor
    beta2: tl.tensor
    eps: tl.tensor
    weight_decay: tl.tensor
    decay_power: tl.tensor
    cautious: tl.tensor
    nesterov: tl.tensor
    grad_sign: tl.tensor


class Coefficients(NamedTuple):
    """The numbers that one parameter's update needs: see csrc/adamw.h."""

    grad_scale: tl.tensor
    decay: tl.tensor
    decay_against: tl.tensor
    lerp_weight: tl.tensor
    lerp_from_g: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    step_size: tl.tensor
    grad_step_size: tl.tensor
    nesterov: tl.tensor
    bias_correction2_sqrt: tl.tensor
    eps: tl.tensor


@triton.jit
def power(x, n):
    """`x ** n` in float64 for x > 0, or 0 and n >= 1: log(0) is -inf, so 0 ** n is 0."""
    return tl.exp(n * tl.log(x))


@triton.jit
def coefficients(hyper, step, grad_scale, T: tl.constexpr):
    """Worked out in float64 as Python does, then rounded to T. `step` counts this update: 1 for the first."""
    weight = 1.0 - hyper.beta1
    from_g = weight >= 0.5
    is_on = (hyper.lr != 0).to(tl.float64)
    lr_power = tl.where(hyper.decay_power == 0, is_on, hyper.lr)
    lr_power = tl.where(hyper.decay_power == 2, hyper.lr * hyper.lr, lr_power)
    decay = 1.0 - lr_power * hyper.weight_decay
    step_size = hyper.lr / (1.0 - power(hyper.beta1, step))
    next_step_size = hyper.lr * hyper.beta1 / (1.0 - power(hyper.beta1, step + 1.0))
    nesterov = hyper.nesterov != 0
    return Coefficients(
        grad_scale=(hyper.grad_sign * grad_scale).to(T),
        decay=decay.to(T),
        decay_against=tl.where(hyper.cautious != 0, 1.0, decay).to(T),
        lerp_weight=tl.where(from_g, weight - 1.0, weight).to(T),
        lerp_from_g=from_g,
        beta2=hyper.beta2.to(T),
        one_minus_beta2=(1.0 - hyper.beta2).to(T),
        step_size=tl.where(nesterov, next_step_size, step_size).to(T),
        grad_step_size=(step_size * weight).to(T),
        nesterov=nesterov,
        bias_correction2_sqrt=tl.sqrt(1.0 - power(hyper.beta2, step)).to(T),
        eps=hyper.eps.to(T),
    )


@triton.jit
def square_root(x):
    """Square root, correctly rounded."""
    return tl.sqrt(x) if x.dtype.is_fp64() else tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Quotient, correctly rounded: a float32 `/` is not."""
    return x / y if x.dtype.is_fp64() else tl.div_rn(x, y)


@triton.jit
def adamw_update(p, grad, m, v, v_max, c):
    """THE rule, a block of elements at once. Without amsgrad v_max is zeros, so that the maximum is v."""
    g = grad * c.grad_scale
    m = tl.where(c.lerp_from_g, g, m) + c.lerp_weight * (g - m)
    v = v * c.beta2 + c.one_minus_beta2 * g * g
    v_max = tl.where((v_max > v) | (v_max != v_max), v_max, v)
    denominator = divide(square_root(v_max), c.bias_correction2_sqrt) + c.eps
    by_m = c.step_size * m
    numerator = tl.where(c.nesterov, by_m + c.grad_step_size * g, by_m)
    p = p * tl.where(numerator * p < 0.0, c.decay_against, c.decay)
    p = p - divide(numerator, denominator)
    return p, m, v, v_max
