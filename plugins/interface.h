// Common to every kernel's C interface.
#pragma once

#include <stdint.h>

#if defined(_WIN32)
#define STG_EXPORT extern "C" __declspec(dllexport)
#else
#define STG_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Raised whenever a struct or a function of a kernel changes: the Python side refuses any other.
#define STG_KERNELS_ABI 5

enum StgDtype { kStgFloat32 = 0, kStgFloat16 = 1, kStgBfloat16 = 2 };

STG_EXPORT int stg_kernels_abi(void);
