// Launcher of a convolution's Gram. Pointers are to device memory of the stream's device; nothing waits for the device.
#pragma once

#include "conv_gram.h"
#include "types.h"

namespace consequentialism::cuda {

// gram [groups, I + bias, I + bias] <- patches^T patches, with ones beside them where there is a bias; I are the
// channels of a group times the taps, the channel first. x [B, C, D, H, W] has any strides, B >= 1; its patches are
// multiplied in T, which is From or float64. tf32: float32 may be rounded to TF32. plan = plan_conv_gram(...), for T;
// padded has plan.padded_bytes and workspace plan.gram.workspace_bytes, both aligned to 16.
template <class From, class T>
cudaError_t launch_conv_gram(
    const From* x, const std::array<int64_t, 5>& strides, const ConvGeometry& geometry, bool bias, bool tf32,
    Accumulator<T>* gram, const ConvGramPlan& plan, T* padded, void* workspace, cudaStream_t stream);

}  // namespace consequentialism::cuda
