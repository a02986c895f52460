"""The rule with moments kept in formats, and beside it with moments in float32, on the same gradients."""

from dataclasses import dataclass

import torch

from fused_adamw.backends.reference import adamw_update
from fused_adamw.formats import FORMATS, element_index, noise_bits, noise_hash, noise_word
from fused_adamw.tables import Hyper

ROWS, COLUMNS = 32, 128
MOMENTS = ("exp_avg", "exp_avg_sq")


def step_fields(fields, grad, step, hyper, seed=0, nearest=()):
    """One step: load, rule, store.

    Args:
        fields: `Field`s by name: param, exp_avg, exp_avg_sq. They are changed.
        grad: The gradient.
        step: Counts this update.
        hyper: `Hyper`.
        seed: Of the noise.
        nearest: Names of fields to round to nearest.

    Returns:
        The new param, exp_avg and exp_avg_sq before they were stored.
    """
    p, m, v = (fields[name].load() for name in ("param", "exp_avg", "exp_avg_sq"))
    step = torch.tensor(step, dtype=torch.float64)
    *new, _ = adamw_update(p, grad.float(), m, v, None, step, hyper, 1.0)
    h = None
    if any(field.format.stochastic for field in fields.values()):
        h = noise_hash(noise_word(seed, 0), step, element_index(p))
    for (name, field), x in zip(fields.items(), new, strict=True):
        field.write(x, None if h is None or name in nearest else noise_bits(h, name))
    return new


@dataclass
class Result:
    """What a scheme did in the second half, beside float32.

    Attributes:
        norm: The mean ratio of the norms of the updates.
        cosine: The mean cosine between them.
        largest: The largest element of any of its updates, and of float32's.
        fields: What was kept at the end.
        exact_v: float32's exp_avg_sq at the end.
    """

    norm: float
    cosine: float
    largest: tuple[float, float]
    fields: dict
    exact_v: torch.Tensor


def shadow(
    moments,
    steps,
    beta2,
    scale=1e-3,
    gradient=lambda g, t: g,
    columns=slice(None),
    nearest=(),
    seed=0,
    watch=lambda fields, t: None,
):
    """Keep moments in two formats, and compare the updates with those of moments in float32.

    Args:
        moments: The names of the formats of exp_avg and exp_avg_sq.
        steps: Updates to make.
        beta2: The decay of exp_avg_sq; exp_avg's is 0.9.
        scale: Of the gradients, which are normal, with a spread of e^(0.7 N) between elements.
        gradient: What becomes of the gradient g of step t.
        columns: Those that are compared.
        nearest: Moments that are rounded to nearest.
        seed: Of gradients and noise.
        watch: Called with the fields in every step of the second half.
    """
    rng = torch.Generator().manual_seed(seed)
    spread = (0.7 * torch.randn(ROWS, COLUMNS, generator=rng)).exp()
    zero = torch.zeros(ROWS, COLUMNS)
    hyper = Hyper(1.0, 0.9, beta2, 1e-8, 0.0, False)
    fields = {name: FORMATS[format].zeros(zero) for name, format in zip(MOMENTS, moments, strict=True)}
    exact = {name: FORMATS["float32"].zeros(zero) for name in MOMENTS}
    norms, cosines, largest, exact_largest = [], [], [], []
    for t in range(1, steps + 1):
        g = gradient(scale * spread * torch.randn(ROWS, COLUMNS, generator=rng), t)
        updates = []
        for moments_kept in (fields, exact):
            kept = {"param": FORMATS["float32"].zeros(zero), **moments_kept}
            updates.append(step_fields(kept, g, t, hyper, seed, nearest)[0][:, columns])
        if t > steps // 2:
            u, u32 = updates
            norms.append(u.norm() / u32.norm())
            cosines.append(torch.cosine_similarity(u.flatten(), u32.flatten(), 0))
            largest.append(u.abs().max())
            exact_largest.append(u32.abs().max())
            watch(fields, t)
    return Result(
        float(torch.stack(norms).mean()),
        float(torch.stack(cosines).mean()),
        (float(torch.stack(largest).max()), float(torch.stack(exact_largest).max())),
        fields,
        exact["exp_avg_sq"].load(),
    )
