// Launcher of the factored_inverse kernels. Pointers are to device memory of the stream's device; nothing waits for
// the device.
#pragma once

#include "damped_inverse.h"
#include "types.h"

namespace consequentialism::cuda {

// The inverses of `count` items of order n from their factors, by two launches. workspace is as a resident cluster
// leaves it (InverseTeam::kResident); where that has filled an inverse, or only_if says so, nothing is done. tall, in
// float32: V V^T by kTallSquare tiles a block.
template <class T>
cudaError_t launch_factored_inverse(
    const InverseBatch<T>& batch, int count, int n, unsigned char* workspace, size_t workspace_bytes, bool tall,
    cudaStream_t stream);

}  // namespace consequentialism::cuda
