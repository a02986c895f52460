"""What an optimizer is made of, and what may happen to it: the strategies that draw it."""

import torch
from common import F32
from hypothesis import strategies as st
from low_precision import BF16, SCHEMES
from test_layouts import at_offset, channels_last, rows_of_wider, sliced, transposed

from fused_adamw import EMA, SpikeGuard

F64, F16 = torch.float64, torch.float16
SHAPES = [(40, 130), (7,), (5, 5), (), (2, 3, 4), (0,), (70, 3), (32, 3, 7, 7)]
# Each with the dtypes of its parameters, and whether numpy has its formats.
FORMATS = {
    "plain": ({}, (F32, F32, F64, BF16, F16), True),
    "bfloat16 moments": ({"state_dtype": BF16, "stochastic_rounding": False}, (F32, BF16), True),
    **{name: (options, (BF16, BF16, F32), name == "split") for name, options in SCHEMES.items()},
}
EMAS = [
    None,
    EMA(0.9),
    EMA(0.4, warmup="timm", start_step=2),
    EMA(0.9, warmup="diffusers", every=2),
    EMA(half_life=3, every=3, start_step=1),
    EMA(0.9, dtype=BF16),
]
GUARDS = [
    None,
    SpikeGuard(2.0, window=6, warmup=3, max_consecutive=10**9),
    SpikeGuard(1.5, window=4, warmup=6, on="clip", max_consecutive=10**9),
    SpikeGuard(1.0, window=9, warmup=8, max_consecutive=10**9),
]


def expanded(t):
    return t.flatten()[:1].expand(t.numel()).view(t.shape) if t.numel() else t


def of_dtype(dtype):
    return lambda t: t.to(dtype)


def like(layout):
    """The layout, where a shape can have it."""
    least = 4 if layout is channels_last else 1
    return lambda t: layout(t) if t.dim() >= least and t.numel() else t.clone()


# Other places for a tensor, of which the last ones are no dense memory.
DENSE = {"elsewhere": torch.clone, "misaligned": at_offset}
DENSE |= {f.__name__: like(f) for f in (transposed, channels_last)}
PLACES = {**DENSE, **{f.__name__: like(f) for f in (sliced, rows_of_wider)}}
GRADIENTS = {
    **PLACES,
    "in place": None,
    "absent": None,
    "expanded": expanded,
    "negated": lambda t: torch._neg_view(-t),
    "float64": of_dtype(F64),
    "float32": of_dtype(F32),
    "bfloat16": of_dtype(BF16),
}

number = st.sampled_from([0, 1, 2, 3, 5, 8])
place = st.sampled_from(list(PLACES))
shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3)
hypers = st.fixed_dictionaries(
    {
        "lr": st.sampled_from([1e-2, 1e-3, 0.1, 0.0]),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.0), (0.3, 0.9), (0.95, 0.4)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
        "weight_decay": st.sampled_from([0.0, 1e-2, 0.3]),
        "amsgrad": st.booleans(),
        "maximize": st.booleans(),
    }
)
variants = st.fixed_dictionaries(
    {
        "weight_decay_mode": st.sampled_from(["lr", "lr", "schedule", "corrected", "constant"]),
        "cautious_weight_decay": st.booleans(),
        "nesterov": st.booleans(),
    }
)
group = st.fixed_dictionaries(
    {"shapes": shapes, "hypers": hypers, "variant": variants, "in_tensor": st.booleans()}
)
