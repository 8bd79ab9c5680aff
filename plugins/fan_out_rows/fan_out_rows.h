// The latents to the rows of every pass: scaled, cast and replicated, with the step's timestep.
#pragma once

#include "interface.h"

// All pointers are device memory.
struct StgFanOutRows {
  const float* latents;       // (size)
  void* rows;                 // (copies, size) of `dtype`
  float* timestep_rows;       // (timesteps)
  const float* input_scale;   // one per step
  const float* timestep;      // one per step
  const int64_t* counter;     // the step to run
  int64_t size;               // videos * length
  int64_t copies;             // passes
  int64_t timesteps;          // values to fill with the step's timestep
  int32_t dtype;
};

// Enqueues on a stream; returns a cudaError_t.
STG_EXPORT int stg_fan_out_rows(const StgFanOutRows* fan_out, void* stream);
