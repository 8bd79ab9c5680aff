// The copies run on the host, block by block and thread by thread, for tests.
#pragma once

#include "copy_rows/split.h"

namespace stg_test {

inline void copy_on_host(const StgCopyRows& rows) {
  for (int64_t at = 0; at < rows.count; at += stg::kCopyBatch) {
    stg::CopyBatch batch;
    const int64_t blocks = stg::fill_batch(rows.copies + at, rows.count - at, &batch);
    for (int64_t block = 0; block < blocks; ++block) {
      const int copy = stg::copy_of_block(batch, block);
      for (int thread = 0; thread < stg::kCopyThreads; ++thread) {
        stg::copy_share(batch.copies[copy], block - batch.first_chunk[copy], thread);
      }
    }
  }
}

}  // namespace stg_test
