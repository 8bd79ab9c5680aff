// Common to the 16-bit types.
#pragma once

#include <stdint.h>
#include <string.h>

namespace cuda_on_host {

constexpr uint32_t kInfinity = 0x7f800000u;  // of float

inline uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Without the lowest bits: to nearest, ties to even.
inline uint32_t rounded(uint32_t bits, int dropped) {
  return (bits + (1u << (dropped - 1)) - 1 + (bits >> dropped & 1u)) >> dropped;
}

}  // namespace cuda_on_host
