// CPU: what a step may do besides the rule, block by block: find out norms, and move the average. Compiled
// once per instruction set, like the walk.
#pragma once

#include "../average.h"
#include "../stats.h"
#include "squares.h"

namespace fused_adamw {
namespace {

// A sum of squares in double: each lane sums every 16th square, the same order for all instruction sets.
struct SquareSum {
  static constexpr int64_t kLanes = 16, kRegisters = kLanes / kWideWidth;
  Doubles lanes[kRegisters] = {};

  // The lanes are summed as a tree.
  double total() const {
    double sums[kLanes];
    memcpy(sums, lanes, sizeof sums);
    for (int64_t width = kLanes / 2; width; width /= 2) {
      for (int64_t lane = 0; lane < width; ++lane) sums[lane] += sums[lane + width];
    }
    return sums[0];
  }
};

// What is found out about a chunk.
struct Stats {
  bool sums_grad;  // not where the norm pass has: widening to double is what takes time
  SquareSum grad, update, param;
  uint64_t largest = 0;  // magnitude of the gradient, by its bits
  int64_t lost = 0;
};

template <typename T>
struct Register;
template <>
struct Register<float> {
  using Type = uint32_t;
  using Format = Float32;
};
template <>
struct Register<double> {
  using Type = uint64_t;
  using Format = Float64;
};

// The largest magnitude, by bits, which order magnitudes, and NaN above them.
template <typename T>
ADAMW_FN uint64_t largest_of(const T* x, int64_t n) {
  using Bits = typename Register<T>::Type;
  Bits largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    Bits bits;
    memcpy(&bits, x + i, sizeof bits);
    bits = bits << 1 >> 1;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// Adds the squares of SquareSum::kLanes neighbours.
template <typename T>
ADAMW_FN void add_squares(SquareSum& sum, const T* x) {
  using Format = typename Register<T>::Format;
#pragma GCC unroll 8
  for (int64_t k = 0; k < SquareSum::kRegisters; ++k) {
    sum.lanes[k] = add_square<Format>(sum.lanes[k], Wide<Format>::load(x + k * kWideWidth));
  }
}

// Adds a block of n elements. `before` is the parameter before the step; it is overwritten.
template <typename T>
void observe_block(Stats& stats, T* before, const T* p, const T* g, int64_t n, bool counts_lost) {
  constexpr int64_t kLanes = SquareSum::kLanes;
  const uint64_t largest = largest_of(g, n);
  stats.largest = largest > stats.largest ? largest : stats.largest;
  int32_t lost = 0;
  if constexpr (sizeof(T) == sizeof(float)) {
    if (counts_lost) {
      for (int64_t i = 0; i < n; ++i) lost += is_lost(before[i], p[i] - before[i]);
    }
  }
  stats.lost += lost;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) before[i] = p[i] - before[i];
  Stats sums = stats;  // in registers
  const bool sums_grad = stats.sums_grad;
  const auto add = [&](const T* g, const T* update, const T* p) __attribute__((always_inline)) {
    if (sums_grad) add_squares(sums.grad, g);
    add_squares(sums.update, update);
    add_squares(sums.param, p);
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) add(g + i, before + i, p + i);
  if (i < n) {
    T rest[3][kLanes] = {};
    memcpy(rest[0], g + i, (n - i) * sizeof(T));
    memcpy(rest[1], before + i, (n - i) * sizeof(T));
    memcpy(rest[2], p + i, (n - i) * sizeof(T));
    add(rest[0], rest[1], rest[2]);
  }
  stats = sums;
}

template <typename T>
ADAMW_FN ChunkStats chunk_stats(const Stats& stats) {
  const auto bits = static_cast<typename Register<T>::Type>(stats.largest);
  T largest;
  memcpy(&largest, &bits, sizeof largest);
  return {stats.grad.total(), static_cast<double>(largest), stats.update.total(), stats.param.total(),
          static_cast<double>(stats.lost)};
}

// What is asked of the update of a part of a row.
template <typename T>
struct Besides {
  Stats* stats;        // null: not asked for
  bool is_bfloat16;    // what the parameter is kept in
  bool moves_average;  // towards the parameter, now
  AverageStep<T> average;
};

// Moves the average of a block that has been stored, towards what is kept of the parameter.
template <typename Walk, typename T = typename Walk::T>
ADAMW_FN void move_average(const Operand<ParamFormats>& param, const Operand<AverageFormats>& at,
                           const Block& block, const AverageStep<T>& c) {
  alignas(64) T buffers[2][Walk::kSize];
  const T* const p = load_block<kRead, Walk>(param, block, buffers[0]);
  T* const average = load_block<kWrite, Walk>(at, block, buffers[1]);
#pragma GCC ivdep
  for (int64_t k = 0; k < block.n; ++k) average_update(average[k], p[k], c);
  store_block<Walk>(at, block, average);
}

}  // namespace
}  // namespace fused_adamw
