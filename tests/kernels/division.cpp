// csrc/cpu/math.h against the division that it stands for.
#include "../../csrc/cpu/math.h"

using namespace fused_adamw;

static bool differ(float x, float y) { return as_bits(x) != as_bits(y) && (x == x || y == y); }

// How many numbers of these bits, from first to last, have another quotient.
extern "C" int64_t differ_from_division(float divisor, uint32_t first, uint32_t last) {
  const auto math = CpuMath<float>::of(divisor);
  int64_t wrong = 0;
  for (int64_t bits = first; bits <= last; ++bits) {
    const float x = as_float(static_cast<uint32_t>(bits));
    wrong += differ(math.divide_by_coefficient(x, divisor), x / divisor);
  }
  return wrong;
}

// The same for pairs.
extern "C" int64_t pairs_differ(const float* x, const float* divisor, int64_t n) {
  int64_t wrong = 0;
  for (int64_t i = 0; i < n; ++i) {
    const auto math = CpuMath<float>::of(divisor[i]);
    wrong += differ(math.divide_by_coefficient(x[i], divisor[i]), x[i] / divisor[i]);
  }
  return wrong;
}
