// What surrounds the matrix product dw = dy^T y: the bias's gradient, and NaN everywhere where dy is not finite.
#pragma once

#include <cfloat>

#include "platform.cuh"
#include "weight_grad_launcher.h"

namespace consequentialism::cuda {

constexpr int kBiasThreads = kBiasLanes * kBiasGroups;
constexpr int kPoisonThreads = 256;
constexpr int kPassThreads = 256;

// Read at once.
template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Several {
  T values[kVector];
};

// The largest of all threads' values, for all of them. shared [kPassThreads].
__device__ __forceinline__ float block_largest(float value, float* shared) {
  shared[threadIdx.x] = value;
  for (unsigned half = kPassThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] = fmaxf(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  __syncthreads();
  return shared[0];
}

// partial[blockIdx.y, o] = the sum of dy[n, o] column[n] over the block's rows n, of which the others of a grid's
// column have theirs; broken[block] = whether one of its dy is not finite. column and partial are null without a bias.
// Fixed order of sums.
template <class T, int kVector>
__global__ void __launch_bounds__(kBiasThreads) bias_grad_kernel(
    const T* __restrict__ dy, int64_t rows, int64_t outputs, int64_t row_stride, int64_t rows_each,
    const Accumulator<T>* __restrict__ column, Accumulator<T>* __restrict__ partial, int* __restrict__ broken) {
  using A = Accumulator<T>;
  constexpr int kColumns = kBiasLanes * kVector;
  A* shared = dynamic_shared<A>();                                            // [kBiasGroups][kColumns]
  int* bad_groups = reinterpret_cast<int*>(shared + kBiasGroups * kColumns);  // [kBiasGroups]
  const int lane = static_cast<int>(threadIdx.x) % kBiasLanes;
  const int group = static_cast<int>(threadIdx.x) / kBiasLanes;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t output = first_output + lane * kVector;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_each;
  const int64_t end = min(begin + rows_each, rows);
  A sums[kVector] = {};
  A witness = 0;  // NaN once a value is not finite
  if (output < outputs) {
#pragma unroll 4
    for (int64_t n = begin + group; n < end; n += kBiasGroups) {
      const auto several = *reinterpret_cast<const Several<T, kVector>*>(dy + n * row_stride + output);
      const A weight = column != nullptr ? column[n] : A(0);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        const A value = to_accumulator(several.values[v]);
        witness += value - value;
        sums[v] = fma(value, weight, sums[v]);
      }
    }
  }
  const bool bad = __any_sync(kFullWarp, witness != 0 || isnan(witness));
#pragma unroll
  for (int v = 0; v < kVector; ++v) shared[group * kColumns + lane * kVector + v] = sums[v];
  if (lane == 0) bad_groups[group] = bad ? 1 : 0;
  __syncthreads();
  if (partial != nullptr) {
    for (int c = static_cast<int>(threadIdx.x); c < kColumns && first_output + c < outputs; c += kBiasThreads) {
      A total = 0;
      for (int g = 0; g < kBiasGroups; ++g) total += shared[g * kColumns + c];
      partial[blockIdx.y * outputs + first_output + c] = total;
    }
  }
  if (threadIdx.x == 0) {
    int any = 0;
    for (int g = 0; g < kBiasGroups; ++g) any |= bad_groups[g];
    broken[blockIdx.y * gridDim.x + blockIdx.x] = any;
  }
}

// db [outputs] <- the sum of the splits' partial sums; NaN there and in all of dw [count] where one of the flags is
// set, else dw is left alone. db may be null.
template <class T>
__global__ void __launch_bounds__(kPoisonThreads) finish_kernel(
    T* __restrict__ dw, int64_t count, T* __restrict__ db, int64_t outputs, int splits,
    const Accumulator<T>* __restrict__ partial, const int* __restrict__ broken, int64_t flags) {
  using A = Accumulator<T>;
  int* any = dynamic_shared<int>();
  if (threadIdx.x == 0) *any = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < flags; i += kPoisonThreads) {
    if (broken[i] != 0) *any = 1;
  }
  __syncthreads();
  const bool poisoned = *any != 0;
  const T nan = from_accumulator<T>(A(NAN));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPoisonThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPoisonThreads;
  for (int64_t i = first; db != nullptr && i < outputs; i += step) {
    A total = 0;
#pragma unroll 4
    for (int s = 0; s < splits; ++s) total += partial[s * outputs + i];
    db[i] = poisoned ? nan : from_accumulator<T>(total);
  }
  for (int64_t i = first; poisoned && i < count; i += step) dw[i] = nan;
}

// float16 has 30 binades of full precision: with the largest |y| at its upper end, dy^T y loses nothing that the range
// of dw, float16 too, could have held.
constexpr int kTopExponent = 14;
constexpr int kPassVector = 4;

// largest[blockIdx.x] = the largest |y| of the block's elements, infinite where one of them is not finite.
template <int kVector>
__global__ void __launch_bounds__(kPassThreads)
    largest_kernel(const float* __restrict__ y, int64_t count, float* __restrict__ largest) {
  float* shared = dynamic_shared<float>();  // [kPassThreads]
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPassThreads * kVector;
  float most = 0;
#pragma unroll 4
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kPassThreads + threadIdx.x) * kVector; i < count; i += step) {
    const auto several = *reinterpret_cast<const Several<float, kVector>*>(y + i);
#pragma unroll
    for (int v = 0; v < kVector; ++v) {
      const float size = fabsf(several.values[v]);
      most = size <= FLT_MAX ? fmaxf(most, size) : INFINITY;
    }
  }
  most = block_largest(most, shared);
  if (threadIdx.x == 0) largest[blockIdx.x] = most;
}

// narrowed <- y / unit, by the largest of the `parts` of largest_kernel; block 0 writes the unit.
template <int kVector>
__global__ void __launch_bounds__(kPassThreads) narrow_kernel(
    const float* __restrict__ y, int64_t count, const float* __restrict__ largest, int parts,
    float16* __restrict__ narrowed, float* __restrict__ unit) {
  float* shared = dynamic_shared<float>();  // [kPassThreads]
  float most = 0;
  for (int part = static_cast<int>(threadIdx.x); part < parts; part += kPassThreads) most = fmaxf(most, largest[part]);
  most = block_largest(most, shared);
  const bool finite = most <= FLT_MAX;
  // Where y is tiny, a normal number all the same; its dw is below float16's range.
  const int exponent = finite && most > 0 ? max(ilogbf(most) - kTopExponent, FLT_MIN_EXP) : 0;
  if (blockIdx.x == 0 && threadIdx.x == 0) *unit = finite ? ldexpf(1, exponent) : NAN;
  const float by = ldexpf(1, -exponent);
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPassThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kPassThreads + threadIdx.x) * kVector; i < count; i += step) {
    const auto several = *reinterpret_cast<const Several<float, kVector>*>(y + i);
    Several<float16, kVector> rounded;
#pragma unroll
    for (int v = 0; v < kVector; ++v) rounded.values[v] = to_float16(several.values[v] * by);
    *reinterpret_cast<Several<float16, kVector>*>(narrowed + i) = rounded;
  }
}

template <int kVector>
__global__ void __launch_bounds__(kPassThreads) widen_kernel(
    const float* __restrict__ product, int64_t count, const float* __restrict__ unit, float16* __restrict__ dw) {
  const float by = *unit;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPassThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kPassThreads + threadIdx.x) * kVector; i < count; i += step) {
    const auto several = *reinterpret_cast<const Several<float, kVector>*>(product + i);
    Several<float16, kVector> rounded;
#pragma unroll
    for (int v = 0; v < kVector; ++v) rounded.values[v] = to_float16(several.values[v] * by);
    *reinterpret_cast<Several<float16, kVector>*>(dw + i) = rounded;
  }
}

}  // namespace consequentialism::cuda
