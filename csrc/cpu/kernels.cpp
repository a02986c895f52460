// CPU: walk chunks, call the rule; sums of squares of chunks. Compiled once per instruction set, so nothing
// here may be shared with another translation unit: everything sits in an unnamed namespace and the standard
// library's templates are not used.
#include "kernels.h"

#include <string.h>

#include "../adamw.h"
#include "blocks.h"

#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY Baseline
#endif
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace fused_adamw {
namespace {

// What the update of a row reads and writes.
struct Operands {
  Operand<ParamFormats> p;
  Operand<PlainFormats> g;
  Operand<ExpAvgFormats> m;
  Operand<ExpAvgSqFormats> v;
  Operand<ExpAvgFormats> v_max;  // under amsgrad
};

// The elements of a block. The format of each tensor is chosen here, block by block: every combination of
// formats takes the same loop over the rule.
template <typename Walk, bool kAmsgrad, typename T = typename Walk::T>
ADAMW_FN void update_block(const Operands& at, const Block& block, const Coefficients<T>& c) {
  alignas(64) T buffers[5][Walk::kSize];
  T* const p = load_block<kWrite, Walk>(at.p, block, buffers[0]);
  T* const g = load_block<kRead, Walk>(at.g, block, buffers[1]);
  T* const m = load_block<kWrite, Walk>(at.m, block, buffers[2]);
  T* const v = load_block<kWrite, Walk>(at.v, block, buffers[3]);
  T* const v_max = kAmsgrad ? load_block<kWrite, Walk>(at.v_max, block, buffers[4]) : nullptr;
  IeeeMath math;
// Values on their way are locals: through references to memory, each step of the rule would be stored.
#pragma GCC ivdep
  for (int64_t k = 0; k < block.n; ++k) {
    T p_k = p[k], m_k = m[k], v_k = v[k], v_max_k = kAmsgrad ? v_max[k] : T(0);
    adamw_update(p_k, g[k], m_k, v_k, v_max_k, c, math);
    p[k] = p_k;
    m[k] = m_k;
    v[k] = v_k;
    if (kAmsgrad) v_max[k] = v_max_k;
  }
  store_block<Walk>(at.m, block, m);
  store_block<Walk>(at.v, block, v, 16);
  if (kAmsgrad) store_block<Walk>(at.v_max, block, v_max);
  store_block<Walk>(at.p, block, p);
}

// Elements of a row that a chunk covers.
struct Span {
  int64_t begin, end;
};

ADAMW_FN Span span_of(const Table& table, const Row& row, const Chunk& chunk) {
  const int64_t begin = chunk.index * table.chunk_size, left = row.numel - begin;
  return {begin, begin + (left < table.chunk_size ? left : table.chunk_size)};
}

// What the update of a part of a row takes besides the part.
template <typename T>
struct RowUpdate {
  Operands at;
  Coefficients<T> c;
  RowNoise noise;
};

template <bool kNoise, typename T>
ADAMW_FN RowUpdate<T> update_of(const UpdateArgs& args, const Row& row, const Coefficients<T>& c,
                                float step) {
  RowUpdate<T> x;
  x.at = {{args.formats.param, row.param},
          {args.formats.grad, {args.table.grads[row.slot], 0}},
          {args.formats.exp_avg, row.exp_avg},
          {args.formats.exp_avg_sq, row.exp_avg_sq},
          {args.formats.exp_avg, row.max_exp_avg_sq}};
  x.c = c;
  if constexpr (kNoise) {
    const uint64_t word = noise_word(args.inputs.seed, row.ordinal);
    x.noise = {noise_key(word, static_cast<uint64_t>(step)), row.offset, row.local_columns, row.columns};
  }
  return x;
}

template <typename T, bool kAmsgrad, bool kNoise>
void update_span(const UpdateArgs& args, const Row& row, const Span& span, const Coefficients<T>& c,
                 float step) {
  constexpr int64_t kSize = kNoise ? kNoiseBlock : kBlock;
  using W = Walk<T, kSize, kNoise>;
  const RowUpdate<T> x = update_of<kNoise>(args, row, c, step);  // copies that no store can alias
  alignas(64) uint32_t noise[kSize];
  int64_t i = span.begin;
  const int64_t end = span.end;
  for (; i + kSize <= end; i += kSize) {
    if (kNoise) draw(x.noise, i, kSize, noise);
    update_block<W, kAmsgrad>(x.at, {i, kSize, 0, noise}, x.c);
  }
  if (kNoise) draw(x.noise, i, end - i, noise);
  update_block<W, kAmsgrad>(x.at, {i, end - i, 0, noise}, x.c);
}

// The blocks of codes that start in the span, whole. Each row of the tensor is cut from its start on.
void update_codes(const UpdateArgs& args, const Row& row, const Span& span, const Coefficients<float>& c,
                  float step) {
  using W = Walk<float, kCodeBlock, true>;
  const RowUpdate<float> x = update_of<true>(args, row, c, step);
  const int64_t columns = row.local_columns, per_row = (columns + kCodeBlock - 1) / kCodeBlock;
  alignas(64) uint32_t noise[kCodeBlock];
  int64_t line = span.begin / columns, block = (span.begin % columns + kCodeBlock - 1) / kCodeBlock;
  for (;; ++block) {
    if (block == per_row) ++line, block = 0;
    const int64_t begin = line * columns + block * kCodeBlock, left = columns - block * kCodeBlock;
    if (begin >= span.end) return;
    const int64_t n = left < kCodeBlock ? left : kCodeBlock, side = line * per_row + block;
    if (n == kCodeBlock) {
      draw(x.noise, begin, kCodeBlock, noise);
      update_block<W, false>(x.at, {begin, kCodeBlock, side, noise}, x.c);
    } else {
      draw(x.noise, begin, n, noise);
      update_block<W, false>(x.at, {begin, n, side, noise}, x.c);
    }
  }
}

template <typename T>
using Update = void (*)(const UpdateArgs&, const Row&, const Span&, const Coefficients<T>&, float step);

// With and without amsgrad.
template <typename T>
struct Updates {
  Update<T> with_maximum, without;
};

template <typename T, bool kNoise>
constexpr Updates<T> kSpans = {update_span<T, true, kNoise>, update_span<T, false, kNoise>};

template <typename T>
void update_rows(const UpdateArgs& args, double grad_scale, int64_t begin, int64_t end,
                 const Updates<T>& updates) {
  Coefficients<T> c{};
  // Neighbouring rows mostly share a group and a step count: keep what was worked out.
  int64_t hyper = -1;
  float step = -1.0f;
  for (int64_t i = begin; i < end; ++i) {
    const Row& row = args.table.rows[args.table.chunks[i].row];
    if (!args.table.grads[row.slot]) continue;
    const float row_step = *reinterpret_cast<const float*>(row.step) + 1.0f;
    if (row.hyper != hyper || row_step != step) {
      hyper = row.hyper;
      step = row_step;
      c = coefficients<T>(args.hypers[hyper], step, grad_scale);
    }
    const Span span = span_of(args.table, row, args.table.chunks[i]);
    (row.max_exp_avg_sq.values ? updates.with_maximum : updates.without)(args, row, span, c, step);
  }
}

void update_chunks(const UpdateArgs& args, double grad_scale, int64_t begin, int64_t end) {
  if (args.formats.param == kFloat64) {
    update_rows<double>(args, grad_scale, begin, end, kSpans<double, false>);
  } else if (have_blocks(args.formats)) {
    update_rows<float>(args, grad_scale, begin, end, {update_codes, update_codes});  // no maximum there
  } else if (take_noise(args.formats)) {
    update_rows<float>(args, grad_scale, begin, end, kSpans<float, true>);
  } else {
    update_rows<float>(args, grad_scale, begin, end, kSpans<float, false>);
  }
}

// Squares are summed in double: no overflow for any float32 gradient, and far below float32's rounding. Each
// lane sums every 32nd square, and the lanes are summed as a tree: the same order for all instruction sets.
template <typename T>
double sum_of_squares(const Operand<PlainFormats>& g, const Span& span) {
  // Sums of a vector type stay in registers; those in an array of doubles do not.
  typedef double Doubles __attribute__((vector_size(kRegisterBytes)));
  constexpr int64_t kLanes = 32;
  using W = Walk<T, kLanes, false>;
  constexpr int64_t kWidth = kRegisterBytes / sizeof(double);
  alignas(64) T buffer[kLanes];
  Doubles sums[kLanes / kWidth] = {};
  int64_t i = span.begin;
  for (; i + kLanes <= span.end; i += kLanes) {
    const T* x = load_block<kRead, W>(g, {i, kLanes, 0, nullptr}, buffer);
    // Widening reads from memory: GCC takes a register apart element by element.
    asm("" : "+r"(x) : : "memory");
#pragma GCC unroll 16
    for (Doubles& sum : sums) {
      Doubles wide;
#pragma GCC unroll 8
      for (int64_t lane = 0; lane < kWidth; ++lane) wide[lane] = *x++;
      sum += wide * wide;
    }
  }
  double lanes[kLanes];
  memcpy(lanes, sums, sizeof lanes);
  const T* const rest = load_block<kRead, W>(g, {i, span.end - i, 0, nullptr}, buffer);
  for (int64_t lane = 0; i + lane < span.end; ++lane) {
    lanes[lane] += static_cast<double>(rest[lane]) * static_cast<double>(rest[lane]);
  }
  for (int64_t width = kLanes / 2; width; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename T>
void norm_rows(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Row& row = args.table.rows[args.table.chunks[i].row];
    const Span span = span_of(args.table, row, args.table.chunks[i]);
    const uint64_t grad = args.table.grads[row.slot];
    args.partials[i] = grad ? sum_of_squares<T>({args.grad, {grad, 0}}, span) : 0.0;
  }
}

void norm_chunks(const NormArgs& args, int64_t begin, int64_t end) {
  if (args.grad == kFloat64) {
    norm_rows<double>(args, begin, end);
  } else {
    norm_rows<float>(args, begin, end);
  }
}

}  // namespace

extern const CpuKernels CONCAT(kCpuKernels, CPU_CAPABILITY) = {STRING(CPU_CAPABILITY), update_chunks,
                                                               norm_chunks};

}  // namespace fused_adamw
