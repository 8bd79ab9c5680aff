#include "qk_norm_rope/qk_norm_rope.h"

#include "half.cuh"
#include "launch.h"
#include "qk_norm_rope/norm_rope.h"

namespace {

// Over `lanes` neighbouring threads, a power of two; every thread of the warp takes part.
struct WarpSum {
  int lanes;

  __device__ float operator()(float value) const {
    for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
    return value;
  }
};

// Over the block. Two buffers in turn: one barrier per sum, and none is written while it is still read.
struct BlockSum {
  float (*partials)[32];
  int turn = 0;

  __device__ float operator()(float value) {
    value = WarpSum{32}(value);
    float* sums = partials[turn];
    turn ^= 1;
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    float total = 0.0f;
    for (int warp = 0; warp < blockDim.x / 32; ++warp) total += sums[warp];
    return total;
  }
};

template <class T, bool kAligned>
__global__ void __launch_bounds__(stg::kWarpThreads, 4) warp_kernel(StgQKNormRope p, stg::NormLaunch launch) {
  WarpSum group_sum{launch.lanes};
  stg::norm_rope<T, kAligned>(p, stg::norm_place(p, launch, blockIdx.x, threadIdx.x), group_sum);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(stg::kMaxGroup / stg::kNormVector) block_kernel(StgQKNormRope p,
                                                                                  stg::NormLaunch launch) {
  __shared__ float partials[2][32];
  BlockSum group_sum{partials};
  stg::norm_rope<T, kAligned>(p, stg::norm_place(p, launch, blockIdx.x, threadIdx.x), group_sum);
}

template <class T, bool kAligned>
cudaError_t launch(const StgQKNormRope& p, cudaStream_t stream) {
  const stg::NormLaunch launch = stg::norm_launch(p);
  const unsigned blocks = static_cast<unsigned>(launch.blocks);
  const auto kernel = launch.lanes > 0 ? warp_kernel<T, kAligned> : block_kernel<T, kAligned>;
  return stg::launch(kernel, blocks, launch.threads, stream, p, launch);
}

template <class T>
cudaError_t launch(const StgQKNormRope& p, cudaStream_t stream) {
  return stg::norm_aligned<T>(p) ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace

int stg_qk_norm_rope(const StgQKNormRope* norm, void* stream) {
  if (!stg::norm_valid(*norm)) return cudaErrorInvalidValue;
  if (norm->rows == 0 || norm->tokens == 0) return cudaSuccess;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return stg::with_type(norm->dtype, [&](auto value) { return launch<decltype(value)>(*norm, on); });
}
