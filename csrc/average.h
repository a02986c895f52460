// The average of the parameters: how much it moves at a step, and one element of it. For host and device.
#pragma once

#include <math.h>

#include "inline.h"
#include "tables.h"

namespace fused_adamw {

// How much of the way to the parameter the average goes at update number `step`, 1 for the first. 0: it
// stays. With n averages made before, decay is as in timm's ModelEmaV3, or as in diffusers' EMAModel.
ADAMW_FN double average_weight(const Averaging& averaging, double step) {
  const double updates = step - static_cast<double>(averaging.start_step);
  const double every = static_cast<double>(averaging.every);
  if (updates <= every) return 1.0;
  const double n = updates / every - 1.0;
  if (n != floor(n)) return 0.0;
  double decay = averaging.decay;
  if (averaging.warmup != kNoWarmup) {
    const double warm =
        averaging.warmup == kTimmWarmup ? 1.0 - pow(1.0 + n, -2.0 / 3.0) : (1.0 + n) / (10.0 + n);
    decay = warm < decay ? warm : decay;
  }
  return 1.0 - decay;
}

// The weight as torch.lerp uses it: from where it is accurate.
template <typename T>
struct AverageStep {
  T weight;
  bool from_param;

  ADAMW_FN AverageStep of(double weight) {
    const bool from_param = weight >= 0.5;
    return {static_cast<T>(from_param ? weight - 1.0 : weight), from_param};
  }
};

template <typename T>
ADAMW_FN void average_update(T& average, T p, const AverageStep<T>& c) {
  average = (c.from_param ? p : average) + c.weight * (p - average);
}

}  // namespace fused_adamw
