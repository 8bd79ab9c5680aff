// Several independent copies in device memory, of any sizes and alignments, in one launch.
#pragma once

#include "interface.h"

struct StgRowCopy {
  void* destination;
  const void* source;
  int64_t bytes;
};

// `copies` is host memory, read before the call returns; no destination overlaps another copy.
struct StgCopyRows {
  const StgRowCopy* copies;
  int64_t count;
};

// Enqueues on a stream; returns a cudaError_t.
STG_EXPORT int stg_copy_rows(const StgCopyRows* rows, void* stream);
