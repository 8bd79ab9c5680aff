// CUDA's language and runtime for a C++ compiler: comes before the real headers on the include path.
//
// A launch runs before it returns, one block after the other; the threads of a block are fibers that take
// turns at barriers and shuffles. CUDA_ON_HOST_ORDER says in which order: `forward` (unless set), `reverse`,
// or a number, the seed of a random one. What CUDA leaves undefined is an error; see execution.h.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include <tuple>
#include <utility>

#include "execution.h"

#define __host__
#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
// As many empty instructions before the kernel, where a launch finds how many threads it may have. GCC 12 takes
// no named constant here, which sizeof hides.
#define __launch_bounds__(threads, ...) \
  __attribute__((patchable_function_entry(sizeof(char[threads]), sizeof(char[threads]))))
// One block runs at a time. Thread-local memory is all of one place, so that it can be poisoned before each.
#define __shared__ static thread_local

struct alignas(16) float4 {
  float x, y, z, w;
};

inline float4 make_float4(float x, float y, float z, float w) { return float4{x, y, z, w}; }

static const uint3& threadIdx = cuda_on_host::place.thread;
static const uint3& blockIdx = cuda_on_host::place.block;
static const dim3& blockDim = cuda_on_host::place.block_size;
static const dim3& gridDim = cuda_on_host::place.grid_size;

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "what every GPU takes as a kernel's parameters");
  using Call = std::pair<void (*)(Parameters...), std::tuple<Parameters...>>;
  const Call call{kernel, std::tuple<Parameters...>(std::forward<Arguments>(arguments)...)};
  const auto run = [](const void* call) {
    std::apply(static_cast<const Call*>(call)->first, static_cast<const Call*>(call)->second);
  };
  return cuda_on_host::execute(*config, reinterpret_cast<void*>(kernel), run, &call);
}

inline void __syncthreads(int line = __builtin_LINE()) { cuda_on_host::wait_for_block(line); }
inline void __threadfence() {}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int line = __builtin_LINE()) {
  const unsigned lane = cuda_on_host::lane();
  return cuda_on_host::shuffle(mask, value, lane + offset < 32 ? lane + offset : lane, line);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned offset, int line = __builtin_LINE()) {
  return cuda_on_host::shuffle(mask, value, cuda_on_host::lane() ^ offset, line);
}

template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address += value;
  return before;
}

inline void __stwb(float4* address, float4 value) { *address = value; }
