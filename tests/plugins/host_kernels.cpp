// The interface of the kernels on host memory: the same arithmetic and indexing, thread after thread.
// It lets the bindings, and a sampler that uses them, be tested where there is no GPU.
#include <string.h>

#include "copy_rows/copy_on_host.h"
#include "fan_out_rows/fan_out_on_host.h"
#include "guided_step/arithmetic.h"
#include "guided_step/guided_step.h"
#include "qk_norm_rope/norm_on_host.h"

namespace {

constexpr int kInvalidValue = 1;
constexpr int64_t kThreads = 64;

struct Half {
  uint16_t bits;
};

struct Bfloat16 {
  uint16_t bits;
};

uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Drops the lowest bits: to nearest, ties to even.
uint32_t rounded(uint32_t bits, int dropped) {
  return (bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1u)) >> dropped;
}

}  // namespace

// Finite values only: 5 bits of exponent with bias 15, subnormals below 2^-14.
template <>
struct stg::Cast<Half> {
  static float to_float(Half x) {
    const uint32_t magnitude = x.bits & 0x7fffu;
    const float value = magnitude < 0x400u ? ldexpf(magnitude, -24) : float_of((magnitude << 13) + (112u << 23));
    return x.bits & 0x8000u ? -value : value;
  }
  static Half from_float(float x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u, magnitude = bits_of(x) & 0x7fffffffu;
    const uint32_t half = magnitude < 113u << 23 ? static_cast<uint32_t>(nearbyintf(ldexpf(fabsf(x), 24)))
                                                 : rounded(magnitude - (112u << 23), 13);
    return Half{static_cast<uint16_t>(sign | half)};
  }
};

template <>
struct stg::Cast<Bfloat16> {
  static float to_float(Bfloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
  static Bfloat16 from_float(float x) { return Bfloat16{static_cast<uint16_t>(rounded(bits_of(x), 16))}; }
};

namespace {

struct Prediction {
  std::vector<float> values;
  float factor;
};

template <class T>
Prediction guided(const StgGuidedStep& p, stg::StepScalars s, int64_t first) {
  Prediction pred{std::vector<float>(p.length), 1.0f};
  stg::Moments of_cond = stg::no_moments(), of_pred = stg::no_moments();
  const auto read = [&](const void* rows, int64_t i, float otherwise) {
    return rows == nullptr ? otherwise : stg::Cast<T>::to_float(static_cast<const T*>(rows)[first + i]);
  };
  for (int64_t i = 0; i < p.length; ++i) {
    const float cond = read(p.cond, i, 0.0f);
    pred.values[i] = stg::combine(cond, read(p.uncond, i, cond), read(p.skip, i, cond), s);
    of_cond = stg::merge(of_cond, stg::Moments{1.0f, cond, 0.0f});
    of_pred = stg::merge(of_pred, stg::Moments{1.0f, pred.values[i], 0.0f});
  }
  if (p.rescaled) pred.factor = stg::rescale_factor(of_cond, of_pred, s.rescale);
  return pred;
}

template <class T>
void guided_step(const StgGuidedStep& p) {
  const int64_t step = *p.counter, size = p.videos * p.length;
  const stg::StepScalars s{p.cfg_scale[step], p.stg_scale[step], p.rescale[step], p.latents_factor[step],
                           p.pred_factor[step]};
  for (int64_t video = 0; video < p.videos; ++video) {
    const Prediction guidance = guided<T>(p, s, video * p.length);
    for (int64_t i = 0; i < p.length; ++i) {
      const int64_t at = video * p.length + i;
      const float pred = guidance.values[i] * guidance.factor;
      if (p.history != nullptr) p.history[step * size + at] = pred;
      if (p.two_term) {
        p.latents[at] = stg::two_term_step(p.latents[at], pred, s);
        continue;
      }
      float next = p.initial_factor[step] * p.initial[at];
      const float* factors = p.history_factors + step * p.slots;
      for (int64_t j = 0; j <= step; ++j) next += factors[j] * p.history[j * size + at];
      for (int64_t j = p.capacity; j < p.slots; ++j) next += factors[j] * p.history[j * size + at];
      p.latents[at] = next;
    }
  }
  *p.counter = step + 1;
}

}  // namespace

int stg_kernels_abi(void) { return STG_KERNELS_ABI; }

int stg_copy_rows(const StgCopyRows* rows, void*) { return stg_test::copy_on_host(*rows), 0; }

int stg_fan_out_rows(const StgFanOutRows* p, void*) {
  if (p->dtype == kStgFloat32) return stg_test::fan_out_on_host<float>(*p, kThreads), 0;
  if (p->dtype == kStgFloat16) return stg_test::fan_out_on_host<Half>(*p, kThreads), 0;
  if (p->dtype == kStgBfloat16) return stg_test::fan_out_on_host<Bfloat16>(*p, kThreads), 0;
  return kInvalidValue;
}

int64_t stg_guided_step_workspace(int64_t videos) { return videos; }

int stg_guided_step(const StgGuidedStep* p, void*) {
  if (p->dtype == kStgFloat32) return guided_step<float>(*p), 0;
  if (p->dtype == kStgFloat16) return guided_step<Half>(*p), 0;
  if (p->dtype == kStgBfloat16) return guided_step<Bfloat16>(*p), 0;
  return kInvalidValue;
}

int stg_qk_norm_rope(const StgQKNormRope* p, void*) {
  if (!stg::norm_valid(*p)) return kInvalidValue;
  if (p->dtype == kStgFloat32) return stg_test::norm_on_host<float>(*p), 0;
  if (p->dtype == kStgFloat16) return stg_test::norm_on_host<Half>(*p), 0;
  if (p->dtype == kStgBfloat16) return stg_test::norm_on_host<Bfloat16>(*p), 0;
  return kInvalidValue;
}
