// What the host tests share: repeatable values, and a count of failed checks.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdio.h>

#include <vector>

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

struct Checks {
  int passed = 0, failed = 0;

  void expect(bool condition, const char* what, int64_t a, int64_t b) {
    ++(condition ? passed : failed);
    if (!condition && failed < 20) printf("%s: %lld, %lld\n", what, (long long)a, (long long)b);
  }

  int result() const {
    printf("%d passed, %d failed\n", passed, failed);
    return failed != 0 || passed == 0;
  }
};

}  // namespace stg_test
