// Launcher of the damped_inverse kernels. Pointers are to device memory of the stream's device; nothing waits for the
// device.
#pragma once

#include "damped_inverse.h"
#include "types.h"

namespace consequentialism::cuda {

// count matrices of order n, at most kMaxInverseItems, by plan = plan_damped_inverse(n, sizeof(T), ...). workspace has
// count * plan.workspace_bytes, aligned to 128. *breakdowns counts the matrices whose first attempt
// broke down, here or elsewhere.
template <class T>
cudaError_t launch_damped_inverse(
    const InverseItem<T>* items, int count, int64_t n, const InversePlan& plan, void* workspace, unsigned* breakdowns,
    cudaStream_t stream);

// Whether clusters of kInverseClusterBlocks run on the current device: an extension of PTX below 9.0 has kernels
// without any, and a slice of a chip may be too small. And of how many blocks, 16, 8 or 0, a resident cluster may be.
cudaError_t clusters_run(bool* run, int* resident_blocks);

// The current device's own counter for launch_damped_inverse. Zero when the process begins.
cudaError_t breakdown_counter_address(unsigned** address);

}  // namespace consequentialism::cuda
