// CPU: walk chunks, call the rule; sums of squares of chunks. Compiled once per instruction set, so nothing
// here may be shared with another translation unit: everything sits in an unnamed namespace and the standard
// library's templates are not used.
#include "kernels.h"

#include <string.h>

#include "../adamw.h"
#include "besides.h"
#include "blocks.h"
#include "math.h"
#include "squares.h"

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
  Operand<AverageFormats> average;
};

// Calls f with the coefficients, and what the rule chooses by is a constant in them: a loop for each case, as
// compilers make of small loops by themselves. Mostly parameters decay alike, whatever the update does.
template <typename T, typename F>
ADAMW_FN void with_choices(const Coefficients<T>& c, const F& f) {
  Coefficients<T> constant = c;
  const auto call = [&](bool nesterov, bool lerp_from_g) __attribute__((always_inline)) {
    constant.nesterov = nesterov;
    constant.lerp_from_g = lerp_from_g;
    f(constant);
  };
  if (!c.nesterov && !c.lerp_from_g && c.decay == c.decay_against) {
    constant.decay_against = constant.decay;
    call(false, false);
  } else if (c.nesterov) {
    c.lerp_from_g ? call(true, true) : call(true, false);
  } else {
    c.lerp_from_g ? call(false, true) : call(false, false);
  }
}

// The elements of a block. The format of each tensor is chosen here, block by block: every combination of
// formats takes the same loop over the rule.
template <typename Walk, bool kAmsgrad, typename T = typename Walk::T>
ADAMW_FN void update_block(const Operands& at, const Block& block, const Coefficients<T>& c,
                           const CpuMath<T>& math, const Besides<T>& besides) {
  alignas(64) T buffers[5][Walk::kSize], before[Walk::kSize];
  T* const p = load_block<kWrite, Walk>(at.p, block, buffers[0]);
  T* const g = load_block<kRead, Walk>(at.g, block, buffers[1]);
  T* const m = load_block<kWrite, Walk>(at.m, block, buffers[2]);
  T* const v = load_block<kWrite, Walk>(at.v, block, buffers[3]);
  T* const v_max = kAmsgrad ? load_block<kWrite, Walk>(at.v_max, block, buffers[4]) : nullptr;
  if (besides.stats) memcpy(before, p, block.n * sizeof(T));
  with_choices(c, [&](const Coefficients<T>& constant) __attribute__((always_inline)) {
// Values on their way are locals: through references to memory, each step of the rule would be stored.
#pragma GCC ivdep
    for (int64_t k = 0; k < block.n; ++k) {
      T p_k = p[k], m_k = m[k], v_k = v[k], v_max_k = kAmsgrad ? v_max[k] : T(0);
      adamw_update(p_k, g[k], m_k, v_k, v_max_k, constant, math);
      p[k] = p_k;
      m[k] = m_k;
      v[k] = v_k;
      if (kAmsgrad) v_max[k] = v_max_k;
    }
  });
  store_block<Walk>(at.m, block, m);
  store_block<Walk>(at.v, block, v, 16);
  if (kAmsgrad) store_block<Walk>(at.v_max, block, v_max);
  store_block<Walk>(at.p, block, p);
  if (besides.stats) observe_block(*besides.stats, before, p, g, block.n, besides.is_bfloat16);
  if (besides.moves_average) move_average<Walk>(at.p, at.average, block, besides.average);
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
  CpuMath<T> math;
  Besides<T> besides;
  RowNoise noise;
};

template <bool kNoise, typename T>
ADAMW_FN RowUpdate<T> update_of(const UpdateArgs& args, const Row& row, const Coefficients<T>& c, float step,
                                Stats* stats) {
  RowUpdate<T> x;
  x.at = {{args.formats.param, row.param},
          {args.formats.grad, {args.table.grads[row.slot], 0}},
          {args.formats.exp_avg, row.exp_avg},
          {args.formats.exp_avg_sq, row.exp_avg_sq},
          {args.formats.exp_avg, row.max_exp_avg_sq},
          {args.formats.average, row.average}};
  x.c = c;
  const double weight = row.average.values ? average_weight(args.inputs.averaging, step) : 0.0;
  x.besides = {stats, is_bfloat16(args.formats.param), weight != 0.0, AverageStep<T>::of(weight)};
  x.math = CpuMath<T>::of(c.bias_correction2_sqrt);
  if constexpr (kNoise) {
    const uint64_t word = noise_word(args.inputs.seed, row.ordinal);
    const FormatCodes high = {args.formats.param, args.formats.grad, args.formats.exp_avg, kFloat32,
                              args.formats.average};
    x.noise = {noise_key(word, static_cast<uint64_t>(step)), row.offset, row.local_columns, row.columns,
               !take_noise(high)};
  }
  return x;
}

template <typename T, bool kAmsgrad, bool kNoise>
void update_span(const UpdateArgs& args, const Row& row, const Span& span, const Coefficients<T>& c,
                 float step, Stats* stats) {
  constexpr int64_t kSize = kNoise ? kNoiseBlock : kBlock;
  using W = Walk<T, kSize, kNoise>;
  const RowUpdate<T> x = update_of<kNoise>(args, row, c, step, stats);  // copies that no store can alias
  const auto walk = [&](const Besides<T>& besides) __attribute__((always_inline)) {
    alignas(64) uint32_t noise[kSize];
    int64_t i = span.begin;
    const int64_t end = span.end;
    for (; i + kSize <= end; i += kSize) {
      if (kNoise) draw(x.noise, i, kSize, noise);
      update_block<W, kAmsgrad>(x.at, {i, kSize, 0, noise}, x.c, x.math, besides);
    }
    if (kNoise) draw(x.noise, i, end - i, noise);
    update_block<W, kAmsgrad>(x.at, {i, end - i, 0, noise}, x.c, x.math, besides);
  };
  // Mostly nothing is asked for: a loop of its own leaves the update its registers.
  if (x.besides.stats || x.besides.moves_average) {
    walk(x.besides);
  } else {
    walk({});
  }
}

// The blocks of codes that start in the span, whole. Each row of the tensor is cut from its start on.
void update_codes(const UpdateArgs& args, const Row& row, const Span& span, const Coefficients<float>& c,
                  float step, Stats* stats) {
  using W = Walk<float, kCodeBlock, true>;
  const RowUpdate<float> x = update_of<true>(args, row, c, step, stats);
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
      update_block<W, false>(x.at, {begin, kCodeBlock, side, noise}, x.c, x.math, x.besides);
    } else {
      draw(x.noise, begin, n, noise);
      update_block<W, false>(x.at, {begin, n, side, noise}, x.c, x.math, x.besides);
    }
  }
}

template <typename T>
using Update = void (*)(const UpdateArgs&, const Row&, const Span&, const Coefficients<T>&, float step,
                        Stats*);

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
    const auto update = row.max_exp_avg_sq.values ? updates.with_maximum : updates.without;
    if (args.stats) {
      Stats stats{!args.inputs.sums};
      update(args, row, span, c, step, &stats);
      args.stats[i] = chunk_stats<T>(stats);
    } else {
      update(args, row, span, c, step, nullptr);
    }
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

// How many chunks are read in turn, a few lines of each. Intel's processors read several streams faster than
// one, AMD's do not.
constexpr int64_t kMostStreams = 4;
constexpr int64_t kTurn = 256;

int64_t streams() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") ? kMostStreams : 1;
#else
  return 1;
#endif
}

void norm_chunks(const NormArgs& args, int64_t begin, int64_t end) {
  const Table& table = args.table;
  const int64_t most = streams();
  for (int64_t first = begin; first < end; first += most) {
    const int64_t n = end - first < most ? end - first : most;
    Squares squares[kMostStreams];
    int64_t longest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Chunk& chunk = table.chunks[first + i];
      const Row& row = table.rows[chunk.row];
      const uint64_t grad = table.grads[row.slot];
      const Span span = grad ? span_of(table, row, chunk) : Span{};
      squares[i] = {{args.grad, {grad, 0}}, span.begin, span.end, {}};
      longest = span.end - span.begin > longest ? span.end - span.begin : longest;
    }
    const int64_t turn = n == 1 ? longest : kTurn;
    for (int64_t done = 0; done < longest; done += turn) {
      for (int64_t i = 0; i < n; ++i) squares[i].add(turn);
    }
    for (int64_t i = 0; i < n; ++i) args.partials[first + i] = squares[i].total();
  }
}

}  // namespace

extern const CpuKernels CONCAT(kCpuKernels, CPU_CAPABILITY) = {STRING(CPU_CAPABILITY), update_chunks,
                                                               norm_chunks};

}  // namespace fused_adamw
