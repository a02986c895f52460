"""The rule and the norm in Triton, on the tables of csrc/tables.h: twin of csrc/adamw.h and the CUDA kernels.

Serves CUDA devices where no nvcc was at hand, and CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..tables import (
    DTYPE_CODE,
    ChunkStruct,
    HyperStruct,
    RowStruct,
    StepInputs,
    Tables,
    word_of,
    words,
)

# Elements per chunk: as many per thread as in torch's multi-tensor kernels. Long enough to hide the walk
# through the tables, short enough that the last round of chunks is a small part of a step.
CHUNK_SIZE = 1 << 14
# From this many elements on there are rounds enough for longer chunks, of which the norm has fewer to add up.
_LARGE_MODEL = 1 << 28
_LARGE_CHUNK_SIZE = 1 << 16

_NUM_WARPS = 4
_THREADS = 32 * _NUM_WARPS
# A persistent grid, all of which an SM of 65,536 registers holds at once.
_REGISTERS = 64
_PROGRAMS_PER_SM = 65536 // (_REGISTERS * _THREADS)
_INTERPRETED_PROGRAMS = 3  # enough to walk with a stride and to have a last one

_DTYPES = (tl.float32, tl.bfloat16, tl.float16, tl.float64)  # enum DType
# Where the fields of the tables are, in their words.
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _STEP, _NUMEL = (
    tl.constexpr(word_of(RowStruct, name))
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "numel")
)
_HYPER, _SLOT = (tl.constexpr(getattr(RowStruct, name).offset // 4) for name in ("hyper", "slot"))  # int32
_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _GRAD_SIGN, _LR_ADDRESS = (
    tl.constexpr(word_of(HyperStruct, name))
    for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "grad_sign", "lr_address")
)
_ROW_WORDS, _HYPER_WORDS = (tl.constexpr(words(struct)) for struct in (RowStruct, HyperStruct))
_CHUNK_WORDS = tl.constexpr(2 * words(ChunkStruct))  # int32


class Coefficients(NamedTuple):
    """The numbers that one parameter's update needs: see csrc/adamw.h."""

    grad_scale: tl.tensor
    decay: tl.tensor
    lerp_weight: tl.tensor
    lerp_from_g: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    step_size: tl.tensor
    bias_correction2_sqrt: tl.tensor
    eps: tl.tensor


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
    """THE rule, a block of elements at once, in the order of operations of csrc/adamw.h."""
    g = grad * c.grad_scale
    p = p * c.decay
    m = tl.where(c.lerp_from_g, g, m) + c.lerp_weight * (g - m)
    v = v * c.beta2 + c.one_minus_beta2 * g * g
    v_max = tl.where((v_max > v) | (v_max != v_max), v_max, v)
    p = p - divide(c.step_size * m, divide(square_root(v_max), c.bias_correction2_sqrt) + c.eps)
    return p, m, v, v_max


@triton.jit
def power(x, n):
    """`x ** n` in float64 for n >= 1. log(0) is -inf, so 0 ** n is 0."""
    return tl.exp(n * tl.log(x))


@triton.jit
def coefficients(hyper, step, grad_scale, T: tl.constexpr):
    """Worked out in float64 as Python does, then rounded to T. `step` counts this update: 1 for the first."""
    lr = tl.load(hyper + _LR)
    lr_address = tl.load((hyper + _LR_ADDRESS).to(tl.pointer_type(tl.int64), bitcast=True))
    if lr_address != 0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    beta1 = tl.load(hyper + _BETA1)
    beta2 = tl.load(hyper + _BETA2)
    weight = 1.0 - beta1
    from_g = weight >= 0.5
    return Coefficients(
        grad_scale=(tl.load(hyper + _GRAD_SIGN) * grad_scale).to(T),
        decay=(1.0 - lr * tl.load(hyper + _WEIGHT_DECAY)).to(T),
        lerp_weight=tl.where(from_g, weight - 1.0, weight).to(T),
        lerp_from_g=from_g,
        beta2=beta2.to(T),
        one_minus_beta2=(1.0 - beta2).to(T),
        step_size=(lr / (1.0 - power(beta1, step))).to(T),
        bias_correction2_sqrt=tl.sqrt(1.0 - power(beta2, step)).to(T),
        eps=tl.load(hyper + _EPS).to(T),
    )


@triton.jit
def step_scalars(sums, n_sums, max_grad_norm, grad_scale, found_inf, SKIP_NONFINITE: tl.constexpr):
    """Gradient norm, what gradients are multiplied by, whether to skip the step: as in csrc/adamw.h."""
    norm = tl.full([], 0.0, tl.float64)
    skip = tl.full([], 0, tl.int1)
    loss_scale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        loss_scale = tl.load(grad_scale).to(tl.float64)
    if found_inf is not None:
        skip = tl.load(found_inf) != 0.0
    scale = 1.0 / loss_scale
    if sums is not None:
        i = 0
        while i < n_sums:
            norm += tl.load(sums + i)
            i += 1
        norm = tl.sqrt(norm) / loss_scale
        clip_coef = max_grad_norm / (norm + 1e-6)
        scale *= tl.where(clip_coef > 1.0, 1.0, clip_coef)  # NaN stays NaN
        if SKIP_NONFINITE:
            skip = skip | (norm != norm) | (norm == float("inf"))
    return norm, scale, skip


@triton.jit
def span_of(rows, chunk, chunk_size):
    """The row that a chunk belongs to, the chunk's first element in it and the chunk's number of elements."""
    row = rows + tl.load(chunk).to(tl.int64) * _ROW_WORDS
    start = tl.load(chunk + 1).to(tl.int64) * chunk_size
    return row, start, tl.minimum(tl.load(row + _NUMEL) - start, chunk_size).to(tl.int32)


@triton.jit
def int32_of(row, word):
    """A field of 32 bits of a row."""
    return tl.load(row.to(tl.pointer_type(tl.int32), bitcast=True) + word)


@triton.jit
def grad_of(row, grads):
    """Where the address of a row's gradient is."""
    return grads + int32_of(row, _SLOT)


@triton.jit
def whole_blocks(addresses, start, n, BLOCK: tl.constexpr):
    """How many of the n elements at `start` fill blocks: 0 unless all the addresses are 16-byte aligned."""
    return tl.where((addresses | start) % 16 == 0, n // BLOCK * BLOCK, 0)


@triton.jit
def pointer(address, start, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """To element `start` of a tensor whose address is in a table. VECTOR promises 16-byte alignment."""
    ptr = tl.load(address).to(tl.pointer_type(dtype)) + start
    return tl.multiple_of(ptr, 16) if VECTOR else ptr


@triton.jit
def last_program(workspace):
    """Whether all other programs are done: what they wrote is visible then, and the ticket 0 again."""
    ticket = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.debug_barrier()  # one thread draws the ticket for all threads of the program
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def update_blocks(
    row, grad, start, n, c, P, G, S, AMSGRAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr
):
    """The n elements at `start`. VECTOR: whole blocks at aligned addresses, so that no access is masked."""
    p_ptr = pointer(row + _PARAM, start, P, VECTOR)
    g_ptr = pointer(grad, start, G, VECTOR)
    m_ptr = pointer(row + _EXP_AVG, start, S, VECTOR)
    v_ptr = pointer(row + _EXP_AVG_SQ, start, S, VECTOR)
    v_max_ptr = pointer(row + _MAX_EXP_AVG_SQ, start, S, VECTOR)
    T: tl.constexpr = c.eps.dtype
    i = tl.arange(0, BLOCK)
    while n > 0:
        mask = None if VECTOR else i < n
        p = tl.load(p_ptr + i, mask=mask).to(T)
        g = tl.load(g_ptr + i, mask=mask).to(T)
        m = tl.load(m_ptr + i, mask=mask).to(T)
        v = tl.load(v_ptr + i, mask=mask).to(T)
        v_max = tl.load(v_max_ptr + i, mask=mask).to(T) if AMSGRAD else tl.zeros([BLOCK], T)
        p, m, v, v_max = adamw_update(p, g, m, v, v_max, c)
        tl.store(m_ptr + i, m.to(S), mask=mask)
        tl.store(v_ptr + i, v.to(S), mask=mask)
        if AMSGRAD:
            tl.store(v_max_ptr + i, v_max.to(S), mask=mask)
        tl.store(p_ptr + i, p.to(P), mask=mask)
        p_ptr += BLOCK
        g_ptr += BLOCK
        m_ptr += BLOCK
        v_ptr += BLOCK
        v_max_ptr += BLOCK
        n -= BLOCK


@triton.jit
def update_span(row, grad, start, n, c, P, G, S, AMSGRAD: tl.constexpr, BLOCK: tl.constexpr):
    """The n elements at `start`, as far as possible in whole blocks."""
    addresses = tl.load(row + _PARAM) | tl.load(grad) | tl.load(row + _EXP_AVG)
    addresses |= tl.load(row + _EXP_AVG_SQ) | tl.load(row + _MAX_EXP_AVG_SQ)
    whole = whole_blocks(addresses, start, n, BLOCK)
    update_blocks(row, grad, start, whole, c, P, G, S, AMSGRAD, True, BLOCK)
    # In blocks of another size, lest the compiler share one layout, and shuffle values through it.
    update_blocks(row, grad, start + whole, n - whole, c, P, G, S, AMSGRAD, False, BLOCK // 2)


@triton.jit
def advance_steps(rows, grads, n_rows, BLOCK: tl.constexpr):
    """Count this update in every row that has a gradient."""
    first = 0
    while first < n_rows:
        i = first + tl.arange(0, BLOCK)
        row = rows + i.to(tl.int64) * _ROW_WORDS
        slot = tl.load(row.to(tl.pointer_type(tl.int32), bitcast=True) + _SLOT, mask=i < n_rows, other=0)
        has_grad = tl.load(grads + slot, mask=i < n_rows, other=0) != 0
        step = tl.load(row + _STEP, mask=has_grad, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=has_grad) + 1.0, mask=has_grad)
        first += BLOCK


# One binary for any counts, and for any alignment of the small tensors.
_kernel = triton.jit(
    do_not_specialize=["n_rows", "n_chunks", "chunk_size", "n_sums"],
    do_not_specialize_on_alignment=(
        ["rows", "grads", "chunks", "hypers", "sums", "sum", "grad_scale", "found_inf", "status", "workspace"]
    ),
)


@_kernel
def update_kernel(
    rows,
    n_rows,
    grads,
    chunks,
    n_chunks,
    chunk_size,
    hypers,
    sums,
    n_sums,
    max_grad_norm: tl.float64,
    grad_scale,
    found_inf,
    status,
    workspace,
    SKIP_NONFINITE: tl.constexpr,
    P: tl.constexpr,
    G: tl.constexpr,
    S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step all chunks, unless the step is skipped; the last program then counts it."""
    T: tl.constexpr = tl.float64 if P.is_fp64() else tl.float32
    norm, scale, skip = step_scalars(sums, n_sums, max_grad_norm, grad_scale, found_inf, SKIP_NONFINITE)
    if tl.program_id(0) == 0:
        tl.store(status, norm)
        tl.store(status + 1, tl.load(status + 1) + tl.where(skip, 1.0, 0.0))
    n_chunks = tl.where(skip, 0, n_chunks)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        row, start, n = span_of(rows, chunks + chunk * _CHUNK_WORDS, chunk_size)
        grad = grad_of(row, grads)
        if tl.load(grad) != 0:
            step = tl.load(tl.load(row + _STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            c = coefficients(hypers + int32_of(row, _HYPER) * _HYPER_WORDS, step, scale, T)
            if tl.load(row + _MAX_EXP_AVG_SQ) == 0:
                update_span(row, grad, start, n, c, P, G, S, False, BLOCK)
            else:
                update_span(row, grad, start, n, c, P, G, S, True, BLOCK)
        chunk += tl.num_programs(0)
    if last_program(workspace):
        advance_steps(rows, grads, tl.where(skip, 0, n_rows), BLOCK // 2)


@triton.jit
def sum_blocks(total, grad, start, n, G: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """`total` plus the squares of the n elements at `start`, lane by lane. VECTOR: as in update_blocks."""
    g_ptr = pointer(grad, start, G, VECTOR)
    block = 0
    while block < tl.cdiv(n, BLOCK):
        i = block * BLOCK + tl.arange(0, BLOCK)
        g = (tl.load(g_ptr + i) if VECTOR else tl.load(g_ptr + i, mask=i < n, other=0.0)).to(tl.float64)
        total += g * g
        block += 1
    return total


@_kernel
def norm_kernel(
    rows, grads, chunks, n_chunks, chunk_size, workspace, sum, G: tl.constexpr, BLOCK: tl.constexpr
):
    """Squares summed in float64: one partial sum per chunk, added up by the last program in fixed order."""
    partials = workspace + 1
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        row, start, n = span_of(rows, chunks + chunk * _CHUNK_WORDS, chunk_size)
        total = tl.zeros([BLOCK], tl.float64)
        grad = grad_of(row, grads)
        if tl.load(grad) != 0:
            whole = whole_blocks(tl.load(grad), start, n, BLOCK)
            total = sum_blocks(total, grad, start, whole, G, True, BLOCK)
            total = sum_blocks(total, grad, start + whole, n - whole, G, False, BLOCK)
        tl.store(partials + chunk, tl.sum(total))
        chunk += tl.num_programs(0)
    if last_program(workspace):
        total = tl.zeros([BLOCK], tl.float64)
        first = 0
        while first < n_chunks:
            i = first + tl.arange(0, BLOCK)
            total += tl.load(partials + i, mask=i < n_chunks, other=0.0)
            first += BLOCK
        tl.store(sum, tl.sum(total))


_INTERPRETED = not isinstance(update_kernel, triton.JITFunction)
# No contraction, as the C++ and CUDA kernels are built, for the same numbers.
_OPTIONS = {"num_warps": _NUM_WARPS, "maxnreg": _REGISTERS, "enable_fp_fusion": False}


def _block(*dtypes: tl.dtype) -> int:
    """Elements that a program's threads access at once, 16 bytes of the widest type each.

    With more, the compiler passes values between threads before it stores that type.
    """
    bits: int = max(dtype.primitive_bitwidth for dtype in dtypes)
    return 16 * 8 * _THREADS // bits


@functools.cache
def _multiprocessors(device: int) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _launch(kernel, rows: torch.Tensor, n_chunks: int, args: tuple[object, ...]) -> None:
    if _INTERPRETED:
        kernel[(max(1, min(n_chunks, _INTERPRETED_PROGRAMS)),)](*args)
        return
    device = rows.get_device()
    grid = (max(1, min(n_chunks, _PROGRAMS_PER_SM * _multiprocessors(device))),)
    with torch.cuda.device(device):  # Triton launches on the current device, on its current stream
        kernel[grid](*args, **_OPTIONS)


def why_not(device: torch.device) -> str | None:
    """None if tensors on `device` can be served, else the reason."""
    if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6):
        return f"Triton {triton.__version__} is installed, 3.6 or later is needed"
    if device.type == "cpu":
        return None if _INTERPRETED else "CPU tensors need TRITON_INTERPRET=1 set before Triton is imported"
    if device.type != "cuda":
        return f"no kernels for {device.type} devices"
    if _INTERPRETED:
        return "TRITON_INTERPRET=1 is set, and the interpreter cannot read the memory of a GPU"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def supports(device: torch.device, param: torch.dtype, grad: torch.dtype, state: torch.dtype) -> bool:
    """Whether a kernel can be compiled for a parameter of a dtype, its gradient and its moments of theirs."""
    return {param, grad, state} <= DTYPE_CODE.keys()


def chunk_size(device: torch.device, numel: int = 0) -> int:
    """Elements per chunk that suit the number of elements in all. The norm's last bits depend on it."""
    return CHUNK_SIZE if numel < _LARGE_MODEL else _LARGE_CHUNK_SIZE


def max_host_hypers(device: torch.device) -> int:
    """Up to how many hyper rows may stay in host memory: the kernels read them through a pointer."""
    return 0 if device.type == "cuda" else 1 << 62


def sum_of_squares(t: Tables, chunks: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of squares of the gradients in these chunks of the tables to `out`.

    One launch, deterministic, no sync. Mutates the workspace.
    """
    n_chunks, dtype = chunks.shape[0], _DTYPES[t.dtypes[1]]
    args = (t.rows, t.grads, chunks, n_chunks, t.chunk_size, t.workspace, out, dtype, 2 * _block(dtype))
    _launch(norm_kernel, t.rows, n_chunks, args)


def update(t: Tables, inputs: StepInputs) -> None:
    """Step in place the parameters, moments and step counts of all rows with a gradient. One launch."""
    n_chunks = t.chunks.shape[0]
    dtypes = [_DTYPES[code] for code in t.dtypes]
    tables = (t.rows, t.rows.shape[0], t.grads, t.chunks, n_chunks, t.chunk_size, t.hypers)
    sums = inputs.sums
    norm = (sums, 0 if sums is None else sums.numel(), inputs.max_grad_norm)
    given = (inputs.grad_scale, inputs.found_inf, inputs.status)
    args = (*tables, *norm, *given, t.workspace, inputs.skip_nonfinite, *dtypes, _block(*dtypes))
    _launch(update_kernel, t.rows, n_chunks, args)
