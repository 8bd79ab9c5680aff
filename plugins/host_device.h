// Marks what host C++ and CUDA both compile. No __CUDA_ARCH__ branches in such code: what a host test
// proves is what the GPU runs.
#pragma once

#if defined(__CUDACC__)
#define STG_BOTH __host__ __device__ __forceinline__
// Before a loop: copies of its body would cost more than they save.
#define STG_NO_UNROLL _Pragma("unroll 1")
#else
#define STG_BOTH inline
#define STG_NO_UNROLL
#endif
