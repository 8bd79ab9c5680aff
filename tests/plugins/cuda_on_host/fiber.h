// Stacks that one thread of the host switches between.
#pragma once

#include <stddef.h>

#if !defined(__x86_64__)
#define CUDA_ON_HOST_UCONTEXT
#endif
#if defined(CUDA_ON_HOST_UCONTEXT)
#include <ucontext.h>
#endif

namespace cuda_on_host {

class Fiber {
 public:
  Fiber();                         // the stack that the caller runs on
  explicit Fiber(void (*body)());  // a stack of its own, with a page below it that cannot be touched
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Called on this fiber; returns when another one switches back to it.
  void switch_to(Fiber& other);

  // What a body does first. It must not return.
  static void entered();

 private:
  char* memory_ = nullptr;
  const void* bottom_ = nullptr;  // for the address sanitizer, which must know the stack
  size_t bytes_ = 0;
#if defined(CUDA_ON_HOST_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
};

}  // namespace cuda_on_host
