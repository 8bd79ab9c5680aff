#include "fiber.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <pthread.h>
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(CUDA_ON_HOST_UCONTEXT)
// What a called function must preserve stays on the stack that is left; swapcontext would ask the kernel
// for the signal mask each time.
extern "C" void cuda_on_host_switch(void** left, void* entered);
asm(R"(
.text
.hidden cuda_on_host_switch
.globl cuda_on_host_switch
.type cuda_on_host_switch, @function
cuda_on_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_on_host_switch, . - cuda_on_host_switch
)");
#endif

namespace cuda_on_host {

namespace {

constexpr size_t kPage = 4096, kStackBytes = 32 * kPage;

}  // namespace

Fiber::Fiber() {
#if defined(__SANITIZE_ADDRESS__)
  pthread_attr_t attributes;
  void* bottom = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &bottom, &bytes_);
  pthread_attr_destroy(&attributes);
  bottom_ = bottom;
#endif
}

Fiber::Fiber(void (*body)()) : bytes_(kStackBytes) {
  void* memory = mmap(nullptr, kPage + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) {
    perror("a fiber's stack");
    abort();
  }
  memory_ = static_cast<char*>(memory);
  bottom_ = memory_ + kPage;
#if defined(CUDA_ON_HOST_UCONTEXT)
  getcontext(&context_);
  context_.uc_stack.ss_sp = memory_ + kPage;
  context_.uc_stack.ss_size = kStackBytes;
  context_.uc_link = nullptr;
  makecontext(&context_, body, 0);
#else
  // As if `body` had been called, and had just switched away: no return address, then six registers.
  void** top = reinterpret_cast<void**>(memory_ + kPage + kStackBytes);
  top[-2] = reinterpret_cast<void*>(body);
  stack_pointer_ = top - 8;
#endif
}

Fiber::~Fiber() {
  if (memory_ == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
  // A thread that was given up has left its frames marked.
  __asan_unpoison_memory_region(bottom_, bytes_);
#endif
  munmap(memory_, kPage + kStackBytes);
}

void Fiber::switch_to(Fiber& other) {
#if defined(__SANITIZE_ADDRESS__)
  void* frames = nullptr;
  __sanitizer_start_switch_fiber(&frames, other.bottom_, other.bytes_);
#endif
#if defined(CUDA_ON_HOST_UCONTEXT)
  swapcontext(&context_, &other.context_);
#else
  cuda_on_host_switch(&stack_pointer_, other.stack_pointer_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(frames, nullptr, nullptr);
#endif
}

void Fiber::entered() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace cuda_on_host
