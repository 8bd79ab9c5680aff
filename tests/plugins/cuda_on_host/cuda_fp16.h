// 5 bits of exponent with bias 15, subnormals below 2^-14.
#pragma once

#include <math.h>

#include "rounding.h"

struct __half {
  uint16_t bits;
};

inline float __half2float(__half x) {
  const uint32_t magnitude = x.bits & 0x7fffu;
  float value;
  if (magnitude < 0x400u) {
    value = ldexpf(static_cast<float>(magnitude), -24);
  } else {
    const uint32_t bias = magnitude < 0x7c00u ? 112u : 224u;  // infinity and NaN keep the largest exponent
    value = cuda_on_host::float_of((magnitude << 13) + (bias << 23));
  }
  return x.bits & 0x8000u ? -value : value;
}

inline __half __float2half_rn(float x) {
  if (x != x) return __half{0x7fff};
  const uint32_t sign = cuda_on_host::bits_of(x) >> 16 & 0x8000u, magnitude = cuda_on_host::bits_of(x) & 0x7fffffffu;
  uint32_t half = 0x7c00u;
  if (magnitude < 113u << 23) {
    half = static_cast<uint32_t>(nearbyintf(ldexpf(fabsf(x), 24)));
  } else if (magnitude < 143u << 23) {
    half = cuda_on_host::rounded(magnitude - (112u << 23), 13);
  }
  return __half{static_cast<uint16_t>(sign | half)};
}
