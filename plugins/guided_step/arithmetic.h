// The arithmetic of a sampling step, written once for host and device.
#pragma once

#include <math.h>

#include "host_device.h"

namespace stg {

// Count, mean and sum of squared deviations: a plain sum of squares loses 1e-3 at a mean of 100.
struct Moments {
  float count;
  float mean;
  float m2;
};

STG_BOTH Moments no_moments() { return Moments{0.0f, 0.0f, 0.0f}; }

// Chan, Golub and LeVeque (1979): the moments of two sets from those of each.
STG_BOTH Moments merge(Moments a, Moments b) {
  const float count = a.count + b.count;
  if (count == 0.0f) return no_moments();
  const float delta = b.mean - a.mean;
  const float share = b.count / count;
  return Moments{count, a.mean + delta * share, a.m2 + b.m2 + delta * delta * a.count * share};
}

// Moments of a few values in registers, in two passes and without a division per value.
template <int kCount>
STG_BOTH Moments moments_of(const float (&values)[kCount]) {
  float sum = 0.0f;
  for (int i = 0; i < kCount; ++i) sum += values[i];
  const float mean = sum / kCount;
  float m2 = 0.0f;
  for (int i = 0; i < kCount; ++i) m2 += (values[i] - mean) * (values[i] - mean);
  return Moments{static_cast<float>(kCount), mean, m2};
}

// The inner products that scale the unconditional prediction.
struct Products {
  float cond_uncond;
  float uncond_uncond;
};

STG_BOTH Products no_products() { return Products{0.0f, 0.0f}; }

STG_BOTH Products merge(Products a, Products b) {
  return Products{a.cond_uncond + b.cond_uncond, a.uncond_uncond + b.uncond_uncond};
}

// CFG-Zero* (arXiv 2503.18886): the factor that projects cond onto uncond.
STG_BOTH float projection(Products p) { return p.cond_uncond / (p.uncond_uncond + 1e-8f); }

// One step's values from the device table.
struct StepScalars {
  float rescale;
  float latents_factor;
  float pred_factor;
};

// A pass's share of the weighted sum, whose weights add up to 1, beyond cond: sum + weight*(pred - cond).
STG_BOTH float add_pass(float sum, float pred, float cond, float weight) { return fmaf(weight, pred - cond, sum); }

// rescale*std(cond)/std(pred) + (1 - rescale); the counts are equal, so they cancel.
STG_BOTH float rescale_factor(Moments cond, Moments pred, float rescale) {
  if (rescale == 0.0f) return 1.0f;
  return fmaf(rescale, sqrtf(cond.m2 / pred.m2) - 1.0f, 1.0f);
}

// The clean latents that a velocity means: x0 = x - noise_level*v.
STG_BOTH float clean_latents(float latents, float pred, float noise_level) { return fmaf(-noise_level, pred, latents); }

// The velocity that means `factor` times the clean latents: factor*v + (1 - factor)*x/noise_level.
STG_BOTH float rescaled_velocity(float pred, float latents, float noise_level, float factor) {
  return fmaf(factor - 1.0f, pred - latents / noise_level, pred);
}

// x' = latents_factor*x + pred_factor*pred
STG_BOTH float single_step(float latents, float pred, StepScalars s) {
  return fmaf(s.latents_factor, latents, s.pred_factor * pred);
}

}  // namespace stg
