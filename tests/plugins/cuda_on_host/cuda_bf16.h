// The upper half of a float.
#pragma once

#include "rounding.h"

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) { return cuda_on_host::float_of(static_cast<uint32_t>(x.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = cuda_on_host::bits_of(x);
  if (x != x) return __nv_bfloat16{0x7fff};
  return __nv_bfloat16{static_cast<uint16_t>(cuda_on_host::rounded(bits, 16))};
}
