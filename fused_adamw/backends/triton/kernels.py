"""The walks over the tables of csrc/tables.h in Triton: update and norm, twins of the CUDA kernels."""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import NamedTuple

import triton
import triton.language as tl

from ...tables import ChunkStruct, HyperStruct, RowStruct, word_of, words
from .besides import (
    Averaging,
    average_step,
    average_update,
    no_stats,
    observe,
    of_both,
    over_lanes,
    write_stats,
)
from .formats import (
    CODE_BLOCK,
    advance,
    any_noise,
    as_kept,
    elements,
    has_average,
    has_residual,
    is_code,
    kept_as,
    load,
    load_codes,
    register_of,
    store,
    store_codes,
)
from .noise import noise_bits, noise_of, places
from .outcome import Spikes, StepInputs, record, step_scalars
from .rule import Hyper, adamw_update, coefficients

# Where the fields of the tables are, in their words.
_PARAM, _EXP_AVG, _EXP_AVG_SQ, _MAX_EXP_AVG_SQ, _AVERAGE = (
    tl.constexpr(word_of(RowStruct, name))
    for name in ("param", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "average")
)
_STEP, _NUMEL, _ORDINAL, _OFFSET = (
    tl.constexpr(word_of(RowStruct, name)) for name in ("step", "numel", "ordinal", "offset")
)
_HYPER, _SLOT, _LOCAL_COLUMNS, _COLUMNS = (
    tl.constexpr(getattr(RowStruct, name).offset // 4)  # 32 bits
    for name in ("hyper", "slot", "local_columns", "columns")
)
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
def noise_of_row(row, seed, step):
    """What a row's noise is drawn by."""
    columns = row.to(tl.pointer_type(tl.uint32), bitcast=True)
    return noise_of(
        seed,
        tl.load(row + _ORDINAL),
        step,
        tl.load(row + _OFFSET),
        tl.load(columns + _LOCAL_COLUMNS).to(tl.int64),
        tl.load(columns + _COLUMNS).to(tl.int64),
    )


@triton.jit
def move_average(at, i, mask, p, c, noise, F: tl.constexpr):
    """Move elements i of the average, if it moves, towards what is kept of the parameter p."""
    if c.moves:
        average = load(at, i, mask, kept_as(F, 4), p.dtype)
        moved = average_update(average, as_kept(p, noise, kept_as(F, 0)), c)
        store(at, i, mask, moved, noise, kept_as(F, 4))


@triton.jit
def update_vectors(
    span,
    c,
    average,
    noise,
    F: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STATS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step a span. VECTOR: it is whole blocks at aligned addresses, so that no access is masked.

    Returns: What was found out, under STATS.
    """
    p_at = elements(span.row + _PARAM, span.start, kept_as(F, 0), VECTOR)
    g_at = elements(span.grad, span.start, kept_as(F, 1), VECTOR)
    m_at = elements(span.row + _EXP_AVG, span.start, kept_as(F, 2), VECTOR)
    v_at = elements(span.row + _EXP_AVG_SQ, span.start, kept_as(F, 3), VECTOR)
    v_max_at = elements(span.row + _MAX_EXP_AVG_SQ, span.start, kept_as(F, 2), VECTOR)
    if has_average(F):
        average_at = elements(span.row + _AVERAGE, span.start, kept_as(F, 4), VECTOR)
    T: tl.constexpr = c.eps.dtype
    stats = no_stats([BLOCK], T) if STATS else None
    i = tl.arange(0, BLOCK)
    first = span.start
    n = span.n
    while n > 0:
        mask = None if VECTOR else i < n
        p = load(p_at, i, mask, kept_as(F, 0), T)
        g = load(g_at, i, mask, kept_as(F, 1), T)
        m = load(m_at, i, mask, kept_as(F, 2), T)
        v = load(v_at, i, mask, kept_as(F, 3), T)
        v_max = load(v_max_at, i, mask, kept_as(F, 2), T) if AMSGRAD else tl.zeros([BLOCK], T)
        before = p
        p, m, v, v_max = adamw_update(p, g, m, v, v_max, c)
        if STATS:
            stats = observe(stats, before, p, g, mask, kept_as(F, 0))
        bits = noise_bits(noise, places(noise, first + i)) if any_noise(F) else tl.zeros([BLOCK], tl.uint32)
        store(m_at, i, mask, m, bits & 0xFFFF, kept_as(F, 2))
        store(v_at, i, mask, v, bits >> 16, kept_as(F, 3))
        if AMSGRAD:
            store(v_max_at, i, mask, v_max, bits, kept_as(F, 2))
        store(p_at, i, mask, p, bits & 0xFFFF, kept_as(F, 0))
        if has_average(F):
            move_average(average_at, i, mask, p, average, bits & 0xFFFF, F)
            average_at = advance(average_at, BLOCK, kept_as(F, 4))
        p_at = advance(p_at, BLOCK, kept_as(F, 0))
        g_at = advance(g_at, BLOCK, kept_as(F, 1))
        m_at = advance(m_at, BLOCK, kept_as(F, 2))
        v_at = advance(v_at, BLOCK, kept_as(F, 3))
        v_max_at = advance(v_max_at, BLOCK, kept_as(F, 2))
        first += BLOCK
        n -= BLOCK
    return over_lanes(stats) if STATS else no_stats([], T)


@triton.jit
def addresses_of(span, F: tl.constexpr):
    """The bits of all addresses of a row's values, and of what is beside each of them, together."""
    row = span.row
    addresses = tl.load(row + _PARAM) | tl.load(span.grad) | tl.load(row + _EXP_AVG)
    addresses |= tl.load(row + _EXP_AVG_SQ) | tl.load(row + _MAX_EXP_AVG_SQ)
    if has_residual(kept_as(F, 0)):
        addresses |= tl.load(row + _PARAM + 1)
    if has_average(F):
        addresses |= tl.load(row + _AVERAGE)
    return addresses


@triton.jit
def update_span(
    span,
    c,
    average,
    noise,
    F: tl.constexpr,
    AMSGRAD: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step a span, as far as possible in whole blocks. Returns what was found out, under STATS."""
    row, grad, start, n = span
    whole = whole_blocks(addresses_of(span, F), span, BLOCK)
    blocks, rest = Span(row, grad, start, whole), Span(row, grad, start + whole, n - whole)
    of_blocks = update_vectors(blocks, c, average, noise, F, AMSGRAD, STATS, True, BLOCK)
    # In blocks of another size, lest the compiler share one layout, and shuffle values through it.
    of_rest = update_vectors(rest, c, average, noise, F, AMSGRAD, STATS, False, BLOCK // 2)
    return of_both(of_blocks, of_rest) if STATS else of_rest


@triton.jit
def starting_before(column, columns, per_row):
    """How many blocks of codes, from the first of a row of the matrix on, start before a column of it."""
    rows = column // columns
    return (rows * per_row + tl.cdiv(column - rows * columns, CODE_BLOCK)).to(tl.int32)


@triton.jit
def update_code_blocks(
    span,
    c,
    average,
    noise,
    F: tl.constexpr,
    STATS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step the blocks of codes that start in a span. VECTOR: they are whole, and addresses aligned.

    Returns: What was found out, under STATS.
    """
    p_at = elements(span.row + _PARAM, 0, kept_as(F, 0), VECTOR)
    g_at = elements(span.grad, 0, kept_as(F, 1), VECTOR)
    m_at = elements(span.row + _EXP_AVG, 0, kept_as(F, 2), VECTOR)
    v_at = elements(span.row + _EXP_AVG_SQ, 0, kept_as(F, 3), VECTOR)
    if has_average(F):
        average_at = elements(span.row + _AVERAGE, 0, kept_as(F, 4), VECTOR)
    T: tl.constexpr = c.eps.dtype
    stats = no_stats([BLOCK // CODE_BLOCK, CODE_BLOCK], T) if STATS else None
    columns = noise.local_columns
    per_row = tl.cdiv(columns, CODE_BLOCK).to(tl.int32)
    first_row = span.start // columns
    column = span.start - first_row * columns
    block = starting_before(column, columns, per_row)  # numbers count from the first row's first block
    end = starting_before(column + span.n, columns, per_row)
    j = tl.arange(0, CODE_BLOCK)[None, :]
    while block < end:
        number = block + tl.arange(0, BLOCK // CODE_BLOCK)
        is_block = number < end
        row = number // per_row
        from_column = ((number - row * per_row) * CODE_BLOCK).to(tl.int64)
        row = first_row + row
        blocks = first_row * per_row + number
        start = row * columns + from_column
        i = start[:, None] + j
        mask = tl.broadcast_to(is_block[:, None], [BLOCK // CODE_BLOCK, CODE_BLOCK])
        if VECTOR:
            i = tl.multiple_of(start, CODE_BLOCK)[:, None] + j
        else:
            mask &= from_column[:, None] + j < columns
        p = load(p_at, i, mask, kept_as(F, 0), T)
        g = load(g_at, i, mask, kept_as(F, 1), T)
        m = load_codes(m_at, i, mask, blocks, is_block, kept_as(F, 2))
        v = load_codes(v_at, i, mask, blocks, is_block, kept_as(F, 3))
        before = p
        p, m, v, _ = adamw_update(p, g, m, v, tl.zeros_like(v), c)
        if STATS:
            stats = observe(stats, before, p, g, mask, kept_as(F, 0))
        place = (noise.offset + row * noise.columns + from_column)[:, None] + j
        bits = noise_bits(noise, place)
        store(p_at, i, mask, p, bits & 0xFFFF, kept_as(F, 0))
        store_codes(m_at, i, mask, blocks, is_block, m, bits & 0xFFFF, kept_as(F, 2))
        store_codes(v_at, i, mask, blocks, is_block, v, bits >> 16, kept_as(F, 3))
        if has_average(F):
            move_average(average_at, i, mask, p, average, bits & 0xFFFF, F)
        block += BLOCK // CODE_BLOCK
    return over_lanes(stats) if STATS else no_stats([], T)


@triton.jit
def update_coded_span(span, c, average, noise, F: tl.constexpr, STATS: tl.constexpr, BLOCK: tl.constexpr):
    """Step the blocks of codes that start in a span. Returns what was found out, under STATS."""
    if (addresses_of(span, F) % 16 == 0) & (noise.local_columns % CODE_BLOCK == 0):
        stats = update_code_blocks(span, c, average, noise, F, STATS, True, BLOCK)
    else:
        stats = update_code_blocks(span, c, average, noise, F, STATS, False, BLOCK)
    return stats


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
    do_not_specialize=[
        *("n_rows", "n_chunks", "chunk_size", "n_sums", "seed", "spike_window", "spike_warmup"),
        *("average_warmup", "average_start", "average_every"),
    ],
    do_not_specialize_on_alignment=[
        *("rows", "grads", "chunks", "hypers", "sums", "sum", "grad_scale", "found_inf", "status", "loss"),
        *("stats", "workspace"),
    ],
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
    seed: tl.uint64,
    status,
    loss,
    spike_sigmas: tl.float64,
    spike_window,
    spike_warmup,
    average_decay: tl.float64,
    average_warmup,
    average_start,
    average_every,
    stats,
    workspace,
    SKIP_NONFINITE: tl.constexpr,
    SPIKES: tl.constexpr,
    CLIPS: tl.constexpr,
    F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step all chunks, unless the step is skipped; the last program then counts it, and says what it was."""
    T: tl.constexpr = register_of(kept_as(F, 0))
    STATS: tl.constexpr = stats is not None
    table = Table(rows, grads, chunks, chunk_size)
    spikes = Spikes(spike_sigmas, spike_window, spike_warmup, loss)
    inputs = StepInputs(sums, n_sums, max_grad_norm, grad_scale, found_inf, status, spikes)
    averaging = Averaging(average_decay, average_warmup, average_start, average_every)
    scalars = step_scalars(inputs, SKIP_NONFINITE, SPIKES, CLIPS)
    n_chunks = tl.where(scalars.skip, 0, n_chunks)
    chunk = tl.program_id(0)
    while chunk < n_chunks:
        span = span_of(table, chunk)
        if tl.load(span.grad) != 0:
            count = tl.load(tl.load(span.row + _STEP).to(tl.pointer_type(tl.float32)))
            step = (count + 1.0).to(tl.float64)  # as it will be kept: in float32 it stands still at 2^24
            c = coefficients(hyper_of(span.row, hypers), step, scalars.grad_scale, T)
            noise = noise_of_row(span.row, seed, step) if any_noise(F) else None
            average = (
                average_step(averaging, tl.load(span.row + _AVERAGE), step, T) if has_average(F) else None
            )
            if is_code(kept_as(F, 2)):
                found = update_coded_span(span, c, average, noise, F, STATS, BLOCK)
                if STATS:
                    write_stats(stats, chunk, found, T)
            else:
                if tl.load(span.row + _MAX_EXP_AVG_SQ) == 0:
                    found = update_span(span, c, average, noise, F, False, STATS, BLOCK)
                else:
                    found = update_span(span, c, average, noise, F, True, STATS, BLOCK)
                if STATS:
                    write_stats(stats, chunk, found, T)
        chunk += tl.num_programs(0)
    if last_program(workspace):
        record(inputs, scalars, SPIKES)
        advance_steps(rows, grads, tl.where(scalars.skip, 0, n_rows), BLOCK // 2)


@triton.jit
def sum_blocks(total, span, F: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """`total` plus the squares of a span's gradients, lane by lane. VECTOR: as in update_blocks."""
    g_at = elements(span.grad, span.start, F, VECTOR)
    block = 0
    while block < tl.cdiv(span.n, BLOCK):
        i = block * BLOCK + tl.arange(0, BLOCK)
        g = load(g_at, i, None if VECTOR else i < span.n, F, tl.float64)
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
