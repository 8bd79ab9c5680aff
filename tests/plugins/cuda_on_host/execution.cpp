#include "execution.h"

#include <link.h>
#include <stdio.h>
#include <stdlib.h>

#include <memory>
#include <mutex>
#include <vector>

#include "block.h"
#include "fiber.h"
#include "order.h"

// The addresses of what `__launch_bounds__` puts before the kernels; the linker makes their ends.
extern "C" {
extern char* __start___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
extern char* __stop___patchable_function_entries[] __attribute__((weak, visibility("hidden")));
}

namespace cuda_on_host {

Place place;

namespace {

constexpr int kMaxThreads = 1024;
#if defined(__aarch64__)
constexpr int kNopBytes = 4;
#else
constexpr int kNopBytes = 1;
#endif

// A kernel's launch bounds: the length of the run of equal instructions that ends where it starts.
int64_t max_threads(void* kernel) {
  const char* const start = static_cast<char*>(kernel);
  const char* nearest = nullptr;
  for (char** entry = __start___patchable_function_entries; entry < __stop___patchable_function_entries; ++entry) {
    if (*entry < start && *entry > nearest) nearest = *entry;
  }
  if (nearest == nullptr || memcmp(nearest, nearest + kNopBytes, start - nearest - kNopBytes) != 0) return kMaxThreads;
  return (start - nearest) / kNopBytes;
}

int64_t volume(const dim3& size) { return static_cast<int64_t>(size.x) * size.y * size.z; }

cudaError_t check(const cudaLaunchConfig_t& config, void* kernel) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  if (volume(grid) == 0 || grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535) return cudaErrorInvalidConfiguration;
  if (block.x > kMaxThreads || block.y > kMaxThreads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (volume(block) == 0 || volume(block) > kMaxThreads) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes != 0 || config.numAttrs != 0) return cudaErrorInvalidValue;  // not emulated
  return volume(block) > max_threads(kernel) ? cudaErrorLaunchOutOfResources : cudaSuccess;
}

volatile thread_local char of_this_library;  // written first, so that there is such memory

struct Memory {
  void* start = nullptr;
  size_t bytes = 0;
};

// The thread-local memory of the library that this function is in; the linker puts all of it in one place.
int find_shared_memory(dl_phdr_info* library, size_t, void* found) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(&place);
  bool here = false;
  size_t bytes = 0;
  for (int i = 0; i < library->dlpi_phnum; ++i) {
    const ElfW(Phdr)& part = library->dlpi_phdr[i];
    const uintptr_t start = library->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_LOAD && address >= start && address - start < part.p_memsz) here = true;
    if (part.p_type == PT_TLS) bytes = part.p_memsz;
  }
  if (here) *static_cast<Memory*>(found) = Memory{library->dlpi_tls_data, bytes};
  return here;
}

uint3 position(int64_t index, const dim3& size) {
  return uint3{static_cast<unsigned>(index % size.x), static_cast<unsigned>(index / size.x % size.y),
               static_cast<unsigned>(index / size.x / size.y)};
}

class Executor {
 public:
  cudaError_t run(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* call, Order order);

  Block& block() { return block_; }
  int running() const { return running_thread_; }

  // The running thread waits; returns when it may go on, and it is its turn.
  void wait() { enter(block_.next(order_)); }

 private:
  static void run_threads();
  void run_block();
  void enter(int thread);
  Fiber* idle_fiber();

  Order order_;
  Block block_;
  void (*thread_)(const void*) = nullptr;
  const void* call_ = nullptr;
  Memory shared_memory_;
  std::vector<uint3> positions_;
  int running_thread_ = -1;
  Fiber* running_ = nullptr;
  std::unique_ptr<Fiber> launch_;
  std::vector<Fiber*> fibers_;  // of each thread, from when it starts
  std::vector<Fiber*> idle_;
  std::vector<std::unique_ptr<Fiber>> all_;
};

Executor executor;

Fiber* Executor::idle_fiber() {
  if (idle_.empty()) {
    all_.push_back(std::make_unique<Fiber>(run_threads));
    idle_.push_back(all_.back().get());
  }
  Fiber* const fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

// Goes on with a thread, or without one with the launch.
void Executor::enter(int thread) {
  Fiber* const left = running_;
  running_ = launch_.get();
  running_thread_ = thread;
  if (thread >= 0) {
    if (fibers_[thread] == nullptr) fibers_[thread] = idle_fiber();
    running_ = fibers_[thread];
    place.thread = positions_[thread];
  }
  if (running_ != left) left->switch_to(*running_);
}

// What a fiber does: a thread from its start, then, as long as the next one has not started either, that one.
void Executor::run_threads() {
  Fiber::entered();
  Executor& e = executor;
  for (;;) {
    e.thread_(e.call_);
    e.block_.returns();
    const int next = e.block_.next(e.order_);
    Fiber* const mine = e.running_;
    if (next >= 0 && e.fibers_[next] == nullptr) {
      e.fibers_[next] = mine;
    } else {
      e.idle_.push_back(mine);
    }
    e.enter(next);
  }
}

void Executor::run_block() {
  memset(shared_memory_.start, 0xff, shared_memory_.bytes);  // no numbers
  block_.start(static_cast<int>(positions_.size()));
  fibers_.assign(positions_.size(), nullptr);
  enter(block_.next(order_));
}

cudaError_t Executor::run(const cudaLaunchConfig_t& config, void (*thread)(const void*), const void* call,
                          Order order) {
  order_ = order;
  thread_ = thread;
  call_ = call;
  launch_ = std::make_unique<Fiber>();
  running_ = launch_.get();
  of_this_library = 0;
  dl_iterate_phdr(find_shared_memory, &shared_memory_);
  place.block_size = config.blockDim;
  place.grid_size = config.gridDim;
  positions_.clear();
  for (int64_t i = 0; i < volume(config.blockDim); ++i) positions_.push_back(position(i, config.blockDim));
  for (int64_t index : order_.permutation(volume(config.gridDim))) {
    const uint3 at = place.block = position(index, config.gridDim);
    run_block();
    if (block_.finished()) continue;
    fprintf(stderr, "block (%u, %u, %u): %s\n", at.x, at.y, at.z, block_.reason().c_str());
    idle_.clear();
    all_.clear();  // some of them are in the middle of a thread
    return cudaErrorLaunchFailure;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t execute(const cudaLaunchConfig_t& config, void* kernel, void (*thread)(const void*), const void* call) {
  static std::mutex one_launch;
  const std::lock_guard<std::mutex> lock(one_launch);
  const cudaError_t refused = check(config, kernel);
  if (refused != cudaSuccess) return refused;
  Order order;
  const char* const text = getenv("CUDA_ON_HOST_ORDER");
  if (!Order::parse(text, &order)) {
    fprintf(stderr, "CUDA_ON_HOST_ORDER: expected forward, reverse or a number, got %s\n", text);
    return cudaErrorInvalidValue;
  }
  return executor.run(config, thread, call, order);
}

unsigned lane() { return static_cast<unsigned>(executor.running()) % kLanes; }

void wait_for_block(int line) {
  executor.block().reaches_barrier(line);
  executor.wait();
}

uint64_t shuffle_bits(unsigned mask, uint64_t value, unsigned from, int line) {
  const int thread = executor.running();
  executor.block().reaches_shuffle(thread, Shuffle{mask, from, line, value, 0});
  executor.wait();
  return executor.block().received(thread);
}

}  // namespace cuda_on_host
