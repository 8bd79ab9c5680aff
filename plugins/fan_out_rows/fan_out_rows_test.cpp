// The kernel against plain loops. Built as it is, and with the mutants.
#include "fan_out_rows/fan_out_rows.cu"

#include <vector>

#include "test_values.h"

namespace {

using stg_test::Checks;

constexpr int64_t kStep = 2, kMargin = 16;
constexpr float kPoison = -777.0f;

int32_t dtype_of(float) { return kStgFloat32; }
int32_t dtype_of(__half) { return kStgFloat16; }
int32_t dtype_of(__nv_bfloat16) { return kStgBfloat16; }

// Rows that start `shift` values from an aligned address, with poison around them.
template <class T>
void check(Checks& checks, int64_t size, int64_t copies, int64_t shift) {
  std::vector<float> latents = stg_test::values(shift + size, static_cast<uint32_t>(size));
  std::vector<T> rows(shift + copies * size + 2 * kMargin, stg::Cast<T>::from_float(kPoison));
  std::vector<float> timesteps(copies + kMargin, kPoison), scale{5, 6, 0.37f, 7}, timestep{1, 2, 937.25f, 3};
  const int64_t counter = kStep;
  const StgFanOutRows p{latents.data() + shift, rows.data() + kMargin + shift, timesteps.data(), scale.data(),
                        timestep.data(),        &counter,                      size,             copies,
                        copies,                 dtype_of(T{})};
  checks.expect(stg_fan_out_rows(&p, nullptr) == cudaSuccess, "not launched", size, copies);
  int64_t wrong = 0;
  for (int64_t i = 0; i < static_cast<int64_t>(rows.size()); ++i) {
    const int64_t at = i - kMargin - shift;
    const bool written = at >= 0 && at < copies * size;
    const float expected = written ? latents[shift + at % size] * 0.37f : kPoison;
    wrong += stg::Cast<T>::to_float(rows[i]) != stg::Cast<T>::to_float(stg::Cast<T>::from_float(expected));
  }
  for (int64_t i = 0; i < copies + kMargin; ++i) wrong += timesteps[i] != (i < copies ? 937.25f : kPoison);
  checks.expect(wrong == 0, "rows differ", size, copies);
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
      for (int64_t shift : {0, 1, 4, 8}) {
        stg_test::set_order(stg_test::kOrders[(size + copies) % 3]);
        check<float>(checks, size, copies, shift);
        check<__half>(checks, size, copies, shift);
        check<__nv_bfloat16>(checks, size, copies, shift);
      }
    }
  }
  // More values than the threads of the largest grid take in a turn.
  if (checks.failed == 0) check<float>(checks, kMaxBlocks * kThreads * stg::kFanOutVector + 8, 1, 0);
  return checks.result();
}
