// Norm and rotation, and the share of one thread in them, on host and device.
#pragma once

#include <math.h>

#include "qk_norm_rope/qk_norm_rope.h"
#include "vectors.h"

namespace stg {

constexpr int kNormVector = 8;  // channels of a thread: 16 bytes of a 16-bit type
constexpr int kNormPairs = kNormVector / 2;
constexpr int64_t kMaxGroup = 1024 * kNormVector;

// 1/sqrt(mean of squares + eps)
STG_BOTH float inverse_rms(float sum_of_squares, float count, float eps) {
  return 1.0f / sqrtf(sum_of_squares / count + eps);
}

// x*weight/rms
STG_BOTH float normed(float x, float inverse, float weight) { return x * inverse * weight; }

struct Pair {
  float even, odd;
};

// (a, b) -> (a*cos - b*sin, b*cos + a*sin)
STG_BOTH Pair rotate(Pair x, float cos, float sin) {
  return Pair{x.even * cos - x.odd * sin, x.odd * cos + x.even * sin};
}

// `lanes` neighbouring threads of a warp share a group; 0: the whole block does.
struct NormLaunch {
  int64_t blocks;
  int threads;
  int lanes;
};

constexpr int kWarpThreads = 256;  // of a block whose groups lie within warps

STG_BOTH NormLaunch norm_launch(const StgQKNormRope& p) {
  const int64_t vectors = (p.group + kNormVector - 1) / kNormVector;
  const bool in_a_warp = p.group % kNormVector == 0 && vectors <= 32 && (vectors & (vectors - 1)) == 0;
  if (in_a_warp) {
    const int64_t threads = p.tokens * p.channels / kNormVector;
    return NormLaunch{(threads + kWarpThreads - 1) / kWarpThreads, kWarpThreads, static_cast<int>(vectors)};
  }
  return NormLaunch{p.tokens * (p.channels / p.group), static_cast<int>((vectors + 31) / 32 * 32), 0};
}

// Where a thread works, in all rows of q and k: channels of one token, the first of them `in_group` of its
// group. `left`: channels up to the group's end; at most 0 where a thread has nothing to do.
struct NormPlace {
  int64_t token;
  int channel;
  int in_group;
  int left;
};

STG_BOTH NormPlace norm_place(const StgQKNormRope& p, const NormLaunch& launch, uint32_t block, uint32_t thread) {
  const uint32_t group = static_cast<uint32_t>(p.group), channels = static_cast<uint32_t>(p.channels);
  if (launch.lanes == 0) {
    const uint32_t groups = channels / group, in_group = thread * kNormVector;
    return NormPlace{block / groups, static_cast<int>(block % groups * group + in_group),
                     static_cast<int>(in_group), static_cast<int>(group) - static_cast<int>(in_group)};
  }
  const uint32_t vectors = channels / kNormVector, item = block * kWarpThreads + thread;
  const int64_t token = item / vectors;
  const uint32_t channel = item % vectors * kNormVector;
  return NormPlace{token, static_cast<int>(channel), static_cast<int>(channel % group),
                   token < p.tokens ? kNormVector : 0};
}

// Pairs of the tables; they start again where every head has the same.
template <bool kAligned>
STG_BOTH void load_table(const float* table, const StgQKNormRope& p, NormPlace at, float (&to)[kNormPairs]) {
  const float* row = table + at.token * p.table_pairs;
  const uint32_t pairs = static_cast<uint32_t>(p.table_pairs), pair = static_cast<uint32_t>(at.channel) / 2;
  if (kAligned) {
    load<true>(row + pair % pairs, at.left, to);
  } else {
    for (int i = 0; i < kNormPairs; ++i) to[i] = 2 * i < at.left ? row[(pair + i) % pairs] : 0.0f;
  }
}

// `group_sum` adds up a value over the threads of the group.
template <class GroupSum>
STG_BOTH float norm_factor(const StgQKNormRope& p, NormPlace at, GroupSum& group_sum, float (&x)[kNormVector]) {
  const float count = static_cast<float>(p.group);
  if (p.centred) {
    float sum = 0.0f;
    for (int i = 0; i < kNormVector; ++i) sum += x[i];
    const float mean = group_sum(sum) / count;
    for (int i = 0; i < kNormVector; ++i) x[i] = i < at.left ? x[i] - mean : 0.0f;
  }
  float squares = 0.0f;
  for (int i = 0; i < kNormVector; ++i) squares = fmaf(x[i], x[i], squares);
  return inverse_rms(group_sum(squares), count, p.eps);
}

struct NormTables {
  float cos[kNormPairs];
  float sin[kNormPairs];
};

STG_BOTH void rotate_pairs(const NormTables& tables, float (&x)[kNormVector]) {
  for (int i = 0; i < kNormVector; i += 2) {
    const Pair pair = rotate(Pair{x[i], x[i + 1]}, tables.cos[i / 2], tables.sin[i / 2]);
    x[i] = pair.even;
    x[i + 1] = pair.odd;
  }
}

// All rows of q, or of k. The next row is under way during each reduction.
template <class T, bool kAligned, bool kKeys, class GroupSum>
STG_BOTH void norm_rows(const StgQKNormRope& p, NormPlace at, const NormTables& tables, GroupSum& group_sum) {
  const T* in = static_cast<const T*>(kKeys ? p.k : p.q);
  T* out = static_cast<T*>(kKeys ? p.k_out : p.q_out);
  const float* weights = (kKeys ? p.k_weight : p.q_weight) + at.in_group;
  const float* biases = kKeys ? p.k_bias : p.q_bias;
  const int64_t row_size = p.tokens * p.channels;
  int64_t offset = at.token * p.channels + at.channel;
  Packed<T, kNormVector> next = load_packed<kAligned, kNormVector>(in + offset, at.left);
  for (int row = 1; row <= p.rows; ++row, offset += row_size) {
    float x[kNormVector], values[kNormVector];
    unpack(next, x);
    if (row < p.rows) next = load_packed<kAligned, kNormVector>(in + offset + row_size, at.left);
    const float inverse = norm_factor(p, at, group_sum, x);
    // Read again for each row: from the cache, and the registers are worth more to the rows under way.
    load<kAligned>(weights, at.left, values);
    for (int i = 0; i < kNormVector; ++i) x[i] = normed(x[i], inverse, values[i]);
    if (biases != nullptr) {
      load<kAligned>(biases + at.in_group, at.left, values);
      for (int i = 0; i < kNormVector; ++i) x[i] += values[i];
    }
    if (p.cos != nullptr) rotate_pairs(tables, x);
    store<kAligned>(out + offset, at.left, x);
  }
}

// All rows of q and k at one place; the tables are read once for all of them.
template <class T, bool kAligned, class GroupSum>
STG_BOTH void norm_rope(const StgQKNormRope& p, NormPlace at, GroupSum& group_sum) {
  NormTables tables = {};
  if (p.cos != nullptr) {
    load_table<kAligned>(p.cos, p, at, tables.cos);
    load_table<kAligned>(p.sin, p, at, tables.sin);
  }
  norm_rows<T, kAligned, false>(p, at, tables, group_sum);
  if (p.k != nullptr) norm_rows<T, kAligned, true>(p, at, tables, group_sum);
}

// Sizes that fit together and into a launch; pairs must not straddle groups or tables.
inline bool norm_valid(const StgQKNormRope& p) {
  if (p.group <= 0 || p.group > kMaxGroup || p.channels <= 0 || p.channels % p.group != 0) return false;
  if ((p.k == nullptr) != (p.k_out == nullptr) || (p.cos == nullptr) != (p.sin == nullptr)) return false;
  if (p.cos != nullptr) {
    if (p.group % 2 != 0 || p.table_pairs <= 0 || p.channels % (2 * p.table_pairs) != 0) return false;
  }
  if (p.channels > INT32_MAX || p.rows > INT32_MAX) return false;
  const NormLaunch launch = norm_launch(p);
  return launch.blocks * launch.threads <= INT32_MAX;
}

template <class T>
bool norm_aligned(const StgQKNormRope& p) {
  for (const void* rows : {p.q, p.k, static_cast<const void*>(p.q_out), static_cast<const void*>(p.k_out)}) {
    if (!vectors_fit(static_cast<const T*>(rows), p.group, kNormVector)) return false;
  }
  for (const float* values : {p.q_weight, p.k_weight, p.q_bias, p.k_bias}) {
    if (!vectors_fit(values, p.group, kNormVector)) return false;
  }
  return p.cos == nullptr || (vectors_fit(p.cos, p.table_pairs, kNormPairs) && vectors_fit(p.sin, p.table_pairs, kNormPairs));
}

}  // namespace stg
