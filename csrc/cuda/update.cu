// CUDA: the update of parameters of one format, FUSED_ADAMW_PARAM. No torch: plain nvcc compiles this file.
#include "../adamw.h"
#include "../outcome.h"
#include "besides.cuh"
#include "fast_math.h"
#include "kernels.h"
#include "switches.h"

namespace fused_adamw {
namespace {

// A bool that compilers know.
template <bool kValue>
struct Constant {
  __device__ __forceinline__ operator bool() const { return kValue; }
};

// The first element is at `place` in the whole tensor, each other kStride after the one before. `amsgrad` is
// a bool or a Constant.
template <int kStride, typename Amsgrad, typename L, int N, typename T, typename Math>
__device__ __forceinline__ void update_elements(Amsgrad amsgrad, Elements<L, N>& x,
                                                Change<T, N, L::kBesides>& change, const Coefficients<T>& c,
                                                Math& math, const Noise<L::kTakesNoise>& noise,
                                                uint64_t place) {
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T p = x.p.get(k), m = x.m.get(k), v = x.v.get(k);
    T v_max = amsgrad ? x.v_max.get(k) : T(0);
    const T before = p;
    adamw_update<T>(p, x.g.get(k), m, v, v_max, c, math);
    change.put(k, before, p);
    const uint32_t bits = noise.at(place + k * kStride);
    x.p.put(k, p, bits & 0xffff);
    x.m.put(k, m, bits & 0xffff);
    x.v.put(k, v, bits >> 16);
    if (amsgrad) x.v_max.put(k, v_max, 0);
  }
}

// Fills x by `load` and applies the rule to it.
template <int kStride, typename Amsgrad, typename L, int N, typename T, typename Load>
__device__ __forceinline__ void load_and_update(Amsgrad amsgrad, Elements<L, N>& x,
                                                Change<T, N, L::kBesides>& change, const Load& load,
                                                const Coefficients<T>& c, const Noise<L::kTakesNoise>& noise,
                                                uint64_t place) {
  constexpr bool kFast = FUSED_ADAMW_FAST_MATH && sizeof(T) == sizeof(float);
  load();
  std::conditional_t<kFast, FastMath, IeeeMath> math;
  update_elements<kStride>(amsgrad, x, change, c, math, noise, place);
  if constexpr (kFast) {
    if (!math.exact) {  // from memory again: registers that kept the elements would be spilled
      load();
      IeeeMath ieee;
      update_elements<kStride>(amsgrad, x, change, c, ieee, noise, place);
    }
  }
}

// Steps the n elements from `start` of a span on, N at a time. The span begins with element `first` of its
// row.
template <int N, typename Amsgrad, typename L, typename T>
__device__ __forceinline__ void update_vectors(Amsgrad amsgrad, const Places<L>& at, int64_t first, int start,
                                               int n, const Coefficients<T>& c,
                                               const Noise<L::kTakesNoise>& noise, Besides<L>& besides) {
  for (int i = start + threadIdx.x * N; i < start + n; i += kThreads * N) {
    Elements<L, N> x;
    Change<T, N, L::kBesides> change;
    const auto load_all = [&] {
      load(&x.p, at.p, i);
      load(&x.g, at.g, i);
      load(&x.m, at.m, i);
      load(&x.v, at.v, i);
      if (amsgrad) load(&x.v_max, at.v_max, i);
    };
    const uint64_t place = noise.place(first + i);
    load_and_update<1>(amsgrad, x, change, load_all, c, noise, place);
    store(at.p, i, x.p);
    store(at.m, i, x.m);
    store(at.v, i, x.v);
    if (amsgrad) store(at.v_max, i, x.v_max);
    besides.template after<1>(
        x, change, N, noise, place, [&](auto* to, const auto& from) { load(to, from, first + i); },
        [&](const auto& to, const auto& from) { store(to, first + i, from); });
  }
}

// The widest type of a row moves in whole 16-byte vectors, and narrower ones in as many elements:
// neighbouring threads then touch neighbouring bytes of every tensor, so each sector of memory moves once.
// Rows that are not aligned for that, and what a chunk leaves over, go element by element.
template <typename Amsgrad, typename L, typename T>
__device__ __forceinline__ void update_span(Amsgrad amsgrad, const Row& row, uint64_t grad, const Span& span,
                                            const Coefficients<T>& c, const Noise<L::kTakesNoise>& noise,
                                            Besides<L>& besides) {
  constexpr int N = kVectorBytes / L::kWidest;
  const Places<L> at(row, grad, amsgrad, span.start);
  const bool vectors = at.p.template is_aligned<N>() && at.g.template is_aligned<N>() &&
                       at.m.template is_aligned<N>() && at.v.template is_aligned<N>() &&
                       at.v_max.template is_aligned<N>() && besides.template is_aligned<N>(span.start) &&
                       noise.template keeps_neighbours<N>(span.start);
  const int n = vectors ? span.n / N * N : 0;
  update_vectors<N>(amsgrad, at, span.start, 0, n, c, noise, besides);
  update_vectors<1>(amsgrad, at, span.start, n, span.n - n, c, noise, besides);
}

// Steps the blocks of codes that start in a span. A warp, or a part of it, has a block, each thread N values:
// neighbours where kVectors, else such that threads touch neighbours.
template <bool kVectors, int N, typename L, typename T>
__device__ __forceinline__ void update_blocks(const Places<L>& at, const CodeBlocks& blocks,
                                              const Coefficients<T>& c, const Noise<true>& noise,
                                              Besides<L>& besides) {
  constexpr int kLanes = kCodeBlock / N, kStride = kVectors ? 1 : kLanes;
  const int lane = threadIdx.x % kLanes, first = kVectors ? lane * N : lane;
  // Whole warps go on until their last block is done: threads exchange values.
  for (int i = threadIdx.x / 32 * (32 / kLanes); i < blocks.n; i += kThreads / kLanes) {
    const CodeBlock block = blocks.at(i + threadIdx.x % 32 / kLanes);
    const int valid = block.n > first ? (block.n - first + kStride - 1) / kStride : 0;  // or more than N
    const int64_t start = block.start + first;
    Elements<L, N> x;
    Change<T, N, L::kBesides> change;
    const auto load_all = [&] {
      load_some<kStride>(&x.p, at.p, start, block, valid);
      load_some<kStride>(&x.g, at.g, start, block, valid);
      load_some<kStride>(&x.m, at.m, start, block, valid);
      load_some<kStride>(&x.v, at.v, start, block, valid);
    };
    const uint64_t place = noise.place(block.row, block.column + first);
    load_and_update<kStride>(Constant<false>(), x, change, load_all, c, noise, place);
    store_some<kStride>(at.p, start, block, valid, x.p);
    x.m.template encode<kLanes>(valid, [&](int k) { return noise.at(place + k * kStride) & 0xffff; });
    store_some<kStride>(at.m, start, block, valid, x.m);
    x.v.template encode<kLanes>(valid, [&](int k) { return noise.at(place + k * kStride) >> 16; });
    store_some<kStride>(at.v, start, block, valid, x.v);
    besides.template after<kStride>(
        x, change, valid, noise, place,
        [&](auto* to, const auto& from) { load_some<kStride>(to, from, start, block, valid); },
        [&](const auto& to, const auto& from) { store_some<kStride>(to, start, block, valid, from); });
  }
}

template <typename L, typename T>
__device__ __forceinline__ void update_coded_span(const Row& row, uint64_t grad, const Span& span,
                                                  const Coefficients<T>& c, const Noise<true>& noise,
                                                  Besides<L>& besides) {
  constexpr int N = kVectorBytes / L::kWidest;
  const Places<L> at(row, grad, false, 0);
  const CodeBlocks blocks(row, span);
  const bool vectors = blocks.columns % N == 0 && at.p.template is_aligned<N>() &&
                       at.g.template is_aligned<N>() && at.m.template is_aligned<N>() &&
                       at.v.template is_aligned<N>() && besides.template is_aligned<N>(0);
  if (vectors) {
    update_blocks<true, N>(at, blocks, c, noise, besides);
  } else {
    update_blocks<false, kCodeBlock / 32>(at, blocks, c, noise, besides);
  }
}

// Not inlined, as it is called once a step: kernels are shorter.
__device__ __attribute__((noinline)) void record_step(const StepInputs& inputs, const StepScalars& scalars) {
  record(inputs, scalars);
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
  __shared__ double weight;  // of the average
  const UpdateArgs& args = params.args;

  // Double precision is slow on many GPUs: one thread works the scalars out for its block.
  if (threadIdx.x == 0) {
    hyper = -1;  // none
    scalars = step_scalars(args.inputs);
  }
  __syncthreads();

  Coefficients<T> c{};
  for (int64_t i = scalars.skip ? args.table.n_chunks : blockIdx.x; i < args.table.n_chunks; i += gridDim.x) {
    const int64_t number = FUSED_ADAMW_REVERSE_UPDATE ? args.table.n_chunks - 1 - i : i;
    const Chunk chunk = args.table.chunks[number];
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
        if (L::kBesides) weight = average_weight(args.inputs.averaging, step);
      }
      __syncthreads();
      c = shared_coefficients;
    }
    const Span span = span_of(args.table, row, chunk);
    const Noise<L::kTakesNoise> noise(row, args.inputs.seed, row_step);
    Besides<L> besides(args, row, weight);
    if constexpr (L::kHasCodes) {
      update_coded_span<L>(row, grad, span, c, noise, besides);
    } else if constexpr (L::kBesides) {  // one loop for both: half the code
      update_span<bool, L>(row.max_exp_avg_sq.values, row, grad, span, c, noise, besides);
    } else if (row.max_exp_avg_sq.values) {
      update_span<Constant<true>, L>({}, row, grad, span, c, noise, besides);
    } else {
      update_span<Constant<false>, L>({}, row, grad, span, c, noise, besides);
    }
    besides.finish(args, number);
  }

  // Every block has read the status and the step counts by now.
  if (!last_block(args.ticket)) return;
  if (threadIdx.x == 0) record_step(args.inputs, scalars);
  if (scalars.skip) return;
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
      if (args.stats || args.formats.average != kNoFormat) {
        failure = launch<update_kernel<WithBesides<L>>>(params, args.table, device, stream);
      } else {
        failure = launch<update_kernel<L>>(params, args.table, device, stream);
      }
    }
  });
  return failure;
}

}  // namespace fused_adamw
