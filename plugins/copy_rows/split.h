// How a copy is split into vectors and how those are shared out, on host and device.
#pragma once

#include <stdint.h>

#include "copy_rows/copy_rows.h"
#include "host_device.h"

namespace stg {

constexpr int kCopyWidest = 16;
constexpr int kCopyThreads = 256;
constexpr int kCopyTurns = 4;  // vectors a thread has in flight
constexpr int64_t kCopyChunk = kCopyThreads * kCopyTurns;  // vectors of a block
constexpr int kCopyBatch = 32;  // copies of a launch

// `head` bytes, then vectors of `unit` bytes, then `tail` bytes; source and destination of every vector
// are aligned to its size. `unit` is below 16 where no shift aligns both.
struct CopySplit {
  int unit;
  int head;
  int tail;
  int64_t vectors;
};

STG_BOTH CopySplit split_copy(uint64_t destination, uint64_t source, int64_t bytes) {
  CopySplit split{kCopyWidest, 0, 0, 0};
  while ((destination - source) % split.unit != 0) split.unit /= 2;
  split.head = static_cast<int>((split.unit - destination % split.unit) % split.unit);
  if (split.head > bytes) split.head = static_cast<int>(bytes);
  split.vectors = (bytes - split.head) / split.unit;
  split.tail = static_cast<int>((bytes - split.head) % split.unit);
  return split;
}

STG_BOTH CopySplit split_copy(const StgRowCopy& copy) {
  return split_copy(reinterpret_cast<uintptr_t>(copy.destination), reinterpret_cast<uintptr_t>(copy.source),
                    copy.bytes);
}

// Blocks that a copy takes; one does the ends too.
STG_BOTH int64_t chunks_of(const StgRowCopy& copy) {
  if (copy.bytes == 0) return 0;
  const int64_t chunks = (split_copy(copy).vectors + kCopyChunk - 1) / kCopyChunk;
  return chunks > 0 ? chunks : 1;
}

// The copies of one launch; copy i has the blocks from first_chunk[i] to the next.
struct CopyBatch {
  StgRowCopy copies[kCopyBatch];
  int64_t first_chunk[kCopyBatch];
  int count;
};

// Fills a batch from the front of a list; returns the launch's blocks.
inline int64_t fill_batch(const StgRowCopy* copies, int64_t count, CopyBatch* batch) {
  batch->count = static_cast<int>(count < kCopyBatch ? count : kCopyBatch);
  int64_t chunks = 0;
  for (int i = 0; i < batch->count; ++i) {
    batch->copies[i] = copies[i];
    batch->first_chunk[i] = chunks;
    chunks += chunks_of(copies[i]);
  }
  return chunks;
}

// The copy that a block works on. An empty copy starts where the next one does, and is passed over.
STG_BOTH int copy_of_block(const CopyBatch& batch, int64_t block) {
  int copy = 0;
  while (copy + 1 < batch.count && batch.first_chunk[copy + 1] <= block) ++copy;
  return copy;
}

struct alignas(16) Bytes16 {
  uint32_t words[4];
};

template <class Unit>
STG_BOTH void copy_vectors(void* destination, const void* source, int64_t vectors, int64_t chunk, int thread) {
  Unit values[kCopyTurns];
  const int64_t first = chunk * kCopyChunk + thread;
  for (int turn = 0; turn < kCopyTurns; ++turn) {
    const int64_t i = first + turn * kCopyThreads;
    if (i < vectors) values[turn] = static_cast<const Unit*>(source)[i];
  }
  for (int turn = 0; turn < kCopyTurns; ++turn) {
    const int64_t i = first + turn * kCopyThreads;
    if (i < vectors) static_cast<Unit*>(destination)[i] = values[turn];
  }
}

// The share of one thread in one chunk of a copy.
STG_BOTH void copy_share(const StgRowCopy& copy, int64_t chunk, int thread) {
  const CopySplit split = split_copy(copy);
  char* to = static_cast<char*>(copy.destination);
  const char* from = static_cast<const char*>(copy.source);
  if (chunk == 0) {
    const int64_t tail = copy.bytes - split.tail;
    if (thread < split.head) to[thread] = from[thread];
    if (thread < split.tail) to[tail + thread] = from[tail + thread];
  }
  to += split.head;
  from += split.head;
  switch (split.unit) {
    case 16:
      return copy_vectors<Bytes16>(to, from, split.vectors, chunk, thread);
    case 8:
      return copy_vectors<uint64_t>(to, from, split.vectors, chunk, thread);
    case 4:
      return copy_vectors<uint32_t>(to, from, split.vectors, chunk, thread);
    case 2:
      return copy_vectors<uint16_t>(to, from, split.vectors, chunk, thread);
    default:
      return copy_vectors<uint8_t>(to, from, split.vectors, chunk, thread);
  }
}

}  // namespace stg
