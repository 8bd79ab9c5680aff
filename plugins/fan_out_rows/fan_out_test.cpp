// The fan-out, thread by thread, against plain loops. Built as it is, and once per mutant.
#include "fan_out_rows/fan_out_on_host.h"

#include <string.h>

#include "test_values.h"

namespace {

// A 16-bit type that the host can store: the upper half of a float.
struct Half {
  uint16_t bits;
};

float widened(Half x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float widened(float x) { return x; }

}  // namespace

template <>
struct stg::Cast<Half> {
  static float to_float(Half x) { return widened(x); }
  static Half from_float(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return Half{static_cast<uint16_t>(bits >> 16)};
  }
};

namespace {

using stg_test::Checks;

constexpr int64_t kStep = 2, kMargin = 16;
constexpr float kPoison = -777.0f;

template <class T>
void check(Checks& checks, int64_t size, int64_t copies, int64_t threads, int64_t shift) {
  alignas(16) static float latents[4096];
  alignas(16) static T rows[4 * 4096];
  const std::vector<float> made = stg_test::values(size, static_cast<uint32_t>(size));
  for (int64_t i = 0; i < size; ++i) latents[shift + i] = made[i];
  for (T& row : rows) row = stg::Cast<T>::from_float(kPoison);
  std::vector<float> timesteps(copies + kMargin, kPoison), scale{5, 6, 0.37f, 7}, timestep{1, 2, 937.25f, 3};
  const int64_t counter = kStep;
  const StgFanOutRows p{latents + shift, rows + kMargin + shift, timesteps.data(), scale.data(), timestep.data(),
                        &counter,        size,                   copies,           copies,       0};
  stg_test::fan_out_on_host<T>(p, threads);
  int64_t wrong = 0;
  for (int64_t i = 0; i < 4 * 4096; ++i) {
    const int64_t at = i - kMargin - shift;
    const bool written = at >= 0 && at < copies * size;
    const float expected = written ? made[at % size] * 0.37f : kPoison;
    wrong += widened(rows[i]) != widened(stg::Cast<T>::from_float(expected));
  }
  for (int64_t i = 0; i < copies + kMargin; ++i) wrong += timesteps[i] != (i < copies ? 937.25f : kPoison);
  checks.expect(wrong == 0, "rows differ", size, threads);
}

void check_vectors_fit(Checks& checks) {
  for (int64_t element : {2, 4}) {
    for (int64_t count : {4, 8}) {
      for (uint64_t address = 64; address < 96; address += element) {
        for (int64_t length = 0; length < 33; ++length) {
          const int64_t width = element * count < 16 ? element * count : 16;
          bool fits = length % count == 0;
          for (int64_t row = 0; row < 3; ++row) fits = fits && (address + row * length * element) % width == 0;
          checks.expect(stg::vectors_fit(address, element, length, count) == fits, "vectors fit", address, length);
        }
      }
    }
  }
}

}  // namespace

int main() {
  Checks checks;
  check_vectors_fit(checks);
  for (int64_t size : {0, 1, 7, 8, 9, 15, 16, 24, 100, 1000, 1024, 4000}) {
    for (int64_t copies : {1, 2, 3}) {
      for (int64_t threads : {1, 3, 32, 257}) {
        for (int64_t shift : {0, 1, 4, 8}) {
          check<float>(checks, size, copies, threads, shift);
          check<Half>(checks, size, copies, threads, shift);
        }
      }
    }
  }
  return checks.result();
}
