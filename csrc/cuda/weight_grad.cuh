// What surrounds the matrix product dw = dy^T y: the bias's gradient, and NaN everywhere where dy is not finite.
#pragma once

#include "platform.cuh"

namespace consequentialism::cuda {

constexpr int kBiasColumns = 32;  // of dy, a block
constexpr int kBiasRows = 16;     // of threads
constexpr int kPoisonThreads = 256;

// db[o] = sum over n of dy[n, o] column[n], by one block for 32 columns; broken[block] = whether one of its dy is not
// finite. column is null without a bias. Fixed order of sums.
template <class T>
__global__ void __launch_bounds__(kBiasColumns* kBiasRows) bias_grad_kernel(
    const T* __restrict__ dy, int64_t rows, int64_t outputs, int64_t row_stride,
    const Accumulator<T>* __restrict__ column, T* __restrict__ db, int* __restrict__ broken) {
  using A = Accumulator<T>;
  A* sums = dynamic_shared<A>();  // [kBiasRows][kBiasColumns]
  const int lane = static_cast<int>(threadIdx.x) % kBiasColumns;
  const int group = static_cast<int>(threadIdx.x) / kBiasColumns;
  const int64_t output = static_cast<int64_t>(blockIdx.x) * kBiasColumns + lane;
  A sum = 0;
  A witness = 0;  // NaN once a value is not finite
  if (output < outputs) {
#pragma unroll 4
    for (int64_t n = group; n < rows; n += kBiasRows) {
      const A value = to_accumulator(dy[n * row_stride + output]);
      witness += value - value;
      if (column != nullptr) sum = fma(value, column[n], sum);
    }
  }
  const bool bad = __any_sync(kFullWarp, witness != 0 || isnan(witness));
  sums[group * kBiasColumns + lane] = sum;
  int* bad_groups = reinterpret_cast<int*>(sums + kBiasRows * kBiasColumns);  // [kBiasRows]
  if (lane == 0) bad_groups[group] = bad ? 1 : 0;
  __syncthreads();
  if (group != 0) return;
  if (column != nullptr && output < outputs) {
    A total = 0;
    for (int g = 0; g < kBiasRows; ++g) total += sums[g * kBiasColumns + lane];
    db[output] = from_accumulator<T>(total);
  }
  if (lane == 0) {
    int any = 0;
    for (int g = 0; g < kBiasRows; ++g) any |= bad_groups[g];
    broken[blockIdx.x] = any;
  }
}

// dw [count] and db [outputs] <- NaN where an entry of broken is set; db may be null. Else nothing is written.
template <class T>
__global__ void __launch_bounds__(kPoisonThreads) poison_kernel(
    T* __restrict__ dw, int64_t count, T* __restrict__ db, int64_t outputs, const int* __restrict__ broken,
    int64_t flags) {
  int* any = dynamic_shared<int>();
  if (threadIdx.x == 0) *any = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < flags; i += kPoisonThreads) {
    if (broken[i] != 0) *any = 1;
  }
  __syncthreads();
  if (*any == 0) return;
  const T nan = from_accumulator<T>(Accumulator<T>(NAN));
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kPoisonThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kPoisonThreads;
  for (int64_t i = first; i < count; i += step) dw[i] = nan;
  if (db == nullptr) return;
  for (int64_t i = first; i < outputs; i += step) db[i] = nan;
}

}  // namespace consequentialism::cuda
