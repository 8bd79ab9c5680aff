// The threads of one block: which of them may go on, and what the others wait for.
#pragma once

#include <stdint.h>

#include <string>
#include <vector>

#include "order.h"

namespace cuda_on_host {

constexpr int kLanes = 32;

// A lane's value for a shuffle, and the one it gets.
struct Shuffle {
  uint32_t mask;
  uint32_t from;
  int line;
  uint64_t given;
  uint64_t received;
};

class Block {
 public:
  void start(int threads);

  // A thread that may go on, or -1.
  int next(Order& order);
  bool finished() const { return returned_ == threads_; }

  void returns() { ++returned_; }
  void reaches_barrier(int line);
  void reaches_shuffle(int thread, const Shuffle& shuffle);
  uint64_t received(int thread) const { return shuffles_[thread].received; }

  // Why none of the threads can go on.
  std::string reason() const;

 private:
  // Lanes, as bits, that may go on, or wait in a shuffle.
  struct Warp {
    uint32_t ready;
    uint32_t in_shuffle;
  };

  void release(int warp, uint32_t lanes);
  void release_block();
  bool meets(int warp, const Shuffle& shuffle) const;

  int threads_ = 0, returned_ = 0, at_barrier_ = 0, barrier_line_ = 0;
  uint32_t ready_warps_ = 0;
  std::vector<Warp> warps_;
  std::vector<Shuffle> shuffles_;
  std::string mistake_;
};

}  // namespace cuda_on_host
