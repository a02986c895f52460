// Neighbours of the tensors of a row on their way between memory and the rule: how CUDA moves the formats of
// formats.h, and what noise it gives them.
#pragma once

#include "../noise.h"
#include "layouts.h"
#include "walk.cuh"

namespace fused_adamw {
namespace {

// ---- Noise

// What a row's noise is drawn by. A layout that takes none has none, so that none is worked out for it.
template <bool kTakesNoise>
struct Noise {
  NoiseKey key;
  uint64_t offset;
  uint32_t local_columns, columns;

  // `step` counts this update, 1 for the first.
  __device__ __forceinline__ Noise(const Row& row, uint64_t seed, float step)
      : key(noise_key(noise_word(seed, row.ordinal), static_cast<uint64_t>(step))),
        offset(row.offset),
        local_columns(row.local_columns),
        columns(row.columns) {}

  // Where element i of the row is in the whole tensor.
  __device__ __forceinline__ uint64_t place(uint64_t i) const {
    if (local_columns == columns) return offset + i;
    const uint64_t row = i / local_columns;
    return place(row, static_cast<int64_t>(i - row * local_columns));
  }
  __device__ __forceinline__ uint64_t place(uint64_t row, int64_t column) const {
    return offset + row * columns + column;
  }

  // Whether each N elements from element i on are neighbours there too.
  template <int N>
  __device__ __forceinline__ bool keeps_neighbours(int64_t i) const {
    return local_columns == columns || (local_columns % N == 0 && i % N == 0);
  }

  // 32 bits for the element at a place.
  __device__ __forceinline__ uint32_t at(uint64_t place) const { return noise_bits(key, place); }
};
template <>
struct Noise<false> {
  __device__ __forceinline__ Noise(const Row&, uint64_t, float) {}
  __device__ __forceinline__ uint64_t place(uint64_t) const { return 0; }
  template <int N>
  __device__ __forceinline__ bool keeps_neighbours(int64_t) const {
    return true;
  }
  __device__ __forceinline__ uint32_t at(uint64_t) const { return 0; }
};

// ---- One tensor

// Where a tensor is, from some element on.
template <typename Format, SideKind = Format::kSide>
struct Place {
  typename Format::Stored* values;
  typename Format::Side* side;

  __device__ __forceinline__ Place(const Field& field, int64_t i)
      : values(reinterpret_cast<typename Format::Stored*>(field.values) + i),
        side(reinterpret_cast<typename Format::Side*>(field.side) +
             (Format::kSide == kSidePerValue ? i : 0)) {}

  template <int N>
  __device__ __forceinline__ bool is_aligned() const {
    return aligned<N>(values) && (Format::kSide != kSidePerValue || aligned<N>(side));
  }
};
template <typename Format>
struct Place<Format, kNoSide> {
  typename Format::Stored* values;

  __device__ __forceinline__ Place(const Field& field, int64_t i)
      : values(reinterpret_cast<typename Format::Stored*>(field.values) + i) {}

  template <int N>
  __device__ __forceinline__ bool is_aligned() const {
    return aligned<N>(values);
  }
};

// N neighbours of a tensor: `get` and `put` are between them and registers. `noise`: 16 bits.
template <typename Format, int N, SideKind = Format::kSide>
struct Neighbours;

template <typename Format, int N>
struct Neighbours<Format, N, kNoSide> {
  using T = typename Format::Register;
  Vector<typename Format::Stored, N> values;

  __device__ __forceinline__ T get(int k) const { return Format::load(values.at[k]); }
  __device__ __forceinline__ void put(int k, T x, uint32_t noise) {
    if constexpr (Format::kTakesNoise) {
      values.at[k] = Format::store(x, noise);
    } else {
      values.at[k] = Format::store(x);
    }
  }
};

template <typename Format, int N>
struct Neighbours<Format, N, kSidePerValue> {
  using T = typename Format::Register;
  Vector<typename Format::Stored, N> values;
  Vector<typename Format::Side, N> side;

  __device__ __forceinline__ T get(int k) const { return Format::load(values.at[k], side.at[k]); }
  __device__ __forceinline__ void put(int k, T x, uint32_t) { values.at[k] = Format::store(x, side.at[k]); }
};

// Codes wait for the maximum of their block: `put` keeps the numbers, `encode` makes codes of them.
template <typename Format, int N>
struct Neighbours<Format, N, kSidePerBlock> {
  using T = typename Format::Register;
  Vector<typename Format::Stored, N> values;
  typename Format::Side side;
  T fresh[N];

  __device__ __forceinline__ T get(int k) const {
    return Format::load(values.at[k], side, Format::root_per_code(side));
  }
  __device__ __forceinline__ void put(int k, T x, uint32_t) { fresh[k] = x; }

  // kLanes threads have a block of codes, each N of it; `valid`: how many of the first of these the block
  // has; `noise(k)` is for the k-th. To be called by whole warps.
  template <int kLanes, typename F>
  __device__ __forceinline__ void encode(int valid, const F& noise) {
    uint32_t largest = 0;
#pragma unroll
    for (int k = 0; k < N; ++k) {
      const uint32_t magnitude = k < valid ? Format::magnitude(fresh[k]) : 0;
      largest = magnitude > largest ? magnitude : largest;
    }
    side = Format::side(lanes_maximum<kLanes>(largest));
    const float codes_per_root = Format::codes_per_root(side);
#pragma unroll
    for (int k = 0; k < N; ++k) values.at[k] = Format::store(fresh[k], side, codes_per_root, noise(k));
  }
};

// Vectors of N between memory and registers.
template <typename Format, int N>
__device__ __forceinline__ void load(Neighbours<Format, N>* to, const Place<Format>& from, int64_t i) {
  load(&to->values, from.values + i);
  if constexpr (Format::kSide == kSidePerValue) load(&to->side, from.side + i);
}
template <typename Format, int N>
__device__ __forceinline__ void store(const Place<Format>& to, int64_t i, const Neighbours<Format, N>& from) {
  store(to.values + i, from.values);
  if constexpr (Format::kSide == kSidePerValue) store(to.side + i, from.side);
}

// The same within a block of codes: `valid` of N elements, every kStride-th from element i on, and zeros for
// the others.
template <int kStride, typename T, int N>
__device__ __forceinline__ void load_some(Vector<T, N>* to, const T* from, int valid) {
  *to = {};
  if constexpr (kStride == 1) {  // all or none
    if (valid) load(to, from);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      Vector<T, 1> one{};
      if (k < valid) load(&one, from + k * kStride);
      to->at[k] = one.at[0];
    }
  }
}
template <int kStride, typename T, int N>
__device__ __forceinline__ void store_some(T* to, int valid, const Vector<T, N>& from) {
  if constexpr (kStride == 1) {
    if (valid) store(to, from);
  } else {
#pragma unroll
    for (int k = 0; k < N; ++k) {
      if (k < valid) store(to + k * kStride, Vector<T, 1>{from.at[k]});
    }
  }
}
template <int kStride, typename Format, int N>
__device__ __forceinline__ void load_some(Neighbours<Format, N>* to, const Place<Format>& from, int64_t i,
                                          const CodeBlock& block, int valid) {
  load_some<kStride>(&to->values, from.values + i, valid);
  if constexpr (Format::kSide == kSidePerValue) load_some<kStride>(&to->side, from.side + i, valid);
  if constexpr (Format::kSide == kSidePerBlock) {
    Vector<float, 1> side{};
    if (block.n) load(&side, from.side + block.number);
    to->side = side.at[0];
  }
}
template <int kStride, typename Format, int N>
__device__ __forceinline__ void store_some(const Place<Format>& to, int64_t i, const CodeBlock& block,
                                           int valid, const Neighbours<Format, N>& from) {
  store_some<kStride>(to.values + i, valid, from.values);
  if constexpr (Format::kSide == kSidePerValue) store_some<kStride>(to.side + i, valid, from.side);
  if constexpr (Format::kSide == kSidePerBlock) {
    if (block.n && i == block.start) store(to.side + block.number, Vector<float, 1>{from.side});
  }
}

// ---- All tensors of a row

template <typename L>
struct Places {
  Place<typename L::Param> p;
  Place<typename L::Grad> g;
  Place<typename L::ExpAvg> m;
  Place<typename L::ExpAvgSq> v;
  Place<typename L::ExpAvg> v_max;

  // From element i on.
  __device__ __forceinline__ Places(const Row& row, uint64_t grad, bool amsgrad, int64_t i)
      : p(row.param, i),
        g(Field{grad, 0}, i),
        m(row.exp_avg, i),
        v(row.exp_avg_sq, i),
        v_max(amsgrad ? row.max_exp_avg_sq : row.exp_avg, i) {}
};

template <typename L, int N>
struct Elements {
  Neighbours<typename L::Param, N> p;
  Neighbours<typename L::Grad, N> g;
  Neighbours<typename L::ExpAvg, N> m;
  Neighbours<typename L::ExpAvgSq, N> v;
  Neighbours<typename L::ExpAvg, N> v_max;
};

}  // namespace
}  // namespace fused_adamw
