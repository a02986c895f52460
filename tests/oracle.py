"""AdamW in numpy, written from the paper and from torch's documentation. Imports nothing of ours.

Arithmetic is a plain chain of float32 (or float64) operations, each rounded once, in the order of
torch.optim.AdamW's for-loop implementation. Storage may be narrower: values are rounded to nearest even
whenever they are stored, as bfloat16 or float16 tensors do. Arrays hold stored values in the dtype of the
arithmetic.
"""

import math
from dataclasses import dataclass

import numpy as np


def round_to(x, storage):
    """`x` after a round trip through a storage dtype, named as torch does."""
    x = np.asarray(x)
    if storage == "float64":
        return x.astype(np.float64)
    x = x.astype(np.float32)
    if storage == "float16":
        with np.errstate(over="ignore"):
            return x.astype(np.float16).astype(np.float32)
    if storage == "bfloat16":
        bits = x.view(np.uint32)
        kept = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        return np.where(np.isnan(x), x, (kept & np.uint32(0xFFFF0000)).view(np.float32))
    assert storage == "float32", storage
    return x


@dataclass
class Hypers:
    """The options of one group."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    amsgrad: bool = False
    maximize: bool = False
    weight_decay_mode: str = "lr"
    cautious_weight_decay: bool = False
    nesterov: bool = False
    lr_ref: float = 1e-3

    def decay(self):
        """What parameters lose of themselves in a step."""
        return {
            "lr": self.lr * self.weight_decay,
            "schedule": self.weight_decay * self.lr / self.lr_ref,
            "corrected": self.weight_decay * self.lr**2 / self.lr_ref,
            "constant": self.weight_decay * (self.lr != 0),
        }[self.weight_decay_mode]


def adamw(p, g, m, v, v_max, hypers, step, grad_scale):
    """One update of arrays in the dtype of the arithmetic, not yet rounded to their storage.

    `step` counts this update, `grad_scale` multiplies the gradient. Returns p, m, v, v_max.
    """
    T = p.dtype.type
    lr, (beta1, beta2) = hypers.lr, hypers.betas
    with np.errstate(all="ignore"):
        g = g * T(-grad_scale if hypers.maximize else grad_scale)
        weight = 1 - beta1
        if weight < 0.5:
            m = m + T(weight) * (g - m)
        else:  # as torch.lerp
            m = g + T(weight - 1) * (g - m)
        v = v * T(beta2) + T(1 - beta2) * g * g
        v_max = np.maximum(v_max, v)
        root = np.sqrt(v_max if hypers.amsgrad else v)
        denominator = root / T(math.sqrt(1 - beta2**step)) + T(hypers.eps)
        numerator = T(lr / (1 - beta1**step)) * m
        if hypers.nesterov:  # torch.optim.NAdam, once its momentum has warmed up
            numerator = (
                T(lr * beta1 / (1 - beta1 ** (step + 1))) * m + T(lr / (1 - beta1**step) * (1 - beta1)) * g
            )
        decayed = p * T(1 - hypers.decay())
        if hypers.cautious_weight_decay:
            decayed = np.where(numerator * p < 0, p, decayed)
        p = decayed - numerator / denominator
    return p, m, v, v_max


def clip_coefficient(norm, max_grad_norm):
    """What gradients of a norm are multiplied by; NaN stays NaN."""
    return float(np.minimum(1.0, max_grad_norm / (norm + 1e-6)))


class Slot:
    """One parameter with its state."""

    def __init__(self, p, param_dtype, state_dtype, step):
        self.param_dtype, self.state_dtype = param_dtype, state_dtype or param_dtype
        self.p = round_to(p, param_dtype)
        self.m, self.v, self.v_max = (np.zeros_like(self.p) for _ in range(3))
        self.step = step

    def update(self, grad, hypers, grad_scale):
        """One step, for a gradient that is to be multiplied by `grad_scale`."""
        self.step += 1
        g = np.asarray(grad).astype(self.p.dtype)
        p, *moments = adamw(self.p, g, self.m, self.v, self.v_max, hypers, self.step, grad_scale)
        self.p = round_to(p, self.param_dtype)
        self.m, self.v, self.v_max = (round_to(x, self.state_dtype) for x in moments)


class AdamW:
    """The optimizer: `groups` are pairs of a list of arrays and `Hypers`.

    Args:
        groups: Parameters, a list for each group, with the group's options.
        param_dtype: Storage of the parameters, the same for all; "float64" is computed in float64.
        state_dtype: Storage of the moments; None: that of the parameters.
        max_grad_norm: Clip to this norm over all groups; None: do not.
        step: Updates made so far.
    """

    def __init__(self, groups, param_dtype="float32", state_dtype=None, max_grad_norm=None, step=0):
        self.groups = [
            ([Slot(p, param_dtype, state_dtype, step) for p in params], hypers) for params, hypers in groups
        ]
        self.max_grad_norm = max_grad_norm
        self.grad_norm = None

    @property
    def slots(self):
        """All parameters in order."""
        return [slot for slots, _ in self.groups for slot in slots]

    @property
    def hypers(self):
        """The options of each of `slots`."""
        return [hypers for slots, hypers in self.groups for _ in slots]

    def step(self, grads, loss_scale=1.0, found_inf=False, measured_norm=None):
        """One step.

        Args:
            grads: A gradient, or None, for each of `slots`.
            loss_scale: What the gradients still carry.
            found_inf: Skip the step.
            measured_norm: Clip by this norm instead of the exact one, from which it may differ by 1e-7 of it:
                kernels add the squares in other ways.
        """
        scale = 1.0 / loss_scale
        if self.max_grad_norm is not None:
            squares = (np.asarray(g, np.float64).ravel() ** 2 for g in grads if g is not None)
            self.grad_norm = math.sqrt(math.fsum(x for square in squares for x in square)) / loss_scale
            norm = self.grad_norm
            if measured_norm is not None:
                np.testing.assert_allclose(measured_norm, norm, rtol=1e-7, err_msg="gradient norm")
                norm = measured_norm
            scale *= clip_coefficient(norm, self.max_grad_norm)
        if found_inf:
            return
        for slot, hypers, grad in zip(self.slots, self.hypers, grads, strict=True):
            if grad is not None:
                slot.update(grad, hypers, scale)
