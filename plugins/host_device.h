// Marks what host C++ and CUDA both compile. No __CUDA_ARCH__ branches in such code: what a host test
// proves is what the GPU runs.
#pragma once

#if defined(__CUDACC__)
#define STG_BOTH __host__ __device__ __forceinline__
#else
#define STG_BOTH inline
#endif
