// The same on the CPU, where the approximations that FastMath starts from are off by a chosen number of
// units.
#include "../cuda_emulation/cuda_emulation.h"
//
#include "rounding.h"

extern "C" {
// The roots of every `stride`-th float.
void roots(int error, uint32_t stride, Counts* counts) {
  emulation::approximation_error = error;
  for (uint64_t bits = 0; bits < 1ull << 32; bits += stride) {
    check_root(fused_adamw::as_float(static_cast<uint32_t>(bits)), counts);
  }
}

// Of all mantissas: 1 / y, and the roots of x and 2 x.
void all_reciprocals(int error, Counts* counts) {
  emulation::approximation_error = error;
  for (uint32_t y = 0; y < (1u << 23) - 1; ++y) {
    check(true, fused_adamw::FastMath::reciprocal(number(y, 0)), 1.0f / number(y, 0), counts);
  }
}
void all_roots(int error, Counts* counts) {
  emulation::approximation_error = error;
  for (uint32_t x = 0; x < 1u << 23; ++x) {
    check_root(number(x, 0), counts);
    check_root(number(x, 1), counts);
  }
}

// Quotients of every `stride`-th divisor's mantissa and a few dividends' ones.
void quotients(int error, uint32_t stride, Counts* counts) {
  emulation::approximation_error = error;
  std::mt19937 random(1);
  for (uint32_t y = 0; y < 1u << 23; y += stride) {
    const uint32_t one = random() >> 9, other = random() >> 9;
    for (uint32_t x : {0u, 1u, y, y ^ 1, (1u << 23) - 1, one, other}) {
      check_quotient(number(x, 0), number(y, 0), counts);
    }
  }
}

// One quotient, one root: 1 if it is left to the slow path, 2 if it is wrong.
int quotient(int error, float x, float y) {
  emulation::approximation_error = error;
  Counts counts{};
  check_quotient(x, y, &counts);
  return static_cast<int>(counts.repeated + 2 * counts.wrong);
}
int root(int error, float x) {
  emulation::approximation_error = error;
  Counts counts{};
  check_root(x, &counts);
  return static_cast<int>(counts.repeated + 2 * counts.wrong);
}
}
