// CUDA: the update of parameters of one format, FUSED_ADAMW_PARAM. No torch: plain nvcc compiles this file.
#include "../adamw.h"
#include "fast_math.h"
#include "kernels.h"
#include "layouts.h"
#include "switches.h"
#include "walk.cuh"

namespace fused_adamw {
namespace {

// N neighbours of every tensor of a row, as they are in memory.
template <typename L, int N>
struct Elements {
  Vector<typename L::Param::Stored, N> p;
  Vector<typename L::Grad::Stored, N> g;
  Vector<typename L::ExpAvg::Stored, N> m;
  Vector<typename L::ExpAvgSq::Stored, N> v;
  Vector<typename L::ExpAvg::Stored, N> v_max;
};

template <bool kAmsgrad, typename L, int N, typename T, typename Math>
__device__ __forceinline__ void update_elements(Elements<L, N>& x, const Coefficients<T>& c, Math& math) {
  using Param = typename L::Param;
  using ExpAvg = typename L::ExpAvg;
  using ExpAvgSq = typename L::ExpAvgSq;
#pragma unroll
  for (int k = 0; k < N; ++k) {
    T p = Param::load(x.p.at[k]), m = ExpAvg::load(x.m.at[k]), v = ExpAvgSq::load(x.v.at[k]);
    T v_max = kAmsgrad ? ExpAvg::load(x.v_max.at[k]) : T(0);
    adamw_update<T>(p, L::Grad::load(x.g.at[k]), m, v, v_max, c, math);
    x.p.at[k] = Param::store(p);
    x.m.at[k] = ExpAvg::store(m);
    x.v.at[k] = ExpAvgSq::store(v);
    if (kAmsgrad) x.v_max.at[k] = ExpAvg::store(v_max);
  }
}

// Where the tensors of a row are, from some element on.
template <typename L>
struct Pointers {
  typename L::Param::Stored* p;
  const typename L::Grad::Stored* g;
  typename L::ExpAvg::Stored* m;
  typename L::ExpAvgSq::Stored* v;
  typename L::ExpAvg::Stored* v_max;
};

template <bool kAmsgrad, typename L, int N>
__device__ __forceinline__ void load_elements(Elements<L, N>* x, const Pointers<L>& at, int i) {
  load(&x->p, at.p + i);
  load(&x->g, at.g + i);
  load(&x->m, at.m + i);
  load(&x->v, at.v + i);
  if (kAmsgrad) load(&x->v_max, at.v_max + i);
}

template <bool kAmsgrad, typename L, int N>
__device__ __forceinline__ void store_elements(const Pointers<L>& at, int i, const Elements<L, N>& x) {
  store(at.p + i, x.p);
  store(at.m + i, x.m);
  store(at.v + i, x.v);
  if (kAmsgrad) store(at.v_max + i, x.v_max);
}

// Applies the rule to the n elements at `start`, N at a time.
template <int N, bool kAmsgrad, typename L, typename T>
__device__ __forceinline__ void update_vectors(const Pointers<L>& at, int start, int n,
                                               const Coefficients<T>& c) {
  constexpr bool kFast = FUSED_ADAMW_FAST_MATH && sizeof(T) == sizeof(float);
  for (int i = start + threadIdx.x * N; i < start + n; i += kThreads * N) {
    Elements<L, N> x;
    load_elements<kAmsgrad>(&x, at, i);
    std::conditional_t<kFast, FastMath, IeeeMath> math;
    update_elements<kAmsgrad>(x, c, math);
    if constexpr (kFast) {
      if (!math.exact) {  // from memory again: registers that kept the elements would be spilled
        load_elements<kAmsgrad>(&x, at, i);
        IeeeMath ieee;
        update_elements<kAmsgrad>(x, c, ieee);
      }
    }
    store_elements<kAmsgrad>(at, i, x);
  }
}

// The widest type of a row moves in whole 16-byte vectors, and narrower ones in as many elements:
// neighbouring threads then touch neighbouring bytes of every tensor, so each sector of memory moves once.
// Rows that are not aligned for that, and what a chunk leaves over, go element by element.
template <bool kAmsgrad, typename L, typename T>
__device__ __forceinline__ void update_span(const Row& row, uint64_t grad, const Span& span,
                                            const Coefficients<T>& c) {
  using P = typename L::Param::Stored;
  using G = typename L::Grad::Stored;
  using M = typename L::ExpAvg::Stored;
  using V = typename L::ExpAvgSq::Stored;
  constexpr int N = kVectorBytes / L::kWidest;
  Pointers<L> at;
  at.p = reinterpret_cast<P*>(row.param.values) + span.start;
  at.g = reinterpret_cast<const G*>(grad) + span.start;
  at.m = reinterpret_cast<M*>(row.exp_avg.values) + span.start;
  at.v = reinterpret_cast<V*>(row.exp_avg_sq.values) + span.start;
  at.v_max = kAmsgrad ? reinterpret_cast<M*>(row.max_exp_avg_sq.values) + span.start : at.m;
  const bool vectors =
      aligned<N>(at.p) && aligned<N>(at.g) && aligned<N>(at.m) && aligned<N>(at.v) && aligned<N>(at.v_max);
  const int n = vectors ? span.n / N * N : 0;
  update_vectors<N, kAmsgrad>(at, 0, n, c);
  update_vectors<1, kAmsgrad>(at, n, span.n - n, c);
}

struct UpdateParams {
  UpdateArgs args;  // hypers: null where the table is here
  Hyper hypers[kMaxInlineHypers];
};
static_assert(sizeof(UpdateParams) <= 4096, "kernel parameters are limited to 4 KiB");

// Doubles take twice the registers: two blocks, 32 KB of loads in flight, 128 registers.
template <typename L>
constexpr int kBlocksPerProcessor =
    sizeof(typename L::Param::Register) == sizeof(double) ? 2 : FUSED_ADAMW_BLOCKS_PER_PROCESSOR;

template <typename L>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<L>)
    update_kernel(const __grid_constant__ UpdateParams params) {
  using T = typename L::Param::Register;
  __shared__ StepScalars scalars;
  __shared__ Coefficients<T> shared_coefficients;
  const UpdateArgs& args = params.args;
  const Hyper* hypers = args.hypers ? args.hypers : params.hypers;

  // Double precision is slow on many GPUs: one thread works the scalars out for its block.
  if (threadIdx.x == 0) {
    scalars = step_scalars(args.inputs);
    if (blockIdx.x == 0) {
      args.inputs.status[0] = scalars.grad_norm;
      if (scalars.skip) args.inputs.status[1] += 1.0;
    }
  }
  __syncthreads();
  if (scalars.skip) return;

  // Neighbouring rows mostly share a group and a step count: keep what was worked out.
  Coefficients<T> c{};
  int64_t hyper = -1;
  float step = -1.0f;
  for (int64_t i = blockIdx.x; i < args.table.n_chunks; i += gridDim.x) {
    const Chunk chunk = args.table.chunks[FUSED_ADAMW_REVERSE_UPDATE ? args.table.n_chunks - 1 - i : i];
    const Row& row = args.table.rows[chunk.row];
    const uint64_t grad = args.table.grads[row.slot];
    if (!grad) continue;
    const float row_step = *reinterpret_cast<const float*>(row.step) + 1.0f;
    if (row.hyper != hyper || row_step != step) {
      hyper = row.hyper;
      step = row_step;
      __syncthreads();  // the last coefficients have been read
      if (threadIdx.x == 0) shared_coefficients = coefficients<T>(hypers[hyper], step, scalars.grad_scale);
      __syncthreads();
      c = shared_coefficients;
    }
    const Span span = span_of(args.table, row, chunk);
    if (row.max_exp_avg_sq.values) {
      update_span<true, L>(row, grad, span, c);
    } else {
      update_span<false, L>(row, grad, span, c);
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
