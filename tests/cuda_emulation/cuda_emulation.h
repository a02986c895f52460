// Just enough CUDA for g++ to compile csrc/cuda as it stands and to run its kernels on the CPU.
//
// A block is a thread of the operating system, so that __shared__ is thread_local; a CUDA thread is a fiber
// in it. Fibers run until a barrier or a shuffle and are resumed in random order, some warps far behind
// others; blocks run one after the other, in random order too. A barrier that not all threads reach is an
// error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static thread_local
#define __CUDACC_VER_MAJOR__ 0
#define __CUDACC_VER_MINOR__ 0

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace emulation {

// What tests look at, and the order in which blocks and threads run.
struct Device {
  unsigned seed = 0;
  int launches = 0;
  int last_grid = 0;
};
inline Device device;

struct Fiber {
  ucontext_t context;
  int shuffles = 0;
  bool waiting = false;
  bool done = false;
};

// Who is expected, and how many of them have come.
struct Barrier {
  unsigned begin, end, arrived = 0;
};

struct Block {
  static constexpr size_t kStackBytes = 32 << 10;
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  Fiber* running = nullptr;
  Barrier all;
  std::vector<Barrier> warps;
  std::vector<uint64_t> shuffled[2];  // by parity, so that one shuffle's values outlive the next one's start
};
inline thread_local Block* block = nullptr;

inline void meet(Barrier* barrier) {
  if (++barrier->arrived == barrier->end - barrier->begin) {
    barrier->arrived = 0;
    for (unsigned t = barrier->begin; t < barrier->end; ++t) block->fibers[t].waiting = false;
  } else {
    block->running->waiting = true;
    swapcontext(&block->running->context, &block->scheduler);
  }
}

}  // namespace emulation

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

template <typename F>
void run_block(const F& body, unsigned threads, unsigned seed) {
  static const F* entry;
  static std::vector<char> stacks;
  entry = &body;
  stacks.resize(threads * Block::kStackBytes);
  Block here;
  block = &here;
  here.fibers.resize(threads);
  here.all = {0, threads};
  for (unsigned t = 0; t < threads; t += 32) here.warps.push_back({t, t + 32});
  for (auto& values : here.shuffled) values.resize(threads);
  for (unsigned t = 0; t < threads; ++t) {
    ucontext_t& context = here.fibers[t].context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks.data() + t * Block::kStackBytes;
    context.uc_stack.ss_size = Block::kStackBytes;
    context.uc_link = &here.scheduler;
    const auto start = +[] {
      (*entry)();
      block->running->done = true;
    };
    makecontext(&context, start, 0);
  }
  std::mt19937 random(seed);
  std::vector<unsigned> order(threads);
  std::iota(order.begin(), order.end(), 0u);
  std::vector<unsigned> asleep(here.warps.size());  // rounds that a warp falls behind by
  for (unsigned left = threads; left;) {
    std::shuffle(order.begin(), order.end(), random);
    bool stuck = true;
    for (unsigned& rounds : asleep) {
      rounds = rounds ? rounds - 1 : random() % 8 ? 0 : random() % 16;
      stuck &= rounds == 0;
    }
    for (unsigned t : order) {
      Fiber& f = here.fibers[t];
      if (f.done || f.waiting || asleep[t / 32]) continue;
      stuck = false;
      here.running = &f;
      threadIdx.x = t;
      swapcontext(&here.scheduler, &f.context);
      left -= f.done;
    }
    if (stuck) {
      std::fprintf(stderr, "cuda_emulation: not all threads reach a barrier or shuffle\n");
      std::abort();
    }
  }
}

template <typename Kernel>
void run_grid(const Kernel& kernel, dim3 grid, dim3 threads) {
  std::mt19937 random(device.seed++);
  std::vector<unsigned> order(grid.x);
  std::iota(order.begin(), order.end(), 0u);
  std::shuffle(order.begin(), order.end(), random);
  for (unsigned b : order) {
    const unsigned seed = random();
    std::thread([&] {
      blockIdx.x = b;
      gridDim = grid;
      blockDim = threads;
      run_block(kernel, threads.x, seed);
    }).join();
  }
}

}  // namespace emulation

// ---- Device functions

inline void __syncthreads() { emulation::meet(&emulation::block->all); }
inline void __threadfence() {}

template <typename T>
T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a word of a thread");
  if (mask != 0xffffffff) std::abort();
  emulation::Block& block = *emulation::block;
  const unsigned self = threadIdx.x;
  auto& values = block.shuffled[block.running->shuffles++ % 2];
  std::memcpy(&values[self], &x, sizeof x);
  emulation::meet(&block.warps[self / 32]);
  std::memcpy(&x, &values[self ^ lanes], sizeof x);
  return x;
}

inline unsigned atomicInc(unsigned* at, unsigned limit) {
  const unsigned old = *at;
  *at = old >= limit ? 0 : old + 1;
  return old;
}

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

// An access that is not aligned to its size faults on a GPU.
template <typename T>
T* checked(T* p) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) {
    std::fprintf(stderr, "cuda_emulation: misaligned access of %zu bytes\n", sizeof(T));
    std::abort();
  }
  return p;
}
template <typename T>
T __ldca(const T* p) {
  T x;
  std::memcpy(&x, checked(p), sizeof x);
  return x;
}
template <typename T>
T __ldcg(const T* p) {
  return *checked(p);
}
template <typename T>
void __stwb(T* p, T x) {
  std::memcpy(checked(p), &x, sizeof x);
}

// ---- Arithmetic

inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fmul_rn(float x, float y) { return x * y; }

namespace emulation {
// How many units in the last place the approximations below are off.
inline int approximation_error = 1;

inline float off(double exact) {
  float x = static_cast<float>(exact);
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits += approximation_error;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
}  // namespace emulation

inline float approximate_reciprocal(float x) { return emulation::off(1.0 / x); }
inline float approximate_reciprocal_root(float x) { return emulation::off(1.0 / std::sqrt(double(x))); }

// The host's side: the one beside this file, or that of tests/pretend_gpu, whichever is found first.
#include <cuda_host.h>
