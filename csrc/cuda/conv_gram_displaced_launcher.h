// Launcher of a convolution's Gram from displaced products. Pointers are to device memory of the stream's device;
// nothing waits for the device.
#pragma once

#include "conv_gram_displaced.h"
#include "types.h"

namespace consequentialism::cuda {

// As launch_conv_gram, by plan = plan_conv_gram_displaced(...) for T, whose tile is not 0; padded has plan.padded_bytes
// and workspace plan.workspace_bytes, both aligned to 16.
template <class From, class T>
cudaError_t launch_conv_gram_displaced(
    const From* x, const std::array<int64_t, 5>& strides, const ConvGeometry& geometry, bool bias, bool tf32,
    Accumulator<T>* gram, const DisplacedPlan& plan, T* padded, void* workspace, cudaStream_t stream);

}  // namespace consequentialism::cuda
