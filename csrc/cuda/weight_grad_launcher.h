// Launchers of the kernels of weight_grad. Pointers are to device memory of the stream's device; nothing waits for the
// device.
#pragma once

#include "types.h"

namespace consequentialism::cuda {

constexpr int kBiasLanes = 32;                       // that read along a row of dy, each a vector
constexpr int kBiasGroups = 16;                      // of lanes, on different rows
constexpr int64_t kBiasRowsLeast = 4 * kBiasGroups;  // of a block, so that each thread has four reads under way

// How dy [N, O] is cut into blocks.
struct BiasPlan {
  int vector;         // elements that a thread reads at once: 16 bytes, or one where rows are not aligned
  int64_t along;      // blocks along a row
  int64_t rows_each;  // of a block
  int splits;         // blocks along a column, each with a partial sum
  int64_t flags() const { return along * splits; }
};

template <class T>
BiasPlan plan_bias_grad(const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, int processors);

// So many outputs' sums, of `inputs` each, come from a product at once: 16 MiB of them, in full tiles.
inline int64_t outputs_at_once(int64_t inputs) {
  constexpr int64_t kSums = (int64_t{16} << 20) / sizeof(float);
  constexpr int64_t kTile = 256;
  return kSums / inputs / kTile * kTile < kTile ? kTile : kSums / inputs / kTile * kTile;
}

// How y [count] is passed over, element by element.
struct PassPlan {
  int vector;  // elements that a thread takes at once: four, or one where they do not come in fours
  int blocks;
};

PassPlan plan_pass(const void* wide, const void* narrow, int64_t count, int processors);

// y / unit [count] in float16, with the power of two that brings the largest |y| to [2^14, 2^15): unit [1], NaN where
// an entry of y is not finite. largest [plan.blocks] is room for it.
cudaError_t launch_narrow(
    const float* y, int64_t count, float* largest, float16* narrowed, float* unit, const PassPlan& plan,
    cudaStream_t stream);

// dw [count] <- unit * product, rounded once.
cudaError_t launch_widen(
    const float* product, int64_t count, const float* unit, float16* dw, const PassPlan& plan, cudaStream_t stream);

// The partial sums of dy^T column, partial [splits, O], and in broken [flags] where dy [N, O] is not finite. column [N]
// and partial are null without a bias.
template <class T>
cudaError_t launch_bias_grad(
    const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, const Accumulator<T>* column,
    Accumulator<T>* partial, int* broken, const BiasPlan& plan, cudaStream_t stream);

// db [O] <- the partial sums' sum, null without a bias; db and dw [count] <- NaN if a flag says so.
template <class T>
cudaError_t launch_finish(
    T* dw, int64_t count, T* db, int64_t outputs, const Accumulator<T>* partial, const int* broken,
    const BiasPlan& plan, int processors, cudaStream_t stream);

}  // namespace consequentialism::cuda
