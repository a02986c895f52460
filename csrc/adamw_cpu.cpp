// CPU: walk chunks, call the rule; sums of squares of chunks. Compiled once per instruction set, so nothing
// here may be shared with another translation unit: everything sits in an unnamed namespace and the standard
// library's templates are not used.
#include "adamw_cpu.h"

#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "adamw.h"

#ifndef CPU_CAPABILITY
#define CPU_CAPABILITY Baseline
#endif
#define CONCAT_(a, b) a##b
#define CONCAT(a, b) CONCAT_(a, b)
#define STRING_(a) #a
#define STRING(a) STRING_(a)

namespace fused_adamw {
namespace {

// Storage types: bits, and their conversion to and from the type of the arithmetic. Written so that compilers
// vectorise them; rounding is to nearest even, as in torch.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

ADAMW_FN float as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}
ADAMW_FN uint32_t as_bits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

ADAMW_FN float load(const BFloat16* p) { return as_float(static_cast<uint32_t>(p->bits) << 16); }
ADAMW_FN float load(const Float16* p) {
  // Shift the exponent into place, then let a multiplication rebias it: exact for subnormals too.
  const uint32_t magnitude = static_cast<uint32_t>(p->bits & 0x7fff) << 13;
  const float rebiased = as_float(magnitude) * as_float(0x77800000);  // 2^112
  const uint32_t inf_or_nan = magnitude >= 0x0f800000 ? 0x7f800000u : 0u;
  return as_float(as_bits(rebiased) | inf_or_nan | static_cast<uint32_t>(p->bits & 0x8000) << 16);
}

// Rounded to the upper half of the bits; the lower half is noise.
ADAMW_FN uint32_t round_to_bfloat16(float x) {
  const uint32_t bits = as_bits(x);
  return x == x ? bits + 0x7fff + (bits >> 16 & 1) : 0x7fc00000u;
}
ADAMW_FN void store(Float16* p, float x) {
  const uint32_t bits = as_bits(x);
  const uint32_t magnitude = bits & 0x7fffffff;
  const uint32_t normal = (magnitude - 0x38000000 + 0x0fff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the addition of 0.5 leaves the rounded subnormal in the low bits.
  const uint32_t subnormal = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000;
  uint32_t half = magnitude < 0x38800000 ? subnormal : normal;
  half = magnitude >= 0x477ff000 ? 0x7c00u : half;  // rounds to 65536 or above
  half = magnitude > 0x7f800000 ? 0x7e00u : half;
  p->bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

template <DType>
struct Storage;
template <>
struct Storage<kFloat32> {
  using type = float;
};
template <>
struct Storage<kBFloat16> {
  using type = BFloat16;
};
template <>
struct Storage<kFloat16> {
  using type = Float16;
};
template <>
struct Storage<kFloat64> {
  using type = double;
};

template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};

#if defined(__AVX512F__)
constexpr int64_t kRegisterBytes = 64;
#elif defined(__AVX2__)
constexpr int64_t kRegisterBytes = 32;
#else
constexpr int64_t kRegisterBytes = 16;
#endif

// Elements per block of the inner loops: a few vectors, and a whole number of cache lines of every type.
constexpr int64_t kBlock = 64;

// How far ahead of the loop memory is asked for. The hardware prefetcher follows fewer streams than an update
// has.
constexpr int64_t kPrefetchBytes = 1024;

template <typename T>
ADAMW_FN void prefetch_block(const T* p, int write) {
  const char* at = reinterpret_cast<const char*>(p) + kPrefetchBytes;
  for (int64_t line = 0; line < kBlock * static_cast<int64_t>(sizeof(T)); line += 64) {
    if (write) {
      __builtin_prefetch(at + line, 1, 3);
    } else {
      __builtin_prefetch(at + line, 0, 3);
    }
  }
}

// A block of elements as the arithmetic has them: converted into `buffer`, or in place where nothing
// converts.
template <typename S, typename T>
ADAMW_FN T* load_block(S* block, T* buffer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) buffer[i] = load(block + i);
  return buffer;
}
ADAMW_FN float* load_block(float* block, float*, int64_t) { return block; }
ADAMW_FN double* load_block(double* block, double*, int64_t) { return block; }

// Back into storage, if load_block took it out.
template <typename S, typename T>
ADAMW_FN void store_block(S* block, const T* buffer, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(block + i, buffer[i]);
}
ADAMW_FN void store_block(float*, const float*, int64_t) {}
ADAMW_FN void store_block(double*, const double*, int64_t) {}

// What compilers vectorise badly from the above, or not at all.
ADAMW_FN float* load_block(BFloat16* block, float* buffer, int64_t n) {
  typedef uint32_t Words __attribute__((vector_size(kRegisterBytes)));
  constexpr int64_t kWidth = kRegisterBytes / sizeof(uint32_t);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    Words bits;
#pragma GCC unroll 16
    for (int64_t k = 0; k < kWidth; ++k) bits[k] = block[i + k].bits;
    bits <<= 16;
    memcpy(buffer + i, &bits, sizeof bits);
  }
  for (; i < n; ++i) buffer[i] = load(block + i);
  return buffer;
}
ADAMW_FN void store_block(BFloat16* block, const float* buffer, int64_t n) {
  uint32_t rounded[kBlock];  // two loops: the second packs whole registers
  for (int64_t i = 0; i < n; ++i) rounded[i] = round_to_bfloat16(buffer[i]);
  for (int64_t i = 0; i < n; ++i) block[i].bits = static_cast<uint16_t>(rounded[i] >> 16);
}

#ifdef __F16C__
#ifdef __AVX512F__
// Unmasked, these warn of uninitialised registers in GCC 12.
ADAMW_FN void load_vector(const Float16* p, float* x) {
  _mm512_storeu_ps(x, _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
ADAMW_FN void store_vector(Float16* p, const float* x) {
  const __m256i half = _mm512_maskz_cvtps_ph(0xffff, _mm512_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half);
}
#else
ADAMW_FN void load_vector(const Float16* p, float* x) {
  _mm256_storeu_ps(x, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
ADAMW_FN void store_vector(Float16* p, const float* x) {
  const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(x), _MM_FROUND_TO_NEAREST_INT);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half);
}
#endif
ADAMW_FN float* load_block(Float16* block, float* buffer, int64_t n) {
  constexpr int64_t kWidth = kRegisterBytes / sizeof(float);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) load_vector(block + i, buffer + i);
  for (; i < n; ++i) buffer[i] = load(block + i);
  return buffer;
}
ADAMW_FN void store_block(Float16* block, const float* buffer, int64_t n) {
  constexpr int64_t kWidth = kRegisterBytes / sizeof(float);
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_vector(block + i, buffer + i);
  for (; i < n; ++i) store(block + i, buffer[i]);
}
#endif

template <bool kAmsgrad, typename P, typename G, typename S, typename T>
ADAMW_FN void update_block(P* p, G* g, S* m, S* v, S* v_max, const Coefficients<T>& c, int64_t n) {
  alignas(64) T buffers[5][kBlock];
  T* const p_ = load_block(p, buffers[0], n);
  T* const g_ = load_block(g, buffers[1], n);
  T* const m_ = load_block(m, buffers[2], n);
  T* const v_ = load_block(v, buffers[3], n);
  T* const v_max_ = kAmsgrad ? load_block(v_max, buffers[4], n) : nullptr;
// Values on their way are locals: through references to memory, each step of the rule would be stored.
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    T p_i = p_[i], m_i = m_[i], v_i = v_[i], v_max_i = kAmsgrad ? v_max_[i] : T(0);
    adamw_update<T>(p_i, g_[i], m_i, v_i, v_max_i, c);
    p_[i] = p_i;
    m_[i] = m_i;
    v_[i] = v_i;
    if (kAmsgrad) v_max_[i] = v_max_i;
  }
  store_block(p, p_, n);
  store_block(m, m_, n);
  store_block(v, v_, n);
  if (kAmsgrad) store_block(v_max, v_max_, n);
}

template <bool kAmsgrad, typename P, typename G, typename S, typename T>
void update_span(const Row& row, int64_t start, int64_t n, const Coefficients<T>& c) {
  P* p = reinterpret_cast<P*>(row.param) + start;
  G* g = reinterpret_cast<G*>(row.grad) + start;
  S* m = reinterpret_cast<S*>(row.exp_avg) + start;
  S* v = reinterpret_cast<S*>(row.exp_avg_sq) + start;
  S* v_max = kAmsgrad ? reinterpret_cast<S*>(row.max_exp_avg_sq) + start : nullptr;
  const Coefficients<T> coef = c;  // a copy that no store can alias
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    prefetch_block(p + i, 1);
    prefetch_block(g + i, 0);
    prefetch_block(m + i, 1);
    prefetch_block(v + i, 1);
    update_block<kAmsgrad>(p + i, g + i, m + i, v + i, kAmsgrad ? v_max + i : nullptr, coef, kBlock);
  }
  update_block<kAmsgrad>(p + i, g + i, m + i, v + i, kAmsgrad ? v_max + i : nullptr, coef, n - i);
}

ADAMW_FN int64_t span_of(const Table& table, const Row& row, const Chunk& chunk, int64_t* start) {
  *start = chunk.index * table.chunk_size;
  const int64_t left = row.numel - *start;
  return left < table.chunk_size ? left : table.chunk_size;
}

template <typename P, typename G, typename S>
void update_typed(const UpdateArgs& args, double grad_scale, int64_t begin, int64_t end) {
  using T = typename Arithmetic<P>::type;
  Coefficients<T> c{};
  // Neighbouring rows mostly share a group and a step count: keep what was worked out.
  int64_t hyper = -1;
  float step = -1.0f;
  for (int64_t i = begin; i < end; ++i) {
    const Row& row = args.table.rows[args.table.chunks[i].row];
    if (!row.grad) continue;
    const float row_step = *reinterpret_cast<const float*>(row.step) + 1.0f;
    if (row.hyper != hyper || row_step != step) {
      hyper = row.hyper;
      step = row_step;
      c = coefficients<T>(args.hypers[hyper], step, grad_scale);
    }
    int64_t start;
    const int64_t n = span_of(args.table, row, args.table.chunks[i], &start);
    if (row.max_exp_avg_sq) {
      update_span<true, P, G, S>(row, start, n, c);
    } else {
      update_span<false, P, G, S>(row, start, n, c);
    }
  }
}

bool update_chunks(const UpdateArgs& args, double grad_scale, int64_t begin, int64_t end) {
#define CASE(P, G, S)                                                                                 \
  if (args.param_dtype == P && args.grad_dtype == G && args.state_dtype == S) {                       \
    update_typed<Storage<P>::type, Storage<G>::type, Storage<S>::type>(args, grad_scale, begin, end); \
    return true;                                                                                      \
  }
  FUSED_ADAMW_FOR_EACH_DTYPES(CASE)
#undef CASE
  return false;
}

// Squares are summed in double: no overflow for any float32 gradient, and far below float32's rounding. Each
// lane sums every 32nd square, and the lanes are summed as a tree: the same order for all instruction sets.
// Without prefetching: one stream is what the hardware follows best.
template <typename G>
double sum_of_squares(G* g, int64_t n) {
  using T = typename Arithmetic<G>::type;
  // Sums of a vector type stay in registers; those in an array of doubles do not.
  typedef double Doubles __attribute__((vector_size(kRegisterBytes)));
  constexpr int64_t kLanes = 32, kWidth = kRegisterBytes / sizeof(double);
  alignas(64) T buffer[kLanes];
  Doubles sums[kLanes / kWidth] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const T* x = load_block(g + i, buffer, kLanes);
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
  const T* const rest = load_block(g + i, buffer, n - i);
  for (int64_t lane = 0; i + lane < n; ++lane) {
    lanes[lane] += static_cast<double>(rest[lane]) * static_cast<double>(rest[lane]);
  }
  for (int64_t width = kLanes / 2; width; width /= 2) {
    for (int64_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

template <typename G>
bool norm_typed(const NormArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i) {
    const Row& row = args.table.rows[args.table.chunks[i].row];
    int64_t start;
    const int64_t n = span_of(args.table, row, args.table.chunks[i], &start);
    args.partials[i] = row.grad ? sum_of_squares(reinterpret_cast<G*>(row.grad) + start, n) : 0.0;
  }
  return true;
}

bool norm_chunks(const NormArgs& args, int64_t begin, int64_t end) {
  switch (args.grad_dtype) {
    case kFloat32:
      return norm_typed<float>(args, begin, end);
    case kBFloat16:
      return norm_typed<BFloat16>(args, begin, end);
    case kFloat16:
      return norm_typed<Float16>(args, begin, end);
    case kFloat64:
      return norm_typed<double>(args, begin, end);
  }
  return false;
}

}  // namespace

extern const CpuKernels CONCAT(kCpuKernels, CPU_CAPABILITY) = {STRING(CPU_CAPABILITY), update_chunks,
                                                               norm_chunks};

}  // namespace fused_adamw
