#include "block.h"

namespace cuda_on_host {

void Block::start(int threads) {
  threads_ = threads;
  returned_ = at_barrier_ = 0;
  mistake_.clear();
  warps_.assign((threads + kLanes - 1) / kLanes, Warp{});
  shuffles_.assign(threads, Shuffle{});
  release_block();
}

int Block::next(Order& order) {
  if (ready_warps_ == 0 || !mistake_.empty()) return -1;
  const int warp = order.choose(ready_warps_), lane = order.choose(warps_[warp].ready);
  warps_[warp].ready &= ~(1u << lane);
  if (warps_[warp].ready == 0) ready_warps_ &= ~(1u << warp);
  return warp * kLanes + lane;
}

void Block::release(int warp, uint32_t lanes) {
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

void Block::release_block() {
  for (int first = 0; first < threads_; first += kLanes) {
    const int lanes = threads_ - first;
    release(first / kLanes, lanes < kLanes ? (1u << lanes) - 1 : ~0u);
  }
}

void Block::reaches_barrier(int line) {
  if (at_barrier_ == 0) barrier_line_ = line;
  if (line != barrier_line_) {
    mistake_ = "a thread reaches the barrier of line " + std::to_string(line) + ", another one that of line " +
               std::to_string(barrier_line_);
  }
  if (++at_barrier_ < threads_) return;
  at_barrier_ = 0;
  release_block();
}

// Whether every lane of the mask waits in the same shuffle.
bool Block::meets(int warp, const Shuffle& shuffle) const {
  if ((warps_[warp].in_shuffle & shuffle.mask) != shuffle.mask) return false;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((shuffle.mask >> lane & 1u) == 0) continue;
    const Shuffle& other = shuffles_[warp * kLanes + lane];
    if (other.mask != shuffle.mask || other.line != shuffle.line) return false;
  }
  return true;
}

void Block::reaches_shuffle(int thread, const Shuffle& shuffle) {
  const int warp = thread / kLanes;
  const auto takes_part = [&](uint32_t lane) { return lane < kLanes && (shuffle.mask >> lane & 1u) != 0; };
  if (!takes_part(thread % kLanes) || !takes_part(shuffle.from)) {
    mistake_ = "lane " + std::to_string(thread % kLanes) + " asks lane " + std::to_string(shuffle.from) +
               " in the shuffle of line " + std::to_string(shuffle.line) + ", and one of them is not in its mask";
    return;
  }
  shuffles_[thread] = shuffle;
  warps_[warp].in_shuffle |= 1u << thread % kLanes;
  if (!meets(warp, shuffle)) return;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((shuffle.mask >> lane & 1u) == 0) continue;
    Shuffle& mine = shuffles_[warp * kLanes + lane];
    mine.received = shuffles_[warp * kLanes + mine.from].given;
  }
  warps_[warp].in_shuffle &= ~shuffle.mask;
  release(warp, shuffle.mask);
}

std::string Block::reason() const {
  if (!mistake_.empty()) return mistake_;
  int in_shuffle = 0, line = 0;
  for (int thread = 0; thread < threads_; ++thread) {
    if ((warps_[thread / kLanes].in_shuffle >> thread % kLanes & 1u) == 0) continue;
    ++in_shuffle;
    line = shuffles_[thread].line;
  }
  std::string reason = "no thread can go on: " + std::to_string(returned_) + " returned";
  if (at_barrier_ > 0) {
    reason += ", " + std::to_string(at_barrier_) + " wait at the barrier of line " + std::to_string(barrier_line_);
  }
  if (in_shuffle > 0) {
    reason += ", " + std::to_string(in_shuffle) + " in the shuffle of line " + std::to_string(line);
  }
  return reason;
}

}  // namespace cuda_on_host
