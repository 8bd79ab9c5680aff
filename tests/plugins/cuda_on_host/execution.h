// How a launch is executed, and what it is held to.
//
// cudaErrorInvalidConfiguration, cudaErrorLaunchOutOfResources: a grid or a block of sizes that no GPU takes, or
// of more threads than the kernel's launch bounds. cudaErrorLaunchFailure, with the reason on stderr: a barrier
// that some threads of the block do not reach, or reach in another line; a shuffle in which some lanes of the mask
// do not take part; a value from a lane that is not in the mask. Not seen: blocks that run at the same time.
#pragma once

#include <stdint.h>
#include <string.h>

#include "cuda_runtime_api.h"

namespace cuda_on_host {

struct Place {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

extern Place place;  // of the running thread

// Runs `thread(call)` once for every thread of a grid.
cudaError_t execute(const cudaLaunchConfig_t& config, void* kernel, void (*thread)(const void*), const void* call);

// Of the running thread: its place in its warp; a barrier; what lane `from` gives to the shuffle.
unsigned lane();
void wait_for_block(int line);
uint64_t shuffle_bits(unsigned mask, uint64_t value, unsigned from, int line);

template <class T>
T shuffle(unsigned mask, T value, unsigned from, int line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "what CUDA shuffles");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = shuffle_bits(mask, bits, from, line);
  memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace cuda_on_host
