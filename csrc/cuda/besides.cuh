// CUDA: what a step may do besides the rule: find out norms of chunks, and move the average.
#pragma once

#include "../average.h"
#include "../stats.h"
#include "elements.cuh"

namespace fused_adamw {
namespace {

// The parameter before and after the step, in registers. A layout that has no use for it keeps none.
template <typename T, int N, bool kIsKept>
struct Change {
  T before[N], after[N];

  __device__ __forceinline__ void put(int k, T p_before, T p_after) {
    before[k] = p_before;
    after[k] = p_after;
  }
};
template <typename T, int N>
struct Change<T, N, false> {
  __device__ __forceinline__ void put(int, T, T) {}
};

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return as_bits(x) & 0x7fffffff; }
__device__ __forceinline__ uint64_t magnitude_bits(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffffffffff;
}

// What some threads find out about a chunk.
template <typename T>
struct Stats {
  using MagnitudeBits = decltype(magnitude_bits(T()));
  double grad_squares, update_squares, param_squares;
  MagnitudeBits grad_max;  // as integers, NaN > infinity > finite
  int32_t lost_updates;

  __device__ __forceinline__ void add(T before, T after, T g, bool is_bfloat16) {
    const T update = after - before;
    const double wide_g = g, wide_update = update, wide_p = after;
    grad_squares += wide_g * wide_g;
    update_squares += wide_update * wide_update;
    param_squares += wide_p * wide_p;
    const MagnitudeBits magnitude = magnitude_bits(g);
    grad_max = magnitude > grad_max ? magnitude : grad_max;
    if constexpr (sizeof(T) == sizeof(float)) lost_updates += is_bfloat16 && is_lost(before, update);
  }

  __device__ __forceinline__ void add(const Stats& other) {
    grad_squares += other.grad_squares;
    update_squares += other.update_squares;
    param_squares += other.param_squares;
    grad_max = other.grad_max > grad_max ? other.grad_max : grad_max;
    lost_updates += other.lost_updates;
  }

  // Those of another thread of the warp.
  __device__ __forceinline__ Stats shuffled(int offset) const {
    return {__shfl_xor_sync(0xffffffff, grad_squares, offset),
            __shfl_xor_sync(0xffffffff, update_squares, offset),
            __shfl_xor_sync(0xffffffff, param_squares, offset), __shfl_xor_sync(0xffffffff, grad_max, offset),
            __shfl_xor_sync(0xffffffff, lost_updates, offset)};
  }

  __device__ __forceinline__ ChunkStats of_chunk() const {
    T largest;
    memcpy(&largest, &grad_max, sizeof largest);
    return {grad_squares, static_cast<double>(largest), update_squares, param_squares,
            static_cast<double>(lost_updates)};
  }
};

// Writes those of all threads of the block together.
template <typename T>
__device__ __forceinline__ void write_stats(Stats<T> stats, ChunkStats* to) {
  __shared__ Stats<T> of_warps[kThreads / 32];
  for (int offset = 16; offset; offset /= 2) stats.add(stats.shuffled(offset));
  __syncthreads();  // the last chunk's have been read
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = stats;
  __syncthreads();
  if (threadIdx.x) return;
  for (int warp = 1; warp < kThreads / 32; ++warp) stats.add(of_warps[warp]);
  *to = stats.of_chunk();
}

// What is asked of the update of a chunk. Here, nothing.
template <typename L, bool = L::kBesides>
struct Besides {
  __device__ __forceinline__ Besides(const UpdateArgs&, const Row&, double) {}
  template <int N>
  __device__ __forceinline__ bool is_aligned(int64_t) const {
    return true;
  }
  template <int kStride, typename... T>
  __device__ __forceinline__ void after(T&&...) {}
  __device__ __forceinline__ void finish(const UpdateArgs&, int64_t) const {}
};

template <typename L>
struct Besides<L, true> {
  using T = typename L::Param::Register;
  bool has_stats, moves_average;
  FormatCode format;  // of the average
  Field average;
  AverageStep<T> step;
  Stats<T> stats;

  // `weight`: of the average at this step.
  __device__ __forceinline__ Besides(const UpdateArgs& args, const Row& row, double weight)
      : has_stats(args.stats),
        moves_average(row.average.values && weight != 0.0),
        format(args.formats.average),
        average(row.average),
        step(AverageStep<T>::of(weight)),
        stats{} {}

  // Calls f with the format of the average.
  template <typename F>
  __device__ __forceinline__ void visit(const F& f) const {
    if constexpr (sizeof(T) == sizeof(double)) {
      f(Float64());
    } else if (format == kStochasticBFloat16) {
      f(StochasticBFloat16());
    } else {
      f(Float32());
    }
  }

  // Whether the average is, from element i on, if it is touched at all.
  template <int N>
  __device__ __forceinline__ bool is_aligned(int64_t i) const {
    bool is = true;
    if (moves_average) {
      visit([&](auto format) { is = Place<decltype(format)>(average, i).template is_aligned<N>(); });
    }
    return is;
  }

  // For N elements that have been stored, `n` of which count, each kStride after the one before. `place`: of
  // the first, for noise; `load(&neighbours, place)` and `store(place, neighbours)` move those of the
  // average, whose first element is at that place.
  template <int kStride, int N, typename Load, typename Store>
  __device__ __forceinline__ void after(const Elements<L, N>& x, const Change<T, N, true>& change, int n,
                                        const Noise<true>& noise, uint64_t place, const Load& load,
                                        const Store& store) {
    if (has_stats) {
#pragma unroll
      for (int k = 0; k < N; ++k) {
        if (k < n) stats.add(change.before[k], change.after[k], x.g.get(k), is_bfloat16(L::Param::kCode));
      }
    }
    if (!moves_average) return;
    visit([&](auto format) {
      const Place<decltype(format)> at(average, 0);
      Neighbours<decltype(format), N> moved;
      load(&moved, at);
#pragma unroll
      for (int k = 0; k < N; ++k) {
        T a = moved.get(k);
        // What is kept of a parameter in two halves is all of it: nothing to decode.
        average_update(a, L::Param::kSide == kSidePerValue ? change.after[k] : x.p.get(k), step);
        moved.put(k, a, decltype(format)::kTakesNoise ? noise.at(place + k * kStride) & 0xffff : 0);
      }
      store(at, moved);
    });
  }

  // Writes what was found out about chunk i, if it is asked for. To be called by whole blocks.
  __device__ __forceinline__ void finish(const UpdateArgs& args, int64_t i) const {
    if (has_stats) write_stats(stats, args.stats + i);
  }
};

}  // namespace
}  // namespace fused_adamw
