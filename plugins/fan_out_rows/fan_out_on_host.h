// The fan-out run on the host, thread by thread, for tests.
#pragma once

#include "fan_out_rows/fan_out.h"

namespace stg_test {

template <class T>
void fan_out_on_host(const StgFanOutRows& p, int64_t threads) {
  for (int64_t thread = 0; thread < threads; ++thread) {
    if (stg::fan_out_aligned<T>(p)) {
      stg::fan_out<T, true>(p, thread, threads);
    } else {
      stg::fan_out<T, false>(p, thread, threads);
    }
  }
}

}  // namespace stg_test
