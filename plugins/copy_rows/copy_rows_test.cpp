// The kernel against a plain loop. Built as it is, and with the mutants.
#include "copy_rows/copy_rows.cu"

#include <vector>

#include "test_values.h"

namespace {

using stg_test::Checks;

constexpr char kPoison = 0x5a;
constexpr int64_t kMargin = 64;

void check_split(Checks& checks, uint64_t destination, uint64_t source, int64_t bytes) {
  const stg::CopySplit split = stg::split_copy(destination, source, bytes);
  checks.expect(split.head + split.vectors * split.unit + split.tail == bytes, "not all bytes", split.unit, bytes);
  checks.expect(split.head >= 0 && split.head < 16 && split.tail >= 0 && split.tail < 16, "ends", split.head,
                split.tail);
  if (split.vectors > 0) {
    const bool aligned = (destination + split.head) % split.unit == 0 && (source + split.head) % split.unit == 0;
    checks.expect(aligned, "a vector is not aligned", destination, source);
  }
  int widest = 16;
  while (destination % widest != source % widest) widest /= 2;
  checks.expect(split.unit == widest, "not the widest unit", destination, source);
}

// Copies of these lengths, each between its own offsets from an aligned address.
struct Memory {
  std::vector<int64_t> lengths;
  std::vector<int64_t> offsets;
  std::vector<char> source, got, expected;
  std::vector<StgRowCopy> copies;

  explicit Memory(const std::vector<int64_t>& lengths_, uint32_t seed) : lengths(lengths_) {
    int64_t size = 0;
    for (size_t i = 0; i < lengths.size(); ++i) {
      offsets.push_back(size);
      size += (lengths[i] + 2 * kMargin + 15) / 16 * 16;
    }
    for (float value : stg_test::values(size + 16, seed)) source.push_back(static_cast<char>(value * 120));
    got.assign(size + 16, kPoison);
    expected = got;
    for (size_t i = 0; i < lengths.size(); ++i) {
      const int64_t to = offsets[i] + kMargin / 2 + (7 * i + seed) % 17, from = offsets[i] + kMargin / 2 + i % 19;
      copies.push_back(StgRowCopy{got.data() + to, source.data() + from, lengths[i]});
      for (int64_t k = 0; k < lengths[i]; ++k) expected[to + k] = source[from + k];
    }
  }
};

void check_copies(Checks& checks, const std::vector<int64_t>& lengths, uint32_t seed) {
  Memory memory(lengths, seed);
  const StgCopyRows rows{memory.copies.data(), static_cast<int64_t>(memory.copies.size())};
  stg_test::set_order(stg_test::kOrders[seed % 3]);
  checks.expect(stg_copy_rows(&rows, nullptr) == cudaSuccess, "not launched", lengths.size(), seed);
  checks.expect(memory.got == memory.expected, "copies differ", lengths.size(), seed);
}

}  // namespace

int main() {
  Checks checks;
  for (uint64_t destination = 64; destination < 96; ++destination) {
    for (uint64_t source = 64; source < 96; ++source) {
      for (int64_t bytes : {0, 1, 2, 3, 15, 16, 17, 31, 32, 100}) check_split(checks, destination, source, bytes);
    }
  }
  const int64_t chunk = stg::kCopyChunk * stg::kCopyWidest;
  for (uint32_t seed = 0; seed < 17; ++seed) {
    check_copies(checks, {0}, seed);
    check_copies(checks, {0, 5, 0, 16, 0}, seed);
    check_copies(checks, {1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 100}, seed);
    check_copies(checks, {chunk - 1, chunk, chunk + 1, 2 * chunk + 17, 3}, seed);
    check_copies(checks, std::vector<int64_t>(2 * stg::kCopyBatch + 3, 50), seed);
  }
  return checks.result();
}
