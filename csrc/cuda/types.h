// The types of elements, for kernels and for what calls their launchers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef CONSEQUENTIALISM_HOST_SHIM
#include "shim.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace consequentialism::cuda {

#ifndef CONSEQUENTIALISM_HOST_SHIM
using bfloat16 = __nv_bfloat16;
using float16 = __half;

__host__ __device__ __forceinline__ float to_float(bfloat16 value) {
  return __bfloat162float(value);
}
__host__ __device__ __forceinline__ float to_float(float16 value) {
  return __half2float(value);
}
__host__ __device__ __forceinline__ uint16_t to_bits(bfloat16 value) {
  return __bfloat16_as_ushort(value);
}
__host__ __device__ __forceinline__ uint16_t to_bits(float16 value) {
  return __half_as_ushort(value);
}
__host__ __device__ __forceinline__ bfloat16 to_bfloat16(float value) {
  return __float2bfloat16_rn(value);
}
__host__ __device__ __forceinline__ float16 to_float16(float value) {
  return __float2half_rn(value);
}

#endif

__host__ __device__ __forceinline__ float to_float(float value) {
  return value;
}

template <class T>
__host__ __device__ __forceinline__ T from_float(float value) {
  if constexpr (std::is_same_v<T, bfloat16>) {
    return to_bfloat16(value);
  } else if constexpr (std::is_same_v<T, float16>) {
    return to_float16(value);
  } else {
    static_assert(std::is_same_v<T, float>);
    return value;
  }
}

// What sums of T are kept in.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// each(T) for every type T of elements, to instantiate what is called with any.
#define CONSEQUENTIALISM_FOR_ELEMENTS(each) each(float) each(bfloat16) each(float16) each(double)

// each(T, W) for every T and every W that its elements are multiplied in: as they are, or in float64.
#define CONSEQUENTIALISM_FOR_ELEMENTS_AND_WIDE(each)                                                          \
  each(float, float) each(bfloat16, bfloat16) each(float16, float16) each(double, double) each(float, double) \
      each(bfloat16, double) each(float16, double)

template <class T>
__host__ __device__ __forceinline__ Accumulator<T> to_accumulator(T value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return to_float(value);
  }
}

template <class T>
__host__ __device__ __forceinline__ T from_accumulator(Accumulator<T> value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return from_float<T>(value);
  }
}

// Two elements of a half type in one register, the first in the low half, as tensor cores want them.
template <class T>
__host__ __device__ __forceinline__ uint32_t pack(T low, T high) {
  return static_cast<uint32_t>(to_bits(low)) | static_cast<uint32_t>(to_bits(high)) << 16;
}

// The same of two numbers, rounded to bfloat16: one instruction, where nvcc makes three of single roundings.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
#ifdef CONSEQUENTIALISM_HOST_SHIM
  return pack(to_bfloat16(low), to_bfloat16(high));
#else
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#endif
}

}  // namespace consequentialism::cuda
