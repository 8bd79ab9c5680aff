// Guidance, rescale and the solver's step in one pass over the latents, for a captured CUDA graph.
#pragma once

#include "interface.h"

// All pointers are device memory.
struct StgGuidedStep {
  const void* preds;     // (passes, videos, length) of `dtype`
  float* latents;        // (videos, length), read and written
  // Per-step values, one entry per step each. A step's weights are (passes, frames); they add up to 1 over the passes,
  // and cond's is not read. The weights of the next step are `weights_stride` further.
  const float* weights;
  const float* rescale;
  const float* noise_level;  // null: predictions are rescaled; else velocities, as the clean latents that they mean
  const float* latents_factor;
  const float* pred_factor;
  // Unless single_step: predictions so far, then the noise that is added, (slots, videos, length), of which
  // the predictions take `capacity`; x_T; and their factors; else null.
  float* history;
  const float* initial;
  const float* initial_factor;   // (capacity)
  const float* history_factors;  // (capacity, slots)
  int64_t capacity;
  int64_t slots;
  int64_t* counter;     // the step to run; advanced by one
  unsigned* finished;   // one zero, left at zero
  void* workspace;      // stg_guided_step_workspace(videos) bytes
  int64_t videos;
  int64_t length;
  int64_t frames;         // equal parts of a video, each with weights of its own
  int64_t weights_stride;
  int32_t passes;
  int32_t cond;           // its index among the passes
  int32_t uncond;         // CFG-Zero*: index of the pass that is scaled by <cond, uncond>/(|uncond|^2 + 1e-8) of its
                          // video; -1: none
  int32_t dtype;
  int32_t rescaled;       // 0: the statistics are not computed
  int32_t single_step;    // 0: history is used
};

STG_EXPORT int64_t stg_guided_step_workspace(int64_t videos);
// Enqueues on a stream; returns a cudaError_t.
STG_EXPORT int stg_guided_step(const StgGuidedStep* step, void* stream);
