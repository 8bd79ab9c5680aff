#include "guided_step/guided_step.h"

#include "guided_step/arithmetic.h"
#include "half.cuh"
#include "launch.h"

namespace {

using stg::Moments;
using stg::Products;
using stg::StepScalars;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = 512;  // per video: enough to fill a GPU, few enough for one block to fold
constexpr int kVector = 4;           // values per thread and turn: 16 bytes of latents

// One block's share of its video's sums; the workspace holds [video][block] of them.
struct Partials {
  Moments cond;
  Moments pred;
  Products products;
};

// nvcc 13.0 splits a plain vector store here.
template <bool kAligned>
__device__ __forceinline__ void store(float* to, int64_t left, const float (&from)[kVector]) {
  if (kAligned) {
    if (left > 0) __stwb(reinterpret_cast<float4*>(to), make_float4(from[0], from[1], from[2], from[3]));
  } else {
    stg::store<false>(to, left, from);
  }
}

__device__ __forceinline__ StepScalars scalars(const StgGuidedStep& p, int64_t step) {
  return StepScalars{p.rescale[step], p.latents_factor[step], p.pred_factor[step]};
}

// A pass's predictions for the values from `at` on.
template <class T, bool kAligned>
__device__ __forceinline__ void load_pred(const StgGuidedStep& p, int pass, int64_t at, int64_t left,
                                          float (&pred)[kVector]) {
  stg::load<kAligned>(static_cast<const T*>(p.preds) + pass * p.videos * p.length + at, left, pred);
}

// The guided prediction of the kVector values from place `i` of the video on, with uncond times `scale`; `cond` comes
// back too.
template <class T, bool kAligned>
__device__ __forceinline__ void guided(const StgGuidedStep& p, int64_t step, float scale, int64_t i,
                                       float (&cond)[kVector], float (&pred)[kVector]) {
  const int64_t at = blockIdx.y * p.length + i, left = p.length - i;
  load_pred<T, kAligned>(p, p.cond, at, left, cond);
#pragma unroll
  for (int k = 0; k < kVector; ++k) pred[k] = cond[k];
  for (int pass = 0; pass < p.passes; ++pass) {
    if (pass == p.cond) continue;
    float other[kVector];
    load_pred<T, kAligned>(p, pass, at, left, other);
    const float* weights = p.weights + step * p.weights_stride + pass * p.frames;
    const float factor = pass == p.uncond ? scale : 1.0f;
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      // Behind the video's end there is nothing to weigh.
      const int64_t frame = p.frames == 1 || k >= left ? 0 : (i + k) * p.frames / p.length;
      pred[k] = stg::add_pass(pred[k], factor * other[k], cond[k], weights[frame]);
    }
  }
}

// Velocities become the clean latents that they mean, if these are rescaled.
template <bool kAligned>
__device__ __forceinline__ void to_rescaled_space(const StgGuidedStep& p, int64_t step, int64_t i, float (&cond)[kVector],
                                                  float (&pred)[kVector]) {
  if (p.noise_level == nullptr) return;
  float latents[kVector];
  stg::load<kAligned>(p.latents + blockIdx.y * p.length + i, p.length - i, latents);
#pragma unroll
  for (int k = 0; k < kVector; ++k) {
    cond[k] = stg::clean_latents(latents[k], cond[k], p.noise_level[step]);
    pred[k] = stg::clean_latents(latents[k], pred[k], p.noise_level[step]);
  }
}

__device__ __forceinline__ Moments moments_of_valid(const float (&values)[kVector], int64_t left) {
  if (left >= kVector) return stg::moments_of(values);
  Moments sum = stg::no_moments();
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    if (i < left) sum = stg::merge(sum, Moments{1.0f, values[i], 0.0f});
  }
  return sum;
}

__device__ __forceinline__ Moments shuffle_down(Moments mine, int offset) {
  return Moments{__shfl_down_sync(~0u, mine.count, offset), __shfl_down_sync(~0u, mine.mean, offset),
                 __shfl_down_sync(~0u, mine.m2, offset)};
}

__device__ __forceinline__ Products shuffle_down(Products mine, int offset) {
  return Products{__shfl_down_sync(~0u, mine.cond_uncond, offset),
                  __shfl_down_sync(~0u, mine.uncond_uncond, offset)};
}

// Folds the threads' sums in a fixed order; thread 0 has the result.
template <class Sum>
__device__ Sum fold_block(Sum mine) {
  __shared__ Sum shared[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine = stg::merge(mine, shuffle_down(mine, offset));
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < kWarps; ++warp) mine = stg::merge(mine, shared[warp]);
  }
  __syncthreads();
  return mine;
}

// Thread 0's value, for all threads of the block.
__device__ float broadcast(float value) {
  __shared__ float shared;
  if (threadIdx.x == 0) shared = value;
  __syncthreads();
  return shared;
}

__device__ __forceinline__ Partials* partials_of_video(const StgGuidedStep& p) {
  return static_cast<Partials*>(p.workspace) + blockIdx.y * gridDim.x;
}

// Every block folds its video's partials in the same order, so all of them use the same factor.
__device__ float rescale_of_video(const StgGuidedStep& p, StepScalars s) {
  Moments of_cond = stg::no_moments(), of_pred = stg::no_moments();
  const Partials* partials = partials_of_video(p);
  for (int i = threadIdx.x; i < gridDim.x; i += kThreads) {
    of_cond = stg::merge(of_cond, partials[i].cond);
    of_pred = stg::merge(of_pred, partials[i].pred);
  }
  of_cond = fold_block(of_cond);
  of_pred = fold_block(of_pred);
  return broadcast(stg::rescale_factor(of_cond, of_pred, s.rescale));
}

// The same for the factor of uncond.
__device__ float projection_of_video(const StgGuidedStep& p) {
  Products sum = stg::no_products();
  const Partials* partials = partials_of_video(p);
  for (int i = threadIdx.x; i < gridDim.x; i += kThreads) sum = stg::merge(sum, partials[i].products);
  return broadcast(stg::projection(fold_block(sum)));
}

// Partial inner products of cond and uncond.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) products_kernel(StgGuidedStep p) {
  const int64_t video = blockIdx.y * p.length;
  Products sum = stg::no_products();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < p.length;
       i += stride) {
    const int64_t at = video + i, left = p.length - i;
    float cond[kVector], uncond[kVector];
    load_pred<T, kAligned>(p, p.cond, at, left, cond);
    load_pred<T, kAligned>(p, p.uncond, at, left, uncond);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      sum = stg::merge(sum, Products{cond[k] * uncond[k], uncond[k] * uncond[k]});
    }
  }
  sum = fold_block(sum);
  if (threadIdx.x == 0) partials_of_video(p)[blockIdx.x].products = sum;
}

// Partial moments of cond and of the guided prediction.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) moments_kernel(StgGuidedStep p) {
  const int64_t step = *p.counter;
  const float scale = p.uncond >= 0 ? projection_of_video(p) : 1.0f;
  Moments of_cond = stg::no_moments(), of_pred = stg::no_moments();
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < p.length;
       i += stride) {
    float cond[kVector], pred[kVector];
    guided<T, kAligned>(p, step, scale, i, cond, pred);
    to_rescaled_space<kAligned>(p, step, i, cond, pred);
    of_cond = stg::merge(of_cond, moments_of_valid(cond, p.length - i));
    of_pred = stg::merge(of_pred, moments_of_valid(pred, p.length - i));
  }
  of_cond = fold_block(of_cond);
  of_pred = fold_block(of_pred);
  if (threadIdx.x == 0) {
    Partials* out = partials_of_video(p) + blockIdx.x;
    out->cond = of_cond;
    out->pred = of_pred;
  }
}

// next += sum of factors[j]*history[j] for j from `first` to before `last`.
template <bool kAligned>
__device__ __forceinline__ void add_history(const StgGuidedStep& p, const float* factors, int64_t first,
                                            int64_t last, int64_t at, int64_t left, float (&next)[kVector]) {
  for (int64_t j = first; j < last; ++j) {
    if (factors[j] == 0.0f) continue;
    float value[kVector];
    stg::load<kAligned>(p.history + j * p.videos * p.length + at, left, value);
#pragma unroll
    for (int i = 0; i < kVector; ++i) next[i] = fmaf(factors[j], value[i], next[i]);
  }
}

// x' = initial_factor*x_T + sum over the noise and the predictions so far, the newest of which is `pred`.
template <bool kAligned>
__device__ void step_from_history(const StgGuidedStep& p, int64_t step, int64_t at, int64_t left,
                           const float (&pred)[kVector], float (&next)[kVector]) {
  const float* factors = p.history_factors + step * p.slots;
  float value[kVector];
  stg::load<kAligned>(p.initial + at, left, value);
#pragma unroll
  for (int i = 0; i < kVector; ++i) next[i] = p.initial_factor[step] * value[i] + factors[step] * pred[i];
  add_history<kAligned>(p, factors, 0, step, at, left, next);
  add_history<kAligned>(p, factors, p.capacity, p.slots, at, left, next);
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads) apply_kernel(StgGuidedStep p) {
  const int64_t step = *p.counter;
  const StepScalars s = scalars(p, step);
  const float scale = p.uncond >= 0 ? projection_of_video(p) : 1.0f;
  const float factor = p.rescaled ? rescale_of_video(p, s) : 1.0f;
  const int64_t video = blockIdx.y * p.length;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < p.length;
       i += stride) {
    const int64_t at = video + i, left = p.length - i;
    float cond[kVector], pred[kVector], next[kVector], latents[kVector];
    guided<T, kAligned>(p, step, scale, i, cond, pred);
    const bool of_clean = p.rescaled && p.noise_level != nullptr;
    if (of_clean || p.single_step) stg::load<kAligned>(p.latents + at, left, latents);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      pred[k] = of_clean ? stg::rescaled_velocity(pred[k], latents[k], p.noise_level[step], factor) : pred[k] * factor;
    }
    if (p.history != nullptr) store<kAligned>(p.history + step * p.videos * p.length + at, left, pred);
    if (p.single_step) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) next[k] = stg::single_step(latents[k], pred[k], s);
    } else {
      step_from_history<kAligned>(p, step, at, left, pred, next);
    }
    store<kAligned>(p.latents + at, left, next);
  }
  // The last block to finish moves the counter: by then every block has read it.
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    if (atomicAdd(p.finished, 1u) == gridDim.x * gridDim.y - 1) {
      *p.finished = 0;
      *p.counter = step + 1;
    }
  }
}

template <class T>
bool rows_fit(const void* rows, int64_t length) {
  return stg::vectors_fit(static_cast<const T*>(rows), length, kVector);
}

template <class T>
bool all_aligned(const StgGuidedStep& p) {
  return rows_fit<T>(p.preds, p.length) && rows_fit<float>(p.latents, p.length) &&
         rows_fit<float>(p.history, p.length) && rows_fit<float>(p.initial, p.length);
}

unsigned blocks_per_video(int64_t length) {
  const int64_t needed = (length + kThreads * kVector - 1) / (kThreads * kVector);
  return static_cast<unsigned>(needed < 1 ? 1 : needed < kMaxBlocks ? needed : kMaxBlocks);
}

template <class T, bool kAligned>
cudaError_t launch(const StgGuidedStep& p, cudaStream_t stream) {
  const dim3 grid(blocks_per_video(p.length), static_cast<unsigned>(p.videos));
  cudaError_t error = cudaSuccess;
  if (p.uncond >= 0) error = stg::launch(products_kernel<T, kAligned>, grid, kThreads, stream, p);
  if (error == cudaSuccess && p.rescaled) {
    error = stg::launch(moments_kernel<T, kAligned>, grid, kThreads, stream, p);
  }
  if (error != cudaSuccess) return error;
  return stg::launch(apply_kernel<T, kAligned>, grid, kThreads, stream, p);
}

template <class T>
cudaError_t launch(const StgGuidedStep& p, cudaStream_t stream) {
  return all_aligned<T>(p) ? launch<T, true>(p, stream) : launch<T, false>(p, stream);
}

}  // namespace

int64_t stg_guided_step_workspace(int64_t videos) { return videos * kMaxBlocks * sizeof(Partials); }

int stg_guided_step(const StgGuidedStep* step, void* stream) {
  if (!step->single_step && step->history == nullptr) return cudaErrorInvalidValue;
  const int passes = step->passes;
  if (step->cond < 0 || step->cond >= passes || step->uncond >= passes || step->uncond == step->cond) {
    return cudaErrorInvalidValue;
  }
  if (step->frames < 1 || step->length % step->frames != 0) return cudaErrorInvalidValue;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  return stg::with_type(step->dtype, [&](auto value) { return launch<decltype(value)>(*step, on); });
}
