// CUDA: the update of parameters of one format, FUSED_ADAMW_PARAM. No torch: plain nvcc compiles this file.
#include "../adamw.h"
#include "elements.cuh"
#include "fast_math.h"
#include "kernels.h"
#include "switches.h"

namespace fused_adamw {
namespace {

// The first element is at `place` in the whole tensor, each other kStride after the one before.
template <bool kAmsgrad, int kStride, typename L, int N, typename T, typename Math>
__device__ __forceinline__ void update_elements(Elements<L, N>& x, const Coefficients<T>& c, Math& math,
                                                const Noise<L::kTakesNoise>& noise, uint64_t place) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T p = x.p.get(k), m = x.m.get(k), v = x.v.get(k);
    T v_max = kAmsgrad ? x.v_max.get(k) : T(0);
    adamw_update<T>(p, x.g.get(k), m, v, v_max, c, math);
    const uint32_t bits = noise.at(place + k * kStride);
    x.p.put(k, p, bits & 0xffff);
    x.m.put(k, m, bits & 0xffff);
    x.v.put(k, v, bits >> 16);
    if (kAmsgrad) x.v_max.put(k, v_max, 0);
  }
}

// Fills x by `load` and applies the rule to it.
template <bool kAmsgrad, int kStride, typename L, int N, typename T, typename Load>
__device__ __forceinline__ void load_and_update(Elements<L, N>& x, const Load& load, const Coefficients<T>& c,
                                                const Noise<L::kTakesNoise>& noise, uint64_t place) {
  constexpr bool kFast = FUSED_ADAMW_FAST_MATH && sizeof(T) == sizeof(float);
  load();
  std::conditional_t<kFast, FastMath, IeeeMath> math;
  update_elements<kAmsgrad, kStride>(x, c, math, noise, place);
  if constexpr (kFast) {
    if (!math.exact) {  // from memory again: registers that kept the elements would be spilled
      load();
      IeeeMath ieee;
      update_elements<kAmsgrad, kStride>(x, c, ieee, noise, place);
    }
  }
}

// Steps the n elements from `start` of a span on, N at a time. The span begins with element `first` of its
// row.
template <int N, bool kAmsgrad, typename L, typename T>
__device__ __forceinline__ void update_vectors(const Places<L>& at, int64_t first, int start, int n,
                                               const Coefficients<T>& c, const Noise<L::kTakesNoise>& noise) {
  for (int i = start + threadIdx.x * N; i < start + n; i += kThreads * N) {
    Elements<L, N> x;
    const auto load_all = [&] {
      load(&x.p, at.p, i);
      load(&x.g, at.g, i);
      load(&x.m, at.m, i);
      load(&x.v, at.v, i);
      if (kAmsgrad) load(&x.v_max, at.v_max, i);
    };
    load_and_update<kAmsgrad, 1>(x, load_all, c, noise, noise.place(first + i));
    store(at.p, i, x.p);
    store(at.m, i, x.m);
    store(at.v, i, x.v);
    if (kAmsgrad) store(at.v_max, i, x.v_max);
  }
}

// The widest type of a row moves in whole 16-byte vectors, and narrower ones in as many elements:
// neighbouring threads then touch neighbouring bytes of every tensor, so each sector of memory moves once.
// Rows that are not aligned for that, and what a chunk leaves over, go element by element.
template <bool kAmsgrad, typename L, typename T>
__device__ __forceinline__ void update_span(const Row& row, uint64_t grad, const Span& span,
                                            const Coefficients<T>& c, const Noise<L::kTakesNoise>& noise) {
  constexpr int N = kVectorBytes / L::kWidest;
  const Places<L> at(row, grad, kAmsgrad, span.start);
  const bool vectors = at.p.template is_aligned<N>() && at.g.template is_aligned<N>() &&
                       at.m.template is_aligned<N>() && at.v.template is_aligned<N>() &&
                       at.v_max.template is_aligned<N>() && noise.template keeps_neighbours<N>(span.start);
  const int n = vectors ? span.n / N * N : 0;
  update_vectors<N, kAmsgrad>(at, span.start, 0, n, c, noise);
  update_vectors<1, kAmsgrad>(at, span.start, n, span.n - n, c, noise);
}

// Steps the blocks of codes that start in a span. A warp, or a part of it, has a block, each thread N values:
// neighbours where kVectors, else such that threads touch neighbours.
template <bool kVectors, int N, typename L, typename T>
__device__ __forceinline__ void update_blocks(const Places<L>& at, const CodeBlocks& blocks,
                                              const Coefficients<T>& c, const Noise<true>& noise) {
  constexpr int kLanes = kCodeBlock / N, kStride = kVectors ? 1 : kLanes;
  const int lane = threadIdx.x % kLanes, first = kVectors ? lane * N : lane;
  // Whole warps go on until their last block is done: threads exchange values.
  for (int i = threadIdx.x / 32 * (32 / kLanes); i < blocks.n; i += kThreads / kLanes) {
    const CodeBlock block = blocks.at(i + threadIdx.x % 32 / kLanes);
    const int valid = block.n > first ? (block.n - first + kStride - 1) / kStride : 0;  // or more than N
    const int64_t start = block.start + first;
    Elements<L, N> x;
    const auto load_all = [&] {
      load_some<kStride>(&x.p, at.p, start, block, valid);
      load_some<kStride>(&x.g, at.g, start, block, valid);
      load_some<kStride>(&x.m, at.m, start, block, valid);
      load_some<kStride>(&x.v, at.v, start, block, valid);
    };
    const uint64_t place = noise.place(block.row, block.column + first);
    load_and_update<false, kStride>(x, load_all, c, noise, place);
    store_some<kStride>(at.p, start, block, valid, x.p);
    x.m.template encode<kLanes>(valid, [&](int k) { return noise.at(place + k * kStride) & 0xffff; });
    store_some<kStride>(at.m, start, block, valid, x.m);
    x.v.template encode<kLanes>(valid, [&](int k) { return noise.at(place + k * kStride) >> 16; });
    store_some<kStride>(at.v, start, block, valid, x.v);
  }
}

template <typename L, typename T>
__device__ __forceinline__ void update_coded_span(const Row& row, uint64_t grad, const Span& span,
                                                  const Coefficients<T>& c, const Noise<true>& noise) {
  constexpr int N = kVectorBytes / L::kWidest;
  const Places<L> at(row, grad, false, 0);
  const CodeBlocks blocks(row, span);
  const bool vectors = blocks.columns % N == 0 && at.p.template is_aligned<N>() &&
                       at.g.template is_aligned<N>() && at.m.template is_aligned<N>() &&
                       at.v.template is_aligned<N>();
  if (vectors) {
    update_blocks<true, N>(at, blocks, c, noise);
  } else {
    update_blocks<false, kCodeBlock / 32>(at, blocks, c, noise);
  }
}

struct UpdateParams {
  UpdateArgs args;  // hypers: null where the table is here
  Hyper hypers[kMaxInlineHypers];
};
static_assert(sizeof(UpdateParams) <= 4096, "kernel parameters are limited to 4 KiB");

// Doubles take twice the registers, and what layouts that are not plain have besides needs more of them: one
// block fewer, up to 128 registers.
template <typename L>
constexpr int kBlocksPerProcessor = L::kIsPlain && sizeof(typename L::Param::Register) < sizeof(double)
                                        ? FUSED_ADAMW_BLOCKS_PER_PROCESSOR
                                        : FUSED_ADAMW_BLOCKS_PER_PROCESSOR - 1;

template <typename L>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<L>)
    update_kernel(const __grid_constant__ UpdateParams params) {
  using T = typename L::Param::Register;
  __shared__ StepScalars scalars;
  // Neighbouring rows mostly share a group and a step count: what was worked out last, and for which.
  __shared__ Coefficients<T> shared_coefficients;
  __shared__ int32_t hyper;
  __shared__ float step;
  const UpdateArgs& args = params.args;

  // Double precision is slow on many GPUs: one thread works the scalars out for its block.
  if (threadIdx.x == 0) {
    hyper = -1;  // none
    scalars = step_scalars(args.inputs);
    if (blockIdx.x == 0) {
      args.inputs.status[0] = scalars.grad_norm;
      if (scalars.skip) args.inputs.status[1] += 1.0;
    }
  }
  __syncthreads();
  if (scalars.skip) return;

  Coefficients<T> c{};
  for (int64_t i = blockIdx.x; i < args.table.n_chunks; i += gridDim.x) {
    const Chunk chunk = args.table.chunks[FUSED_ADAMW_REVERSE_UPDATE ? args.table.n_chunks - 1 - i : i];
    const Row& row = args.table.rows[chunk.row];
    const uint64_t grad = args.table.grads[row.slot];
    if (!grad) continue;
    const float row_step = *reinterpret_cast<const float*>(row.step) + 1.0f;
    if (row.hyper != hyper || row_step != step) {
      __syncthreads();  // the last ones have been read
      if (threadIdx.x == 0) {
        hyper = row.hyper;
        step = row_step;
        const Hyper h = args.hypers ? args.hypers[hyper] : params.hypers[hyper];
        shared_coefficients = coefficients<T>(h, step, scalars.grad_scale);
      }
      __syncthreads();
      c = shared_coefficients;
    }
    const Span span = span_of(args.table, row, chunk);
    const Noise<L::kTakesNoise> noise(row, args.inputs.seed, row_step);
    if constexpr (L::kHasCodes) {
      update_coded_span<L>(row, grad, span, c, noise);
    } else if (row.max_exp_avg_sq.values) {
      update_span<true, L>(row, grad, span, c, noise);
    } else {
      update_span<false, L>(row, grad, span, c, noise);
    }
  }

  // Every block has read the step counts by now.
  if (!last_block(args.ticket)) return;
  for (int64_t i = threadIdx.x; i < args.table.n_rows; i += kThreads) {
    const Row& row = args.table.rows[i];
    if (args.table.grads[row.slot]) *reinterpret_cast<float*>(row.step) += 1.0f;
  }
}

}  // namespace

template <>
const char* launch_update_of<FUSED_ADAMW_PARAM>(const UpdateArgs& args, bool hypers_on_host, int device,
                                                void* stream) {
  UpdateParams params{args, {}};
  if (hypers_on_host) {
    if (args.n_hypers > kMaxInlineHypers) return "too many hypers for a table on the host";
    for (int64_t i = 0; i < args.n_hypers; ++i) params.hypers[i] = args.hypers[i];
    params.args.hypers = nullptr;
  }
  const char* failure = nullptr;
  CudaLayouts::visit(args.formats, [&](auto layout) {
    using L = decltype(layout);
    if constexpr (std::is_same_v<typename L::Param, FUSED_ADAMW_PARAM>) {
      failure = launch<update_kernel<L>>(params, args.table, device, stream);
    }
  });
  return failure;
}

}  // namespace fused_adamw
