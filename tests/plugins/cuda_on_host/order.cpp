#include "order.h"

#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <numeric>

namespace cuda_on_host {

bool Order::parse(const char* text, Order* order) {
  *order = Order();
  if (text == nullptr || strcmp(text, "forward") == 0) return true;
  order->kind_ = kReverse;
  if (strcmp(text, "reverse") == 0) return true;
  char* end = nullptr;
  order->kind_ = kRandom;
  order->seed_ = static_cast<uint32_t>(strtoul(text, &end, 10));
  return *text != '\0' && *end == '\0';
}

int Order::choose(uint32_t bits) {
  if (kind_ == kForward) return __builtin_ctz(bits);
  if (kind_ == kReverse) return 31 - __builtin_clz(bits);
  const int start = static_cast<int>(random() % 32);
  const uint32_t turned = bits >> start | bits << (32 - start) % 32;
  return (start + __builtin_ctz(turned)) % 32;
}

std::vector<int64_t> Order::permutation(int64_t count) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  if (kind_ == kReverse) std::reverse(order.begin(), order.end());
  for (int64_t i = count; kind_ == kRandom && i > 1; --i) std::swap(order[i - 1], order[random() % i]);
  return order;
}

// Numerical Recipes' linear congruential generator; its high bits are the random ones.
uint32_t Order::random() {
  seed_ = seed_ * 1664525u + 1013904223u;
  return seed_ >> 8;
}

}  // namespace cuda_on_host
