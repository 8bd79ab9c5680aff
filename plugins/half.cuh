// The 16-bit types of CUDA, for the templates of vectors.h, and the choice of a type by its dtype.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "interface.h"
#include "vectors.h"

namespace stg {

template <>
struct Cast<__half> {
  static STG_BOTH float to_float(__half x) { return __half2float(x); }
  static STG_BOTH __half from_float(float x) { return __float2half_rn(x); }
};

template <>
struct Cast<__nv_bfloat16> {
  static STG_BOTH float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  static STG_BOTH __nv_bfloat16 from_float(float x) { return __float2bfloat16_rn(x); }
};

// Calls `launch` with a value of the type that `dtype` names.
template <class Launch>
cudaError_t with_type(int32_t dtype, Launch launch) {
  switch (dtype) {
    case kStgFloat32:
      return launch(float{});
    case kStgFloat16:
      return launch(__half{});
    case kStgBfloat16:
      return launch(__nv_bfloat16{});
    default:
      return cudaErrorInvalidValue;
  }
}

}  // namespace stg
