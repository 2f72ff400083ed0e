// Launcher of the factored_inverse kernels. Pointers are to device memory of the stream's device; nothing waits for
// the device.
#pragma once

#include "damped_inverse.h"
#include "types.h"

namespace consequentialism::cuda {

// The inverses of `count` items of order n from their factors, by two launches. workspace is as a resident cluster of
// this plan leaves it (InverseTeam::kResident); where that has filled an inverse, or only_if says so, nothing is done.
template <class T>
cudaError_t launch_factored_inverse(
    const InverseBatch<T>& batch, int count, int n, const InversePlan& plan, unsigned char* workspace,
    cudaStream_t stream);

// Loads the module of these kernels on the current device, which a capture would forbid.
cudaError_t load_factored_inverse();

}  // namespace consequentialism::cuda
