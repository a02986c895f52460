// THE rule, for host and device: AdamW (Loshchilov & Hutter, https://arxiv.org/abs/1711.05101) with the order
// of operations of torch.optim.AdamW's for-loop implementation. No torch, no CUDA include. Loads, stores,
// casts and indexing live with the kernels.
#pragma once

#include <math.h>

#include "inline.h"
#include "tables.h"

namespace fused_adamw {

// The numbers that one parameter's update needs, computed in double as Python does, then rounded to T.
template <typename T>
struct Coefficients {
  T grad_scale;
  T decay;           // of p, where the update shrinks it too
  T decay_against;   // where the update grows it
  T lerp_weight;     // exp_avg moves by this times (g - exp_avg) ...
  bool lerp_from_g;  // ... from g, where 1 - beta1 >= 0.5, as torch.lerp does for accuracy
  T beta2;
  T one_minus_beta2;
  T step_size;       // of m
  T grad_step_size;  // of g, under nesterov
  bool nesterov;
  T bias_correction2_sqrt;
  T eps;
};

// `step` counts this update: 1 for the first.
template <typename T>
ADAMW_FN Coefficients<T> coefficients(const Hyper& hyper, double step, double grad_scale) {
  const double lr = hyper.lr_address ? *reinterpret_cast<const float*>(hyper.lr_address) : hyper.lr;
  const double bias_correction1 = 1.0 - pow(hyper.beta1, step);
  const double bias_correction2 = 1.0 - pow(hyper.beta2, step);
  const double weight = 1.0 - hyper.beta1;
  const bool from_g = weight >= 0.5, nesterov = hyper.nesterov;
  const double power = hyper.decay_power == 1 ? lr : hyper.decay_power == 0 ? lr != 0.0 : lr * lr;
  const double decay = 1.0 - power * hyper.weight_decay;
  // NAdam (Dozat, 2016) with a constant momentum: m counts as beta1 times the next step's average will.
  const double step_size = lr / bias_correction1;
  const double next_step_size =
      nesterov ? lr * hyper.beta1 / (1.0 - pow(hyper.beta1, step + 1.0)) : step_size;
  return {
      static_cast<T>(hyper.grad_sign * grad_scale),
      static_cast<T>(decay),
      static_cast<T>(hyper.cautious ? 1.0 : decay),
      static_cast<T>(from_g ? weight - 1.0 : weight),
      from_g,
      static_cast<T>(hyper.beta2),
      static_cast<T>(1.0 - hyper.beta2),
      static_cast<T>(next_step_size),
      static_cast<T>(step_size * weight),
      nesterov,
      static_cast<T>(sqrt(bias_correction2)),
      static_cast<T>(hyper.eps),
  };
}

// The divisions and roots of the rule, rounded as IEEE 754 says. A walk may bring others with the same bits.
struct IeeeMath {
  ADAMW_FN float divide(float x, float y) { return x / y; }
  ADAMW_FN double divide(double x, double y) { return x / y; }
  // The divisor is one for many elements.
  template <typename T>
  ADAMW_FN T divide_by_coefficient(T x, T y) {
    return divide(x, y);
  }
  ADAMW_FN float square_root(float x) { return sqrtf(x); }
  ADAMW_FN double square_root(double x) { return sqrt(x); }
};

// One element. v_max is max_exp_avg_sq under amsgrad; otherwise the caller passes a zero and drops it, so
// that the maximum is v. NaN wins a maximum, as in torch.
template <typename T, typename Math>
ADAMW_FN void adamw_update(T& p, T grad, T& m, T& v, T& v_max, const Coefficients<T>& c, Math& math) {
  const T g = grad * c.grad_scale;
  m = (c.lerp_from_g ? g : m) + c.lerp_weight * (g - m);
  v = v * c.beta2 + c.one_minus_beta2 * g * g;
  v_max = (v_max > v || v_max != v_max) ? v_max : v;
  const T denominator = math.divide_by_coefficient(math.square_root(v_max), c.bias_correction2_sqrt) + c.eps;
  const T by_m = c.step_size * m, by_g = c.grad_step_size * g;
  const T numerator = c.nesterov ? by_m + by_g : by_m;
  p = p * (numerator * p < T(0) ? c.decay_against : c.decay);
  p = p - math.divide(numerator, denominator);
}

}  // namespace fused_adamw
