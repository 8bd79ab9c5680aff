// Queries and keys: norm in float32 over groups of channels, then rotary embedding, in one pass over memory.
#pragma once

#include "interface.h"

// All pointers are device memory. Channels are rotated in interleaved pairs (2i, 2i + 1).
struct StgQKNormRope {
  const void* q;          // (rows, tokens, channels) of `dtype`
  const void* k;          // the same, or null
  void* q_out;            // the same; may be q
  void* k_out;            // the same; may be k
  const float* q_weight;  // (group)
  const float* k_weight;
  const float* q_bias;    // (group), or null
  const float* k_bias;
  const float* cos;       // (tokens, table_pairs), one entry per pair; or null: no rotation
  const float* sin;
  int64_t rows;
  int64_t tokens;
  int64_t channels;
  int64_t group;           // channels that are normalised together: all, or those of a head; at most 8192
  int64_t table_pairs;     // of all channels, or of those of a head where every head has the same table
  float eps;
  int32_t centred;         // 1: the mean is subtracted first (layer norm)
  int32_t dtype;
};

// Enqueues on a stream; returns a cudaError_t.
STG_EXPORT int stg_qk_norm_rope(const StgQKNormRope* norm, void* stream);
