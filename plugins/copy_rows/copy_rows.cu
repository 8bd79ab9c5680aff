#include "copy_rows/copy_rows.h"

#include "copy_rows/split.h"
#include "launch.h"

namespace {

__global__ void __launch_bounds__(stg::kCopyThreads) copy_kernel(const __grid_constant__ stg::CopyBatch batch) {
  const int copy = stg::copy_of_block(batch, blockIdx.x);
  stg::copy_share(batch.copies[copy], blockIdx.x - batch.first_chunk[copy], threadIdx.x);
}

}  // namespace

int stg_copy_rows(const StgCopyRows* rows, void* stream) {
  for (int64_t at = 0; at < rows->count; at += stg::kCopyBatch) {
    stg::CopyBatch batch;
    const int64_t blocks = stg::fill_batch(rows->copies + at, rows->count - at, &batch);
    if (blocks == 0) continue;
    if (blocks > INT32_MAX) return cudaErrorInvalidValue;
    const cudaError_t error = stg::launch(copy_kernel, static_cast<unsigned>(blocks), stg::kCopyThreads,
                                          static_cast<cudaStream_t>(stream), batch);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
