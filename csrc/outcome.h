// What becomes of a step as a whole: clipped, skipped, counted. For host and device; no torch, no CUDA
// include.
#pragma once

#include <float.h>
#include <math.h>

#include "inline.h"
#include "tables.h"

namespace fused_adamw {

// The scalars that a step derives from its inputs. grad_scale combines the clip coefficient and 1/loss-scale:
// gradients are multiplied by it in registers and never rewritten.
struct StepScalars {
  double grad_norm;
  double loss_scale;
  double max_grad_norm;  // what the norm was clipped to
  double grad_scale;
  Outcome outcome;
  bool skip;
};

ADAMW_FN SpikeHistory* history_of(const StepInputs& inputs) {
  return reinterpret_cast<SpikeHistory*>(inputs.status + 1);
}

ADAMW_FN Series* norms_of(const StepInputs& inputs) {
  return reinterpret_cast<Series*>(history_of(inputs) + 1);
}

ADAMW_FN Series* losses_of(const StepInputs& inputs) {
  return reinterpret_cast<Series*>(norms_of(inputs)->values + inputs.spikes.window);
}

ADAMW_FN double limit_of(const Series& series, const SpikeOptions& options) {
  return series.accepted < static_cast<double>(options.warmup) ? DBL_MAX : series.limit;
}

// The limit is above the mean by `sigmas` deviations of the sample, of which each counts as a millionth of
// the mean at least: equal values are no spikes.
ADAMW_FN void accept(Series& series, double x, const SpikeOptions& options) {
  const int64_t before = static_cast<int64_t>(series.accepted);
  series.values[before % options.window] = x;
  series.accepted = static_cast<double>(before + 1);
  const int64_t n = before < options.window ? before + 1 : options.window;
  double sum = 0.0, squares = 0.0;
  for (int64_t i = 0; i < n; ++i) sum += series.values[i];
  const double mean = sum / static_cast<double>(n), least = 1e-6 * fabs(mean);
  for (int64_t i = 0; i < n; ++i) squares += (series.values[i] - mean) * (series.values[i] - mean);
  const double deviation = n > 1 ? sqrt(squares / static_cast<double>(n - 1)) : 0.0;
  series.limit = mean + options.sigmas * (deviation > least ? deviation : least);
}

// Clipping as torch.nn.utils.clip_grad_norm_: max_norm / (norm + 1e-6), at most 1; NaN stays NaN.
ADAMW_FN StepScalars step_scalars(const StepInputs& inputs) {
  const double loss_scale = inputs.grad_scale ? static_cast<double>(*inputs.grad_scale) : 1.0;
  StepScalars s{0.0, loss_scale, DBL_MAX, 1.0 / loss_scale, kStepped, false};
  if (inputs.sums) {
    double sum = 0.0;
    for (int64_t i = 0; i < inputs.n_sums; ++i) sum += inputs.sums[i];
    s.grad_norm = sqrt(sum) / loss_scale;
    s.max_grad_norm = inputs.max_grad_norm;
    if (inputs.spikes.window) {
      const double limit = limit_of(*norms_of(inputs), inputs.spikes);
      if (s.grad_norm > limit) s.outcome = inputs.spikes.clips ? kClippedSpike : kSpike;
      if (inputs.spikes.clips && limit < s.max_grad_norm) s.max_grad_norm = limit;
      if (inputs.loss && *inputs.loss > limit_of(*losses_of(inputs), inputs.spikes)) s.outcome = kLossSpike;
      if (inputs.loss && !(fabs(*inputs.loss) <= DBL_MAX)) s.outcome = kNonfinite;
    }
    if ((inputs.skip_nonfinite || inputs.spikes.window) && !(s.grad_norm <= DBL_MAX)) s.outcome = kNonfinite;
    const double clip_coef = s.max_grad_norm / (s.grad_norm + 1e-6);
    s.grad_scale *= clip_coef > 1.0 ? 1.0 : clip_coef;
  }
  if (inputs.found_inf && *inputs.found_inf != 0.0f) s.outcome = kOverflow;
  s.skip = s.outcome >= kOverflow;
  return s;
}

// Writes what became of a step: once for each launch, after whatever asks for its scalars.
ADAMW_FN void record(const StepInputs& inputs, const StepScalars& s) {
  Status& status = *inputs.status;
  status.grad_norm = s.grad_norm;
  status.loss_scale = s.loss_scale;
  status.outcome = static_cast<double>(s.outcome);
  status.counts[s.outcome] += 1.0;
  if (!inputs.spikes.window || s.outcome == kOverflow) return;
  SpikeHistory& history = *history_of(inputs);
  if (s.skip) {
    history.refused[static_cast<int64_t>(history.streak) % kRefusedNorms] = s.grad_norm;
    history.streak += 1.0;
    return;
  }
  history.streak = 0.0;
  Series& norms = *norms_of(inputs);
  accept(norms, s.outcome == kClippedSpike ? norms.limit : s.grad_norm, inputs.spikes);
  if (inputs.loss) accept(*losses_of(inputs), *inputs.loss, inputs.spikes);
}

}  // namespace fused_adamw
