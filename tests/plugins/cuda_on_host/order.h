// In which order the blocks of a grid run, and the threads of a block that could go on.
#pragma once

#include <stdint.h>

#include <vector>

namespace cuda_on_host {

class Order {
 public:
  // Of "forward", "reverse" or the seed of a random order; of null, forward. False where it is none of these.
  static bool parse(const char* text, Order* order);

  // One of the bits that are set.
  int choose(uint32_t bits);

  std::vector<int64_t> permutation(int64_t count);

 private:
  enum Kind { kForward, kReverse, kRandom };

  uint32_t random();

  Kind kind_ = kForward;
  uint32_t seed_ = 0;
};

}  // namespace cuda_on_host
