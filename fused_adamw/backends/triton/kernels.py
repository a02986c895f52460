"""The walks over the tables of csrc/tables.h in Triton: update and norm, twins of the CUDA kernels."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl

from ...tables import ChunkStruct, HyperStruct, RowStruct, word_of, words
from .formats import elements, load, register_of, store
from .rule import Hyper, StepInputs, adamw_update, coefficients, step_scalars

# Where the fields of the tables are, in their words.
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _STEP, _NUMEL = (
    tl.constexpr(word_of(RowStruct, name))
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step", "numel")
)
_HYPER, _SLOT = (tl.constexpr(getattr(RowStruct, name).offset // 4) for name in ("hyper", "slot"))  # int32
_LR, _BETA1, _BETA2, _EPS, _WEIGHT_DECAY, _LR_ADDRESS = (
    tl.constexpr(word_of(HyperStruct, name))
    for name in ("lr", "beta1", "beta2", "eps", "weight_decay", "lr_address")
)
_DECAY_POWER, _CAUTIOUS, _NESTEROV, _GRAD_SIGN = (
    tl.constexpr(getattr(HyperStruct, name).offset // 4)  # int32
    for name in ("decay_power", "cautious", "nesterov", "grad_sign")
)
_ROW_WORDS, _HYPER_WORDS = (tl.constexpr(words(struct)) for struct in (RowStruct, HyperStruct))
_CHUNK_WORDS = tl.constexpr(2 * words(ChunkStruct))  # int32


class Table(NamedTuple):
    """What both walks read."""

    rows: tl.tensor
    grads: tl.tensor
    chunks: tl.tensor
    chunk_size: tl.tensor


class Span(NamedTuple):
    """Neighbours in one parameter: its row, where its gradient's address is, n elements from `start` on."""

    row: tl.tensor
    grad: tl.tensor
    start: tl.tensor
    n: tl.tensor


@triton.jit
def int32_of(row, word):
    """A field of 32 bits of a row."""
    return tl.load(row.to(tl.pointer_type(tl.int32), bitcast=True) + word)


@triton.jit
def span_of(table, chunk):
    """The elements of a chunk."""
    chunk_ptr = table.chunks + chunk * _CHUNK_WORDS
    row = table.rows + tl.load(chunk_ptr).to(tl.int64) * _ROW_WORDS
    start = tl.load(chunk_ptr + 1).to(tl.int64) * table.chunk_size
    n = tl.minimum(tl.load(row + _NUMEL) - start, table.chunk_size).to(tl.int32)
    return Span(row, table.grads + int32_of(row, _SLOT), start, n)


@triton.jit
def whole_blocks(addresses, span, BLOCK: tl.constexpr):
    """How many elements of a span fill blocks: 0 unless all the addresses are 16-byte aligned."""
    return tl.where((addresses | span.start) % 16 == 0, span.n // BLOCK * BLOCK, 0)


@triton.jit
def hyper_of(row, hypers):
    """How a row's group is stepped."""
    hyper = hypers + int32_of(row, _HYPER) * _HYPER_WORDS
    lr = tl.load(hyper + _LR)
    lr_address = tl.load((hyper + _LR_ADDRESS).to(tl.pointer_type(tl.int64), bitcast=True))
    if lr_address != 0:
        lr = tl.load(lr_address.to(tl.pointer_type(tl.float32))).to(tl.float64)
    return Hyper(
        lr=lr,
        beta1=tl.load(hyper + _BETA1),
        beta2=tl.load(hyper + _BETA2),
        eps=tl.load(hyper + _EPS),
        weight_decay=tl.load(hyper + _WEIGHT_DECAY),
        decay_power=int32_of(hyper, _DECAY_POWER),
        cautious=int32_of(hyper, _CAUTIOUS),
        nesterov=int32_of(hyper, _NESTEROV),
        grad_sign=int32_of(hyper, _GRAD_SIGN),
    )


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
def update_blocks(span, c, F: tl.constexpr, AMSGRAD: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """Step a span. VECTOR: it is whole blocks at aligned addresses, so that no access is masked."""
    p_ptr = elements(span.row + _PARAM, span.start, F.param, VECTOR)
    g_ptr = elements(span.grad, span.start, F.grad, VECTOR)
    m_ptr = elements(span.row + _EXP_AVG, span.start, F.exp_avg, VECTOR)
    v_ptr = elements(span.row + _EXP_AVG_SQ, span.start, F.exp_avg_sq, VECTOR)
    v_max_ptr = elements(span.row + _MAX_EXP_AVG_SQ, span.start, F.exp_avg, VECTOR)
    T: tl.constexpr = c.eps.dtype
    i = tl.arange(0, BLOCK)
    n = span.n
    while n > 0:
        mask = None if VECTOR else i < n
        p = load(p_ptr, i, mask, T)
        g = load(g_ptr, i, mask, T)
        m = load(m_ptr, i, mask, T)
        v = load(v_ptr, i, mask, T)
        v_max = load(v_max_ptr, i, mask, T) if AMSGRAD else tl.zeros([BLOCK], T)
        p, m, v, v_max = adamw_update(p, g, m, v, v_max, c)
        store(m_ptr, i, mask, m)
        store(v_ptr, i, mask, v)
        if AMSGRAD:
            store(v_max_ptr, i, mask, v_max)
        store(p_ptr, i, mask, p)
        p_ptr += BLOCK
        g_ptr += BLOCK
        m_ptr += BLOCK
        v_ptr += BLOCK
        v_max_ptr += BLOCK
        n -= BLOCK


@triton.jit
def update_span(span, c, F: tl.constexpr, AMSGRAD: tl.constexpr, BLOCK: tl.constexpr):
    """Step a span, as far as possible in whole blocks."""
    row, grad, start, n = span
    addresses = tl.load(row + _PARAM) | tl.load(grad) | tl.load(row + _EXP_AVG)
    addresses |= tl.load(row + _EXP_AVG_SQ) | tl.load(row + _MAX_EXP_AVG_SQ)
    whole = whole_blocks(addresses, span, BLOCK)
    update_blocks(Span(row, grad, start, whole), c, F, AMSGRAD, True, BLOCK)
    # In blocks of another size, lest the compiler share one layout, and shuffle values through it.
    update_blocks(Span(row, grad, start + whole, n - whole), c, F, AMSGRAD, False, BLOCK // 2)


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


# One binary for any counts, and for any alignment of the small tensors. Triton applies neither to members of
# a tuple, nor a type: so arguments come one by one, and are put in named tuples here.
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
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step all chunks, unless the step is skipped; the last program then counts it."""
    T: tl.constexpr = register_of(F.param)
    table = Table(rows, grads, chunks, chunk_size)
    inputs = StepInputs(sums, n_sums, max_grad_norm, grad_scale, found_inf)
    norm, scale, skip = step_scalars(inputs, SKIP_NONFINITE)
    if tl.program_id(0) == 0:
        tl.store(status, norm)
        tl.store(status + 1, tl.load(status + 1) + tl.where(skip, 1.0, 0.0))
    n_chunks = tl.where(skip, 0, n_chunks)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        span = span_of(table, chunk)
        if tl.load(span.grad) != 0:
            step = tl.load(tl.load(span.row + _STEP).to(tl.pointer_type(tl.float32))).to(tl.float64) + 1.0
            c = coefficients(hyper_of(span.row, hypers), step, scale, T)
            if tl.load(span.row + _MAX_EXP_AVG_SQ) == 0:
                update_span(span, c, F, False, BLOCK)
            else:
                update_span(span, c, F, True, BLOCK)
        chunk += tl.num_programs(0)
    if last_program(workspace):
        advance_steps(rows, grads, tl.where(skip, 0, n_rows), BLOCK // 2)


@triton.jit
def sum_blocks(total, span, F: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """`total` plus the squares of a span's gradients, lane by lane. VECTOR: as in update_blocks."""
    g_ptr = elements(span.grad, span.start, F, VECTOR)
    block = 0
    while block < tl.cdiv(span.n, BLOCK):
        i = block * BLOCK + tl.arange(0, BLOCK)
        g = load(g_ptr, i, None if VECTOR else i < span.n, tl.float64)
        total += g * g
        block += 1
    return total


@_kernel
def norm_kernel(
    rows, grads, chunks, n_chunks, chunk_size, workspace, sum, F: tl.constexpr, BLOCK: tl.constexpr
):
    """Squares summed in float64: one partial sum per chunk, added up by the last program in fixed order."""
    partials = workspace + 1
    table = Table(rows, grads, chunks, chunk_size)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        row, grad, start, n = span_of(table, chunk)
        span = Span(row, grad, start, n)
        total = tl.zeros([BLOCK], tl.float64)
        if tl.load(grad) != 0:
            whole = whole_blocks(tl.load(grad), span, BLOCK)
            total = sum_blocks(total, Span(row, grad, start, whole), F, True, BLOCK)
            total = sum_blocks(total, Span(row, grad, start + whole, n - whole), F, False, BLOCK)
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
