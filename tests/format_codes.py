"""Formats as csrc/tables.h numbers them, and what kernels take: written anew, not asked of the code."""

import itertools

F32, BF16, F16, F64 = range(4)  # enum FormatCode
# Parameter, gradient, exp_avg, exp_avg_sq: moments of one format, as all optimizers make them.
MIXES = [(p, g, m, m) for p, g, m in itertools.product((F32, BF16, F16), repeat=3)]
MIXES.append((F64, F64, F64, F64))
# On CUDA those that csrc/cuda/layouts.h lists.
CUDA_LAYOUTS = [
    (F32, F32, F32, F32),
    (F32, F32, BF16, BF16),
    (F32, BF16, F32, F32),
    (F32, BF16, BF16, BF16),
    (BF16, BF16, BF16, BF16),
    (BF16, BF16, F32, F32),
    (BF16, F32, BF16, BF16),
    (BF16, F32, F32, F32),
    (F16, F16, F16, F16),
    (F16, F16, F32, F32),
    (F16, F16, BF16, BF16),
    (F16, F32, F16, F16),
    (F16, F32, F32, F32),
    (F64, F64, F64, F64),
]


def cpu_has(formats: tuple[int, ...]) -> bool:
    """Whether the CPU kernels take them: all that share their arithmetic, float or double."""
    return set(formats) == {F64} or set(formats) <= {F32, BF16, F16}
