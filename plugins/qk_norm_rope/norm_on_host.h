// The kernel run on the host, thread by thread, for tests.
#pragma once

#include <algorithm>
#include <vector>

#include "qk_norm_rope/norm_rope.h"

namespace stg_test {

// A sum over the threads that share one, one after the other: each pass over all threads finds one sum more.
struct SumOverPasses {
  std::vector<std::vector<float>>* sums;
  int64_t sharers;
  int64_t call;

  float operator()(float value) {
    const int64_t known = static_cast<int64_t>(sums->size()) - 1, at = call++;
    if (at < known) return (*sums)[at][sharers];
    if (at == known) (*sums)[at][sharers] += value;
    return 1.0f;
  }
};

// Threads share a sum as the kernels' reductions do: `lanes` neighbours within a warp, or a block.
template <class T>
void norm_pass(const StgQKNormRope& p, std::vector<std::vector<float>>* sums) {
  const stg::NormLaunch launch = stg::norm_launch(p);
  sums->emplace_back(launch.blocks * launch.threads, 0.0f);
  for (int64_t block = 0; block < launch.blocks; ++block) {
    for (int thread = 0; thread < launch.threads; ++thread) {
      const stg::NormPlace at = stg::norm_place(p, launch, block, thread);
      const int64_t item = block * launch.threads + thread;
      SumOverPasses group_sum{sums, launch.lanes ? item / 32 * 32 + item % 32 / launch.lanes : block, 0};
      if (stg::norm_aligned<T>(p)) {
        stg::norm_rope<T, true>(p, at, group_sum);
      } else {
        stg::norm_rope<T, false>(p, at, group_sum);
      }
    }
  }
}

// As one launch; every pass starts from what q and k were, since they may be written in place.
template <class T>
void norm_on_host(const StgQKNormRope& p) {
  const int64_t size = p.rows * p.tokens * p.channels;
  T* const inputs[2] = {static_cast<T*>(const_cast<void*>(p.q)), static_cast<T*>(const_cast<void*>(p.k))};
  std::vector<T> saved[2];
  for (int side = 0; side < 2; ++side) {
    if (inputs[side] != nullptr) saved[side].assign(inputs[side], inputs[side] + size);
  }
  const int64_t sums_of_a_thread = p.rows * (p.k == nullptr ? 1 : 2) * (p.centred ? 2 : 1);
  std::vector<std::vector<float>> sums;
  for (int64_t pass = 0; pass <= sums_of_a_thread; ++pass) {
    for (int side = 0; side < 2; ++side) std::copy(saved[side].begin(), saved[side].end(), inputs[side]);
    norm_pass<T>(p, &sums);
  }
}

}  // namespace stg_test
