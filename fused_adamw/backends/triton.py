"""The rule and the norm in Triton, on the tables of csrc/tables.h: the twin of csrc/adamw.h and of its kernels.

Serves CUDA devices without a compiler at hand, and CPU tensors in Triton's interpreter (`TRITON_INTERPRET=1`).
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-untyped-decorators, allow-any-generics

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Elements per chunk: as much per thread as the 65,536 for 512 threads of torch's multi-tensor kernels. Large enough
# to hide the walk through the tables, small enough that the last wave of chunks is short.
CHUNK_SIZE = 16384

_NUM_WARPS = 4
_THREADS = 32 * _NUM_WARPS
# Elements per inner iteration of the norm: two 16-byte loads per thread in bf16, four in fp32.
_NORM_BLOCK = 16 * _THREADS
# Programs that fit an SM at once, so that all of a persistent grid run together: 80 registers x 128 threads.
_UPDATE_REGISTERS = 80
_UPDATE_PROGRAMS_PER_SM = 6
_NORM_PROGRAMS_PER_SM = 8
_INTERPRETED_PROGRAMS = 3  # enough to walk with a stride and to have a last program

_DTYPES = (tl.float32, tl.bfloat16, tl.float16, tl.float64)  # enum DType

_ROW_WORDS = tl.constexpr(8)
_CHUNK_WORDS = tl.constexpr(2)
_HYPER_WORDS = tl.constexpr(7)


class Row(NamedTuple):  # noqa: D101 - struct Row of csrc/tables.h
    param: tl.tensor
    grad: tl.tensor
    exp_avg: tl.tensor
    exp_avg_sq: tl.tensor
    max_exp_avg_sq: tl.tensor
    step: tl.tensor
    numel: tl.tensor
    hyper: tl.tensor


class Coefficients(NamedTuple):  # noqa: D101 - struct Coefficients of csrc/adamw.h
    grad_scale: tl.tensor
    decay: tl.tensor
    lerp_weight: tl.tensor
    lerp_from_g: tl.tensor
    beta2: tl.tensor
    one_minus_beta2: tl.tensor
    step_size: tl.tensor
    bias_correction2_sqrt: tl.tensor
    eps: tl.tensor


# The rule ------------------------------------------------------------------------------------------------------------


@triton.jit
def square_root(x):
    """Square root, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def divide(x, y):
    """Quotient, correctly rounded: a plain `/` of float32 is not."""
    if x.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def adamw_update(p, grad, m, v, v_max, c):
    """THE rule, one block of elements: see `adamw_update` in csrc/adamw.h, whose order of operations this is."""
    g = grad * c.grad_scale
    p = p * c.decay
    m = tl.where(c.lerp_from_g, g, m) + c.lerp_weight * (g - m)
    v = v * c.beta2 + c.one_minus_beta2 * g * g
    v_max = tl.where((v_max > v) | (v_max != v_max), v_max, v)
    p = p - divide(c.step_size * m, divide(square_root(v_max), c.bias_correction2_sqrt) + c.eps)
    return p, m, v, v_max


@triton.jit
def power(x, n):
    """`x ** n` in float64, for n >= 1: log(0) = -inf makes 0 ** n = 0."""
    return tl.exp(n * tl.log(x))


@triton.jit
def coefficients(hyper, step, grad_scale, T: tl.constexpr):
    """The numbers that one parameter's update needs, worked out in float64, then rounded to T."""
    lr = tl.load(hyper)
    lr_address = tl.load((hyper + 6).to(tl.pointer_type(tl.int64), bitcast=True))
    if lr_address != 0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    beta1 = tl.load(hyper + 1)
    beta2 = tl.load(hyper + 2)
    weight = 1.0 - beta1
    from_g = weight >= 0.5
    return Coefficients(
        grad_scale=(tl.load(hyper + 5) * grad_scale).to(T),
        decay=(1.0 - lr * tl.load(hyper + 4)).to(T),
        lerp_weight=tl.where(from_g, weight - 1.0, weight).to(T),
        lerp_from_g=from_g,
        beta2=beta2.to(T),
        one_minus_beta2=(1.0 - beta2).to(T),
        step_size=(lr / (1.0 - power(beta1, step))).to(T),
        bias_correction2_sqrt=tl.sqrt(1.0 - power(beta2, step)).to(T),
        eps=tl.load(hyper + 3).to(T),
    )


@triton.jit
def step_scalars(sums, n_sums, max_grad_norm, grad_scale, found_inf, SKIP_NONFINITE: tl.constexpr):
    """Gradient norm, what gradients are multiplied by, whether the step is skipped: `step_scalars` of adamw.h."""
    norm = tl.full([], 0.0, tl.float64)
    skip = tl.full([], 0, tl.int1)
    loss_scale = tl.full([], 1.0, tl.float64)
    if grad_scale is not None:
        loss_scale = tl.load(grad_scale).to(tl.float64)
    scale = 1.0 / loss_scale
    if found_inf is not None:
        skip = tl.load(found_inf) != 0.0
    if sums is not None:
        i = 0
        while i < n_sums:
            norm += tl.load(sums + i)
            i += 1
        norm = tl.sqrt(norm) / loss_scale
        clip_coef = max_grad_norm / (norm + 1e-6)
        scale *= tl.where(clip_coef > 1.0, 1.0, clip_coef)  # a NaN stays
        if SKIP_NONFINITE:
            skip = skip | (norm != norm) | (norm == float("inf"))
    return norm, scale, skip


# The tables ----------------------------------------------------------------------------------------------------------


@triton.jit
def load_span(rows, chunk, chunk_size):
    """The row that a chunk is of, and the chunk's first element and number of elements in it."""
    row = rows + tl.load(chunk).to(tl.int64) * _ROW_WORDS
    row = Row(
        param=tl.load(row),
        grad=tl.load(row + 1),
        exp_avg=tl.load(row + 2),
        exp_avg_sq=tl.load(row + 3),
        max_exp_avg_sq=tl.load(row + 4),
        step=tl.load(row + 5),
        numel=tl.load(row + 6),
        hyper=tl.load(row + 7),
    )
    start = tl.load(chunk + 1).to(tl.int64) * chunk_size
    return row, start, tl.minimum(row.numel - start, chunk_size)


@triton.jit
def whole_blocks(addresses, start, n, BLOCK: tl.constexpr):
    """How many of n elements at `start` lie in whole blocks: none where an address is not 16-byte aligned."""
    return tl.where((addresses | start) % 16 == 0, n // BLOCK * BLOCK, 0)


@triton.jit
def last_program(workspace):
    """Whether all other programs are done. What they wrote is then visible, and the ticket 0 again."""
    ticket = workspace.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.debug_barrier()  # one thread draws the ticket for all threads of the program
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == tl.num_programs(0) - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def pointer(address, start, dtype: tl.constexpr, VECTOR: tl.constexpr):
    """To element `start`. VECTOR: it is 16-byte aligned, which the compiler cannot know of an address in a table."""
    ptr = address.to(tl.pointer_type(dtype)) + start
    if VECTOR:
        ptr = tl.multiple_of(ptr, 16)
    return ptr


# The kernels ---------------------------------------------------------------------------------------------------------


@triton.jit
def update_blocks(row, start, n, c, P, G, S, AMSGRAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """The n elements at `start`. VECTOR: these are whole blocks at aligned addresses."""
    p_ptr = pointer(row.param, start, P, VECTOR)
    g_ptr = pointer(row.grad, start, G, VECTOR)
    m_ptr = pointer(row.exp_avg, start, S, VECTOR)
    v_ptr = pointer(row.exp_avg_sq, start, S, VECTOR)
    v_max_ptr = pointer(row.max_exp_avg_sq, start, S, VECTOR)
    T: tl.constexpr = c.eps.dtype
    block = 0
    while block < tl.cdiv(n, BLOCK):
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = None if VECTOR else i < n
        p = tl.load(p_ptr + i, mask=mask).to(T)
        g = tl.load(g_ptr + i, mask=mask).to(T)
        m = tl.load(m_ptr + i, mask=mask).to(T)
        v = tl.load(v_ptr + i, mask=mask).to(T)
        v_max = tl.load(v_max_ptr + i, mask=mask).to(T) if AMSGRAD else tl.zeros([BLOCK], T)
        p, m, v, v_max = adamw_update(p, g, m, v, v_max, c)
        tl.store(p_ptr + i, p.to(P), mask=mask)
        tl.store(m_ptr + i, m.to(S), mask=mask)
        tl.store(v_ptr + i, v.to(S), mask=mask)
        if AMSGRAD:
            tl.store(v_max_ptr + i, v_max.to(S), mask=mask)
        block += 1


@triton.jit
def update_span(row, start, n, c, P, G, S, AMSGRAD: tl.constexpr, BLOCK: tl.constexpr):
    """The n elements at `start`: whole blocks without masks where addresses allow, the rest with."""
    addresses = row.param | row.grad | row.exp_avg | row.exp_avg_sq | row.max_exp_avg_sq
    whole = whole_blocks(addresses, start, n, BLOCK)
    update_blocks(row, start, whole, c, P, G, S, AMSGRAD, True, BLOCK)
    # Blocks of another size, lest the compiler wants one layout for both.
    update_blocks(row, start + whole, n - whole, c, P, G, S, AMSGRAD, False, BLOCK // 2)


@triton.jit
def advance_steps(rows, n_rows, BLOCK: tl.constexpr):
    """Count this update in every row that has a gradient."""
    first = 0
    while first < n_rows:
        i = first + tl.arange(0, BLOCK)
        row = rows + i.to(tl.int64) * _ROW_WORDS
        mask = i < n_rows
        mask = mask & (tl.load(row + 1, mask=mask, other=0) != 0)
        step = tl.load(row + 5, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        tl.store(step, tl.load(step, mask=mask) + 1.0, mask=mask)
        first += BLOCK


_kernel = triton.jit(
    # Compile once for any counts and any alignment of the small tensors.
    do_not_specialize=["n_rows", "n_chunks", "chunk_size", "n_sums"],
    do_not_specialize_on_alignment=[
        "rows", "chunks", "hypers", "sums", "sum", "grad_scale", "found_inf", "status", "workspace",
    ],
)


@_kernel
def update_kernel(
    rows,
    n_rows,
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
    """One step of every chunk. The last program writes the status and advances the step counts: one launch."""
    T: tl.constexpr = tl.float64 if P == tl.float64 else tl.float32
    norm, scale, skip = step_scalars(sums, n_sums, max_grad_norm, grad_scale, found_inf, SKIP_NONFINITE)
    n_chunks = tl.where(skip, 0, n_chunks)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        row, start, n = load_span(rows, chunks + chunk * _CHUNK_WORDS, chunk_size)
        if row.grad != 0:
            step = tl.load(row.step.to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            c = coefficients(hypers + row.hyper * _HYPER_WORDS, step, scale, T)
            if row.max_exp_avg_sq == 0:
                update_span(row, start, n, c, P, G, S, False, BLOCK)
            else:
                update_span(row, start, n, c, P, G, S, True, BLOCK)
        chunk += tl.num_programs(0)
    if last_program(workspace):
        tl.store(status, norm)
        if skip:
            tl.store(status + 1, tl.load(status + 1) + 1.0)
        else:
            advance_steps(rows, n_rows, BLOCK)


@triton.jit
def sum_blocks(total, grad, start, n, G: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """`total` and the squares of the n elements at `start`, lane by lane. VECTOR: as in update_blocks."""
    g_ptr = pointer(grad, start, G, VECTOR)
    block = 0
    while block < tl.cdiv(n, BLOCK):
        i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        g = tl.load(g_ptr + i) if VECTOR else tl.load(g_ptr + i, mask=i < n, other=0.0)
        g = g.to(tl.float64)
        total += g * g
        block += 1
    return total


@_kernel
def norm_kernel(rows, chunks, n_chunks, chunk_size, workspace, sum, G: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the squares of all gradients, in float64: one partial sum per program, which the last adds up.

    The order is fixed: the same grid makes the same sum.
    """
    total = tl.zeros([BLOCK], tl.float64)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        row, start, n = load_span(rows, chunks + chunk * _CHUNK_WORDS, chunk_size)
        if row.grad != 0:
            whole = whole_blocks(row.grad, start, n, BLOCK)
            total = sum_blocks(total, row.grad, start, whole, G, True, BLOCK)
            total = sum_blocks(total, row.grad, start + whole, n - whole, G, False, BLOCK)
        chunk += tl.num_programs(0)
    partials = workspace + 1
    tl.store(partials + tl.program_id(0), tl.sum(total))
    if last_program(workspace):
        total = tl.zeros([BLOCK], tl.float64)
        first = 0
        while first < tl.num_programs(0):
            i = first + tl.arange(0, BLOCK)
            total += tl.load(partials + i, mask=i < tl.num_programs(0), other=0.0)
            first += BLOCK
        tl.store(sum, tl.sum(total))


# The operators -------------------------------------------------------------------------------------------------------

_INTERPRETED = not isinstance(update_kernel, triton.JITFunction)


def _update_block(*dtypes: tl.dtype) -> int:
    """Elements per inner iteration: one 16-byte access per thread to the tensors of the widest type.

    More would make the compiler move values between threads before it stores that type.
    """
    return 16 * _THREADS * 8 // max(dtype.primitive_bitwidth for dtype in dtypes)


@functools.cache
def _multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel, programs_per_sm: int, rows: torch.Tensor, n_chunks: int, *args, **options) -> None:
    if _INTERPRETED:
        kernel[(max(1, min(n_chunks, _INTERPRETED_PROGRAMS)),)](*args)
        return
    device = rows.get_device()
    grid = (max(1, min(n_chunks, programs_per_sm * _multiprocessors(device))),)
    with torch.cuda.device(device):  # Triton launches on the current device, on its current stream
        # No contraction: the same numbers as the C++ and CUDA kernels, which are built without it.
        kernel[grid](*args, num_warps=_NUM_WARPS, enable_fp_fusion=False, **options)


def why_not(device: torch.device) -> str | None:
    """None if tensors on `device` can be served, else the reason."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < (3, 6):
        return f"Triton {triton.__version__} is too old: 3.6 or later is needed"
    if device.type == "cpu":
        return None if _INTERPRETED else "CPU tensors need TRITON_INTERPRET=1 set before Triton is imported"
    if device.type != "cuda":
        return f"no kernels for {device.type} devices"
    if _INTERPRETED:
        return "TRITON_INTERPRET=1 is set: the interpreter reads the memory of the CPU alone"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None


def sum_of_squares(
    rows: torch.Tensor,
    chunks: torch.Tensor,
    chunk_size: int,
    grad_dtype: int,
    workspace: torch.Tensor,
    sum: torch.Tensor,
) -> None:
    """Write the sum of the squares of all gradients of a table to `sum`.

    No host synchronisation; deterministic; 0 for rows without a gradient.

    Args:
        rows: int64 [n_rows, 8], `struct Row` of csrc/tables.h.
        chunks: int32 [n_chunks, 2], `struct Chunk`.
        chunk_size: elements per chunk.
        grad_dtype: `enum DType` of the gradients.
        workspace: float64 [1 + n_chunks], mutated. Its first 4 bytes are 0 before and after.
        sum: float64, at least one element; the first is written.
    """
    n_chunks = chunks.shape[0]
    _launch(
        norm_kernel, _NORM_PROGRAMS_PER_SM, rows, n_chunks,
        rows, chunks, n_chunks, chunk_size, workspace, sum, _DTYPES[grad_dtype], _NORM_BLOCK,
    )


def update(
    rows: torch.Tensor,
    chunks: torch.Tensor,
    chunk_size: int,
    hypers: torch.Tensor,
    param_dtype: int,
    grad_dtype: int,
    state_dtype: int,
    sums: torch.Tensor | None,
    max_grad_norm: float,
    skip_nonfinite: bool,
    grad_scale: torch.Tensor | None,
    found_inf: torch.Tensor | None,
    status: torch.Tensor,
    workspace: torch.Tensor,
) -> None:
    """Step every row of a table that has a gradient: parameters, moments and step counts, in place. One launch.

    All tensors are on the device of `rows`, and contiguous. No host synchronisation.

    Args:
        rows: int64 [n_rows, 8], `struct Row` of csrc/tables.h: the addresses of what is mutated.
        chunks: int32 [n_chunks, 2], `struct Chunk`.
        chunk_size: elements per chunk.
        hypers: float64 [n_hypers, 7], `struct Hyper`; the last column holds the bits of an address.
        param_dtype: `enum DType` of the parameters.
        grad_dtype: `enum DType` of the gradients.
        state_dtype: `enum DType` of the moments.
        sums: float64 [n_sums], sums of squares that add up to the squared norm; None: no norm, no clipping.
        max_grad_norm: clip to this norm; infinity: do not clip. Read where `sums` is given.
        skip_nonfinite: skip the step where the norm is not finite.
        grad_scale: float32, one element: the loss scale that the gradients still carry.
        found_inf: float32, one element: not 0 skips the step.
        status: float64 [2], mutated: the gradient norm; += 1 if the step was skipped.
        workspace: float64 [1 + n_chunks], mutated. Its first 4 bytes are 0 before and after.
    """
    n_chunks = chunks.shape[0]
    p, g, s = _DTYPES[param_dtype], _DTYPES[grad_dtype], _DTYPES[state_dtype]
    _launch(
        update_kernel, _UPDATE_PROGRAMS_PER_SM, rows, n_chunks,
        rows, rows.shape[0], chunks, n_chunks, chunk_size, hypers,
        sums, 0 if sums is None else sums.numel(), max_grad_norm, grad_scale, found_inf, status, workspace,
        skip_nonfinite, p, g, s, _update_block(p, g, s), maxnreg=_UPDATE_REGISTERS,
    )
