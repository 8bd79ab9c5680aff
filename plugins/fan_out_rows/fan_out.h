// The share of one thread in the fan-out, on host and device.
#pragma once

#include "fan_out_rows/fan_out_rows.h"
#include "vectors.h"

namespace stg {

constexpr int kFanOutVector = 8;  // latents per thread and turn: 16 bytes of a 16-bit type

// Every latent is read once, whatever the number of copies.
template <class T, bool kAligned>
STG_BOTH void fan_out(const StgFanOutRows& p, int64_t thread, int64_t threads) {
  const int64_t step = *p.counter;
  for (int64_t i = thread; i < p.timesteps; i += threads) p.timestep_rows[i] = p.timestep[step];
  const float scale = p.input_scale[step];
  for (int64_t i = thread * kFanOutVector; i < p.size; i += threads * kFanOutVector) {
    float values[kFanOutVector];
    load<kAligned>(p.latents + i, p.size - i, values);
    for (int k = 0; k < kFanOutVector; ++k) values[k] *= scale;
    const Packed<T, kFanOutVector> packed = pack<T>(values);
    // nvcc 13.0 splits the vector stores of an unrolled loop.
    STG_NO_UNROLL
    for (int64_t copy = 0; copy < p.copies; ++copy) {
      store_packed<kAligned>(static_cast<T*>(p.rows) + copy * p.size + i, p.size - i, packed);
    }
  }
}

template <class T>
bool fan_out_aligned(const StgFanOutRows& p) {
  return vectors_fit(p.latents, p.size, kFanOutVector) &&
         vectors_fit(static_cast<const T*>(p.rows), p.size, kFanOutVector);
}

}  // namespace stg
