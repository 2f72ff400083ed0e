// Launchers of the kernels of weight_grad. Pointers are to device memory of the stream's device; nothing waits for the
// device.
#pragma once

#include "launch_counters.h"
#include "types.h"

namespace consequentialism::cuda {

constexpr int kBiasLanes = 32;                                // that read along a row of dy, each a vector
constexpr int kBiasGroups = 16;                               // of lanes, on different rows
constexpr int kBiasDepth = 4;                                 // reads of a thread under way at once
constexpr int64_t kBiasRowsLeast = kBiasDepth * kBiasGroups;  // of a block
constexpr int64_t kBiasTickets = kLaunchCounters - kFirstTicket - 1;

// How dy [N, O] is cut into blocks. A block has a strip of columns; the last block of a set of strips adds up their
// splits.
struct BiasPlan {
  int vector;         // elements that a thread reads at once: 16 bytes, or one where rows are not aligned
  int64_t along;      // strips
  int64_t rows_each;  // of a block
  int splits;         // blocks of a strip, each with a partial sum where there are several

  // Sets of strips: strip i is of set i % sets().
  int64_t sets() const { return along < kBiasTickets ? along : kBiasTickets; }
  int64_t partials(int64_t outputs) const { return splits == 1 ? 0 : splits * outputs; }
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

// db [O] <- dy^T column, of dy [N, O] and column [N], which are null without a bias; then, where dy is not finite, db
// and dw [count] <- NaN, else dw is left alone. partial [plan.partials(O)] is room for sums; counters
// [kLaunchCounters], of which the tickets are used, are zero before the first launch that is given them, and no two
// launches that may run at once share them.
template <class T>
cudaError_t launch_bias_grad(
    const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, const Accumulator<T>* column, T* dw, int64_t count,
    T* db, Accumulator<T>* partial, unsigned* counters, const BiasPlan& plan, cudaStream_t stream);

}  // namespace consequentialism::cuda
