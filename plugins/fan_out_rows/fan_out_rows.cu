#include "fan_out_rows/fan_out_rows.h"

#include "fan_out_rows/fan_out.h"
#include "half.cuh"
#include "launch.h"

namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) fan_out_kernel(StgFanOutRows p) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  stg::fan_out<T, kAligned>(p, thread, static_cast<int64_t>(gridDim.x) * kThreads);
}

template <class T>
cudaError_t launch(const StgFanOutRows& p, cudaStream_t stream) {
  const int64_t work = p.size / stg::kFanOutVector + p.timesteps + 1;
  const int64_t needed = (work + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(needed < kMaxBlocks ? needed : kMaxBlocks);
  const auto kernel = stg::fan_out_aligned<T>(p) ? fan_out_kernel<T, true> : fan_out_kernel<T, false>;
  return stg::launch(kernel, blocks, kThreads, stream, p);
}

}  // namespace

int stg_fan_out_rows(const StgFanOutRows* fan_out, void* stream) {
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return stg::with_type(fan_out->dtype, [&](auto value) { return launch<decltype(value)>(*fan_out, on); });
}
