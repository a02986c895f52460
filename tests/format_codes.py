"""Formats as csrc/tables.h numbers them, and what kernels take: written anew, not asked of the code."""

import itertools

NONE, F32, BF16, F16, F64, STOCHASTIC, SPLIT, SIGNED, UNSIGNED = range(-1, 8)  # enum FormatCode
NAMES = (
    "float32",
    "bfloat16",
    "float16",
    "float64",
    "bfloat16_stochastic",
    "bfloat16_split",
    "root_signed",
    "root_unsigned",
)
PLAIN = (F32, BF16, F16, F64)
TAKES_NOISE = (STOCHASTIC, SIGNED, UNSIGNED)

# Parameter, gradient, exp_avg, exp_avg_sq: moments of one format, as all optimizers make them.
MIXES = [(p, g, m, m) for p, g, m in itertools.product((F32, BF16, F16), repeat=3)]
MIXES.append((F64, F64, F64, F64))
# With a master, stochastic rounding or codes: what an optimizer makes of parameters and gradients.
LOW_PRECISION = [
    (p, g, *moments)
    for p, g in [(F32, F32), (F32, BF16), (BF16, BF16), (BF16, F32), (F16, F16)]
    for moments in [(BF16, STOCHASTIC), (SIGNED, UNSIGNED)]
] + [
    (p, g, *moments)
    for p, g in itertools.product((SPLIT, STOCHASTIC), (BF16, F32))
    for moments in [(F32, F32), (BF16, BF16), (BF16, STOCHASTIC), (SIGNED, UNSIGNED)]
]
# What kernels that choose each format by itself step as well.
ODD_MIXES = [
    (F32, F16, F16, BF16),
    (SPLIT, F16, SIGNED, F32),
    (F16, BF16, SIGNED, STOCHASTIC),
    (STOCHASTIC, F32, F16, STOCHASTIC),
]
CPU_LAYOUTS = [*MIXES, *LOW_PRECISION, *ODD_MIXES]
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
    *LOW_PRECISION,
    (F16, F32, BF16, STOCHASTIC),
    (F16, F32, SIGNED, UNSIGNED),
]


def averages(formats: tuple[int, ...]) -> tuple[int, ...]:
    """How an average of parameters of a layout may be kept."""
    return (F64,) if formats[0] == F64 else (F32, STOCHASTIC)


def has_codes(formats: tuple[int, ...]) -> bool:
    """Whether moments are codes, whose rows are cut into blocks. There is no maximum then."""
    return SIGNED in formats or UNSIGNED in formats


def takes_noise(formats: tuple[int, ...]) -> bool:
    """Whether a step of these draws noise."""
    return any(format in TAKES_NOISE for format in formats)


def cpu_has(formats: tuple[int, ...]) -> bool:
    """Whether the CPU kernels take them: all that share their arithmetic, float or double."""
    if F64 in formats:
        return set(formats) == {F64}
    param, grad, *moments = formats
    return (
        param in (F32, BF16, F16, STOCHASTIC, SPLIT)
        and grad in (F32, BF16, F16)
        and moments[0] in (F32, BF16, F16, SIGNED)
        and (moments[1] in (F32, BF16, F16, STOCHASTIC) or moments == [SIGNED, UNSIGNED])
    )
