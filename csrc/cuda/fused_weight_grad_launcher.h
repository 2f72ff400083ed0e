// Launcher of the kernel that computes a whole weight gradient. Pointers are to device memory of the stream's device;
// nothing waits for the device.
#pragma once

#include "damped_inverse.h"
#include "fused_weight_grad.h"
#include "types.h"

namespace consequentialism::cuda {

// x [rows, inputs] and dy [rows, outputs], contiguous along a row; dw [outputs, inputs] and db [outputs], contiguous.
template <class T>
struct FusedArguments {
  const T* x;
  const T* dy;
  T* dw;
  T* db;  // null without a bias
  int64_t x_stride;
  int64_t dy_stride;
  int64_t rows;
  int64_t inputs;
  int64_t outputs;
  bool tf32;                            // float32 may be rounded to TF32
  InverseItem<Accumulator<T>> inverse;  // its options; the matrices are in shared memory
};

// dw, db <- dy^T P [x, 1] with P the inverse of the damped Gram, by plan = plan_fused(...). NaN everywhere where an
// entry of x or dy is not finite. Where the device cannot hold the blocks of a planned cooperative launch at once, each
// computes the whole Gram. counters [kLaunchCounters], of which the barrier's and one ticket are used, are
// zero before the first launch that is given them; no two launches that may run at once share them. workspace has
// plan.workspace_bytes, aligned to 16.
template <class T>
cudaError_t launch_fused_weight_grad(
    const FusedArguments<T>& arguments, const FusedPlan& plan, void* workspace, unsigned* counters,
    unsigned* breakdowns, cudaStream_t stream);

}  // namespace consequentialism::cuda
