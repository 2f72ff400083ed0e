// What surrounds the matrix product dw = dy^T y: the bias's gradient, and NaN everywhere where dy is not finite.
#pragma once

#include "platform.cuh"
#include "weight_grad_launcher.h"

namespace consequentialism::cuda {

constexpr int kBiasThreads = kBiasLanes * kBiasGroups;
constexpr int kPoisonThreads = 256;

// Read at once.
template <class T, int kVector>
struct alignas(kVector * sizeof(T)) Several {
  T values[kVector];
};

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

}  // namespace consequentialism::cuda
