"""Storage types as csrc/tables.h numbers and lists them, written anew: the tests do not ask the code."""

F32, BF16, F16, F64 = range(4)  # enum DType
BUILT = [  # FUSED_ADAMW_FOR_EACH_DTYPES: parameter, gradient, moments
    (F32, F32, F32),
    (F32, F32, BF16),
    (F32, BF16, F32),
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
    (BF16, F32, BF16),
    (BF16, F32, F32),
    (F16, F16, F16),
    (F16, F16, F32),
    (F16, F16, BF16),
    (F64, F64, F64),
]
