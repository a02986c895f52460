"""Formats as csrc/tables.h numbers them, and what kernels take: written anew, not asked of the code."""

import itertools

F32, BF16, F16, F64 = range(4)  # enum DType
# Parameter, gradient, moments. On the CPU all that share their arithmetic, float or double.
MIXES = [*itertools.product((F32, BF16, F16), repeat=3), (F64, F64, F64)]
# On CUDA those that csrc/cuda/layouts.h lists.
CUDA_LAYOUTS = [
    (F32, F32, F32),
    (F32, F32, BF16),
    (F32, BF16, F32),
    (F32, BF16, BF16),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
    (BF16, F32, BF16),
    (BF16, F32, F32),
    (F16, F16, F16),
    (F16, F16, F32),
    (F16, F16, BF16),
    (F16, F32, F16),
    (F16, F32, F32),
    (F64, F64, F64),
]
