// What surrounds the matrix product dw = dy^T y: the bias's gradient, and NaN everywhere where dy is not finite.
#pragma once

#include <cfloat>

#include "arrivals.cuh"
#include "platform.cuh"
#include "weight_grad_launcher.h"

namespace consequentialism::cuda {

constexpr int kBiasThreads = kBiasLanes * kBiasGroups;
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

// db [outputs] <- the splits' partial sums of strips set, set + sets, ..., in the order of the splits.
template <class T, int kColumns>
__device__ __forceinline__ void add_splits(
    int64_t set, int64_t sets, int64_t outputs, unsigned splits, const Accumulator<T>* partial, T* db) {
  for (int64_t first = set * kColumns; first < outputs; first += sets * kColumns) {
    for (int64_t o = first + threadIdx.x; o < min(first + kColumns, outputs); o += kBiasThreads) {
      Accumulator<T> total = 0;
#pragma unroll 8
      for (unsigned s = 0; s < splits; ++s) total += partial[s * outputs + o];
      db[o] = from_accumulator<T>(total);
    }
  }
}

// values [count] <- NaN, by one block.
template <class T>
__device__ __forceinline__ void poison(T* values, int64_t count) {
  constexpr int kVector = 16 / sizeof(T);
  Several<T, kVector> nans;
#pragma unroll
  for (int v = 0; v < kVector; ++v) nans.values[v] = from_accumulator<T>(Accumulator<T>(NAN));
  const int64_t whole = reinterpret_cast<uintptr_t>(values) % 16 == 0 ? count / kVector : 0;
  for (int64_t i = threadIdx.x; i < whole; i += kBiasThreads) reinterpret_cast<Several<T, kVector>*>(values)[i] = nans;
  for (int64_t i = whole * kVector + threadIdx.x; i < count; i += kBiasThreads) values[i] = nans.values[0];
}

// db[o] = the sum of dy[n, o] column[n] over all rows n; NaN there and in all of dw [count] where a value of dy is not
// finite. Block (x, y) has strip x and split y. The last block of a set of strips adds the set's splits up, and the
// last of those poisons. db and column are null without a bias. Fixed order of sums.
template <class T, int kVector>
__global__ void __launch_bounds__(kBiasThreads) bias_grad_kernel(
    const T* __restrict__ dy, int64_t rows, int64_t outputs, int64_t row_stride, int64_t rows_each,
    const Accumulator<T>* __restrict__ column, T* dw, int64_t count, T* db, Accumulator<T>* partial, unsigned sets,
    unsigned* tickets) {
  using A = Accumulator<T>;
  constexpr int kColumns = kBiasLanes * kVector;
  A* shared = dynamic_shared<A>();                                     // [kBiasGroups][kColumns]
  int* any = reinterpret_cast<int*>(shared + kBiasGroups * kColumns);  // [1]
  const int lane = static_cast<int>(threadIdx.x) % kBiasLanes;
  const int group = static_cast<int>(threadIdx.x) / kBiasLanes;
  const int64_t first_output = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t output = first_output + lane * kVector;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * rows_each;
  const int64_t end = min(begin + rows_each, rows);
  A sums[kVector] = {};
  A witness = 0;  // NaN once a value is not finite
  if (output < outputs) {
#pragma unroll 1
    for (int64_t n = begin + group; n < end; n += kBiasDepth * kBiasGroups) {
      Several<T, kVector> read[kBiasDepth];
      A weights[kBiasDepth];
#pragma unroll
      for (int i = 0; i < kBiasDepth; ++i) {  // all on their way before the first is used; past the end, the last one
        const int64_t row = min(n + i * kBiasGroups, end - 1);
        read[i] = *reinterpret_cast<const Several<T, kVector>*>(dy + row * row_stride + output);
        weights[i] = column != nullptr && n + i * kBiasGroups < end ? column[row] : A(0);
      }
#pragma unroll
      for (int i = 0; i < kBiasDepth; ++i) {
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
          const A value = to_accumulator(read[i].values[v]);
          witness += value - value;
          sums[v] = fma(value, weights[i], sums[v]);
        }
      }
    }
  }
#pragma unroll
  for (int v = 0; v < kVector; ++v) shared[group * kColumns + lane * kVector + v] = sums[v];
  const bool broken = block_any(witness != 0 || isnan(witness), any);
  if (db != nullptr) {
    for (int c = static_cast<int>(threadIdx.x); c < kColumns && first_output + c < outputs; c += kBiasThreads) {
      A total = 0;
      for (int g = 0; g < kBiasGroups; ++g) total += shared[g * kColumns + c];
      if (gridDim.y == 1) {
        db[first_output + c] = from_accumulator<T>(total);
      } else {
        partial[blockIdx.y * outputs + first_output + c] = total;
      }
    }
  }
  const unsigned set = blockIdx.x % sets, strips = (gridDim.x - set + sets - 1) / sets;
  Arrival arrival = arrive(tickets + 1 + set, strips * gridDim.y, broken, any);
  if (arrival == Arrival::kEarlier) return;
  if (db != nullptr && gridDim.y > 1) add_splits<T, kColumns>(set, sets, outputs, gridDim.y, partial, db);
  if (sets > 1) arrival = arrive(tickets, sets, arrival == Arrival::kLastOfFlagged, any);
  if (arrival != Arrival::kLastOfFlagged) return;
  __syncthreads();  // of one set, other threads have just written db
  poison(dw, count);
  if (db != nullptr) poison(db, outputs);
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
