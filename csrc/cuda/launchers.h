// Launchers of the kernels. Pointers are to device memory of the stream's device; nothing waits for the device.
#pragma once

#include "factor.h"

#ifdef CONSEQUENTIALISM_HOST_SHIM
#include "shim.h"
#else
#include <cuda_runtime.h>
#endif

namespace consequentialism::cuda {

// count matrices of order n, at most kMaxFactorItems, by plan = plan_factor(n, sizeof(T), ...). workspace has
// count * plan.workspace_bytes, aligned to 128. *breakdowns counts the matrices whose first attempt broke down.
template <class T>
cudaError_t launch_factor(
    const FactorItem<T>* items, int count, int64_t n, const FactorPlan& plan, void* workspace, unsigned* breakdowns,
    cudaStream_t stream);

}  // namespace consequentialism::cuda
