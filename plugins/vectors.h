// Loads and stores of neighbouring values, in as few memory transactions as their addresses allow.
#pragma once

#include <stdint.h>

#include "host_device.h"

namespace stg {

constexpr int64_t kWidestBytes = 16;  // of one load or store

// How a type is read and written as float; half.cuh has those that only CUDA knows.
template <class T>
struct Cast;

template <>
struct Cast<float> {
  static STG_BOTH float to_float(float x) { return x; }
  static STG_BOTH float from_float(float x) { return x; }
};

STG_BOTH constexpr int64_t vector_bytes(int64_t element_bytes, int64_t count) {
  return element_bytes * count < kWidestBytes ? element_bytes * count : kWidestBytes;
}

// Whether rows of `length` elements that follow each other from an address consist of aligned vectors.
STG_BOTH bool vectors_fit(uint64_t address, int64_t element_bytes, int64_t length, int64_t count) {
  return address % vector_bytes(element_bytes, count) == 0 && length % count == 0;
}

template <class T>
bool vectors_fit(const T* rows, int64_t length, int64_t count) {
  return vectors_fit(reinterpret_cast<uintptr_t>(rows), sizeof(T), length, count);
}

template <class T, int kCount>
struct alignas(vector_bytes(sizeof(T), kCount)) Packed {
  T values[kCount];
};

// kCount values, or the `left` ones and zeros. Aligned rows consist of full vectors: all are left, or none.
template <bool kAligned, int kCount, class T>
STG_BOTH Packed<T, kCount> load_packed(const T* from, int64_t left) {
  Packed<T, kCount> packed = {};
  if (kAligned) {
    if (left > 0) packed = *reinterpret_cast<const Packed<T, kCount>*>(from);
  } else {
    for (int i = 0; i < kCount; ++i) {
      if (i < left) packed.values[i] = from[i];
    }
  }
  return packed;
}

template <class T, int kCount>
STG_BOTH void unpack(const Packed<T, kCount>& packed, float (&to)[kCount]) {
  for (int i = 0; i < kCount; ++i) to[i] = Cast<T>::to_float(packed.values[i]);
}

template <bool kAligned, int kCount, class T>
STG_BOTH void load(const T* from, int64_t left, float (&to)[kCount]) {
  unpack(load_packed<kAligned, kCount>(from, left), to);
}

template <class T, int kCount>
STG_BOTH Packed<T, kCount> pack(const float (&from)[kCount]) {
  Packed<T, kCount> packed;
  for (int i = 0; i < kCount; ++i) packed.values[i] = Cast<T>::from_float(from[i]);
  return packed;
}

template <bool kAligned, int kCount, class T>
STG_BOTH void store_packed(T* to, int64_t left, const Packed<T, kCount>& packed) {
  if (kAligned) {
    if (left > 0) *reinterpret_cast<Packed<T, kCount>*>(to) = packed;
  } else {
    for (int i = 0; i < kCount; ++i) {
      if (i < left) to[i] = packed.values[i];
    }
  }
}

template <bool kAligned, int kCount, class T>
STG_BOTH void store(T* to, int64_t left, const float (&from)[kCount]) {
  store_packed<kAligned>(to, left, pack<T>(from));
}

}  // namespace stg
