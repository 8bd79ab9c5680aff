// Common to the host tests: repeatable values, orders of the threads, and a count of failed checks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

#include <vector>

#include "mutant.h"

namespace stg_test {

// Numerical Recipes' linear congruential generator; values in [-1, 1).
inline std::vector<float> values(int64_t count, uint32_t seed) {
  std::vector<float> made(count);
  for (float& value : made) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / (1 << 23) - 1.0f;
  }
  return made;
}

// In which blocks, and threads between barriers, take their turns; a race shows in one of them.
constexpr const char* kOrders[] = {"forward", "reverse", "1"};

inline void set_order(const char* order) { setenv("CUDA_ON_HOST_ORDER", order, 1); }

struct Checks {
  int passed = 0, failed = 0;

  void expect(bool condition, const char* what, int64_t a, int64_t b) {
    ++(condition ? passed : failed);
    if (condition) return;
    printf("%s: %lld, %lld\n", what, (long long)a, (long long)b);
    // One shows that a mistake is noticed.
    if (failed == (stg_mutant != 0 ? 1 : 20)) exit(result());
  }

  int result() const {
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || passed == 0;
  }
};

}  // namespace stg_test
