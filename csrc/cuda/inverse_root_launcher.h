// Launcher of the inverse root. Pointers are to device memory of the stream's device; nothing waits for the device.
#pragma once

#include "inverse_root.h"
#include "types.h"

namespace consequentialism::cuda {

// result <- matrix^(-1/root), both [batch, order, order], contiguous and apart: symmetric, with eigenvalues above 0, at
// most 1. By X <- X T, M <- T^root M with T = a I + b M + c M^2, a, b, c from coefficients [steps, 3] on the host; root
// is a power of 2, steps and batch and order at least 1. plan = plan_inverse_root(...); workspace has
// plan.workspace_bytes, aligned to 16.
template <class G>
cudaError_t launch_inverse_root(
    const G* matrix, const InverseRootShape& shape, int64_t root, const double* coefficients, int64_t steps, G* result,
    const InverseRootPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace consequentialism::cuda
