// The emulation itself: kernels that are right, kernels that are not, and the rounding of the 16-bit types.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <vector>

#include "launch.h"
#include "test_values.h"

namespace {

using stg_test::Checks;

__global__ void places(dim3* seen, int* order, int* count) {
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const unsigned at = block * blockDim.x * blockDim.y * blockDim.z + thread;
  seen[at] = dim3(seen[at].x + 1, block, thread);
  order[(*count)++] = static_cast<int>(at);
}

__global__ void __launch_bounds__(96) sum_of_warps(const float* from, float* to) {
  __shared__ float sums[3];
  float value = from[threadIdx.x];
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(~0u, value, offset);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  to[threadIdx.x] = sums[0] + sums[1] + sums[2];
}

__global__ void half_warps(int* to) {
  const int thread = static_cast<int>(threadIdx.x);
  const int swapped =
      threadIdx.x < 16 ? __shfl_xor_sync(0x0000ffffu, thread, 1) : __shfl_xor_sync(0xffff0000u, thread, 15);
  to[threadIdx.x] = swapped + __shfl_down_sync(~0u, thread, 8) * 100;
}

__global__ void shared_before_it_is_written(float* to) {
  __shared__ float value;
  to[blockIdx.x] = value;
  value = 1.0f;
}

__global__ void no_barrier(int* to) {
  __shared__ int neighbours[64];
  neighbours[threadIdx.x] = threadIdx.x;
  to[threadIdx.x] = neighbours[63 - threadIdx.x];
}

__global__ void last_block(unsigned* finished, unsigned* last) {
  if (atomicAdd(finished, 1u) == gridDim.x - 1) *last = blockIdx.x;
}

enum Mistake {
  kNone,
  kReturnsBeforeBarrier,
  kShuffleBesideBarrier,
  kTwoBarriers,
  kReturnsBeforeShuffle,
  kTwoShuffles,
  kOutsideItsMask,
  kFromOutsideTheMask,
  kMistakes
};

__global__ void mistaken(Mistake mistake) {
  const bool first = threadIdx.x == 0;
  switch (mistake) {
    case kReturnsBeforeBarrier:
      if (first) return;
      break;
    case kShuffleBesideBarrier:
      if (first) __shfl_xor_sync(~0u, 1.0f, 1);
      break;
    case kTwoBarriers:
      if (first) __syncthreads();
      break;
    case kReturnsBeforeShuffle:
      if (first) return;
      __shfl_xor_sync(~0u, 1.0f, 1);
      break;
    case kTwoShuffles:
      if (first) {
        __shfl_xor_sync(~0u, 1.0f, 1);
      } else {
        __shfl_xor_sync(~0u, 1.0f, 1);
      }
      break;
    case kOutsideItsMask:
      if (first) __shfl_xor_sync(2u, 1.0f, 1);
      break;
    case kFromOutsideTheMask:
      if (first) __shfl_xor_sync(1u, 1.0f, 1);
      break;
    default:
      break;
  }
  __syncthreads();
}

void check_places(Checks& checks) {
  const dim3 grid(3, 2, 2), block(5, 3, 2);
  constexpr int kThreads = 12 * 30;
  std::vector<int> forward;
  for (const char* name : stg_test::kOrders) {
    stg_test::set_order(name);
    std::vector<dim3> seen(kThreads, dim3(0, 0, 0));
    std::vector<int> order(kThreads, -1);
    int count = 0;
    cudaLaunchConfig_t config;
    config.gridDim = grid, config.blockDim = block;
    const cudaError_t error = cudaLaunchKernelEx(&config, places, seen.data(), order.data(), &count);
    checks.expect(error == cudaSuccess, "places", error, 0);
    for (unsigned i = 0; i < kThreads; ++i) {
      const bool right = seen[i].x == 1 && seen[i].y == i / 30 && seen[i].z == i % 30;
      checks.expect(right, "a thread's place", i, seen[i].x);
    }
    if (forward.empty()) forward = order;
    const bool reverse = std::vector<int>(order.rbegin(), order.rend()) == forward;
    checks.expect((order == forward) == (name == stg_test::kOrders[0]), "forward", 0, 0);
    checks.expect(reverse == (name == stg_test::kOrders[1]), "reverse", 0, 0);
  }
  for (int i = 0; i < kThreads; ++i) checks.expect(forward[i] == i, "forward", i, forward[i]);
  for (const char* name : {"backward", "", "1x"}) {
    stg_test::set_order(name);
    checks.expect(stg::launch(mistaken, 1, 64, nullptr, kNone) == cudaErrorInvalidValue, "no order", 0, 0);
  }
  stg_test::set_order("forward");
}

void check_launches(Checks& checks) {
  const auto launched = [](dim3 grid, unsigned threads) { return stg::launch(mistaken, grid, threads, nullptr, kNone); };
  checks.expect(launched(dim3(1, 1), 1024) == cudaSuccess, "1024 threads", 0, 0);
  for (dim3 grid : {dim3(0), dim3(1, 0), dim3(1, 65536), dim3(1, 1, 65536), dim3(1u << 31)}) {
    checks.expect(launched(grid, 64) == cudaErrorInvalidConfiguration, "a grid that there is not", grid.x, grid.y);
  }
  for (unsigned threads : {0u, 1025u, 1u << 31}) {
    checks.expect(launched(1, threads) == cudaErrorInvalidConfiguration, "a block that there is not", threads, 0);
  }
  std::vector<float> from(128, 0.5f), to(128);
  const auto bounded = [&](unsigned threads) {
    return stg::launch(sum_of_warps, 1, threads, nullptr, from.data(), to.data());
  };
  checks.expect(bounded(96) == cudaSuccess, "as many threads as the bounds say", 96, 0);
  checks.expect(bounded(128) == cudaErrorLaunchOutOfResources, "more threads than the bounds say", 128, 0);
}

void check_threads(Checks& checks) {
  std::vector<bool> right_without_barrier;
  for (const char* order : stg_test::kOrders) {
    stg_test::set_order(order);
    std::vector<float> from(96), to(96);
    float sum = 0.0f;
    for (int i = 0; i < 96; ++i) sum += from[i] = static_cast<float>(i * i);
    checks.expect(stg::launch(sum_of_warps, 2, 96, nullptr, from.data(), to.data()) == cudaSuccess, "sums", 0, 0);
    for (int i = 0; i < 96; ++i) checks.expect(to[i] == sum, "a sum over warps", i, static_cast<int64_t>(to[i]));
    std::vector<int> swapped(32);
    checks.expect(stg::launch(half_warps, 1, 32, nullptr, swapped.data()) == cudaSuccess, "half warps", 0, 0);
    for (int i = 0; i < 32; ++i) {
      const int other = i < 16 ? i ^ 1 : i ^ 15, down = i + 8 < 32 ? i + 8 : i;
      checks.expect(swapped[i] == other + 100 * down, "a shuffle", i, swapped[i]);
    }
    std::vector<float> found(3);
    checks.expect(stg::launch(shared_before_it_is_written, 3, 1, nullptr, found.data()) == cudaSuccess, "shared", 0, 0);
    for (float value : found) checks.expect(std::isnan(value), "shared memory is poisoned", 0, 0);
    std::vector<int> raced(64);
    checks.expect(stg::launch(no_barrier, 1, 64, nullptr, raced.data()) == cudaSuccess, "a race", 0, 0);
    for (int i = 0; i < 64; ++i) right_without_barrier.push_back(raced[i] == 63 - i);
    unsigned finished = 0, last = 7;
    checks.expect(stg::launch(last_block, 5, 1, nullptr, &finished, &last) == cudaSuccess, "blocks", 0, 0);
    checks.expect(finished == 5 && (last == 4) == (order == stg_test::kOrders[0]), "the last block", last, finished);
  }
  for (int i = 0; i < 64; ++i) {
    const bool always = right_without_barrier[i] && right_without_barrier[64 + i];
    checks.expect(!always || i == 0, "a race shows forwards or in reverse", i, 0);
  }
}

void check_mistakes(Checks& checks) {
  for (const char* order : stg_test::kOrders) {
    stg_test::set_order(order);
    for (int mistake = kNone; mistake < kMistakes; ++mistake) {
      const cudaError_t expected = mistake == kNone ? cudaSuccess : cudaErrorLaunchFailure;
      const cudaError_t got = stg::launch(mistaken, 2, 64, nullptr, static_cast<Mistake>(mistake));
      checks.expect(got == expected, "a mistake", mistake, got);
      checks.expect(stg::launch(mistaken, 2, 64, nullptr, kNone) == cudaSuccess, "afterwards", mistake, 0);
    }
  }
}

// From `value(i)` up to halfway to the next is i, then the next; halfway is the even one of both.
template <class Value, class Rounded>
void check_rounding(Checks& checks, int infinity, Value value, Rounded rounded) {
  for (int i = 0; i < infinity; ++i) {
    const double here = value(i), next = value(i + 1);
    const float halfway = static_cast<float>((here + next) / 2);
    checks.expect(rounded(static_cast<float>(here)) == i, "a value", i, 0);
    checks.expect(rounded(halfway) == i + i % 2, "halfway", i, rounded(halfway));
    checks.expect(rounded(std::nextafter(halfway, 0.0f)) == i, "below halfway", i, 0);
    checks.expect(rounded(std::nextafter(halfway, INFINITY)) == i + 1, "above halfway", i, 0);
    checks.expect(rounded(-halfway) == ((i + i % 2) | 0x8000), "negative", i, 0);
  }
  checks.expect(rounded(INFINITY) == infinity && rounded(3e38f * 1.2f) == infinity, "infinity", infinity, 0);
  checks.expect(rounded(NAN) == 0x7fff, "not a number", rounded(NAN), 0);
}

// Exponent and fraction as IEEE 754 has them; the value after the largest is where the next one would be.
double value_of(int bits, int fraction_bits, int bias) {
  const int exponent = bits >> fraction_bits, fraction = bits & ((1 << fraction_bits) - 1);
  if (exponent == 0) return std::ldexp(fraction, 1 - bias - fraction_bits);
  return std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
}

void check_types(Checks& checks) {
  const auto half_of = [](int i) { return value_of(i, 10, 15); };
  const auto brain_of = [](int i) { return value_of(i, 7, 127); };
  check_rounding(checks, 0x7c00, half_of, [](float x) { return __float2half_rn(x).bits; });
  check_rounding(checks, 0x7f80, brain_of, [](float x) { return __float2bfloat16_rn(x).bits; });
  for (int i = 0; i < 0x10000; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i), magnitude = bits & 0x7fff;
    const double sign = bits & 0x8000 ? -1.0 : 1.0;
    const float half = __half2float(__half{bits}), brain = __bfloat162float(__nv_bfloat16{bits});
    if (magnitude < 0x7c00) checks.expect(half == sign * half_of(magnitude), "half", i, 0);
    if (magnitude < 0x7f80) checks.expect(brain == sign * brain_of(magnitude), "bfloat16", i, 0);
    if (magnitude > 0x7c00) checks.expect(std::isnan(half), "half: not a number", i, 0);
    if (magnitude > 0x7f80) checks.expect(std::isnan(brain), "bfloat16: not a number", i, 0);
  }
  checks.expect(__half2float(__half{0x7c00}) == INFINITY, "infinity", 0, 0);
  checks.expect(__half2float(__half{0xfc00}) == -INFINITY, "negative infinity", 0, 0);
}

}  // namespace

int main() {
  Checks checks;
  check_types(checks);
  check_places(checks);
  check_launches(checks);
  check_threads(checks);
  check_mistakes(checks);
  return checks.result();
}
