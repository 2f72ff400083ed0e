// Launcher of the damped_inverse kernels. Pointers are to device memory of the stream's device; nothing waits for the
// device.
#pragma once

#include "damped_inverse.h"
#include "types.h"

namespace consequentialism::cuda {

// count matrices of order n, at most kMaxInverseItems, by a plan for n and T. workspace has
// count * plan.workspace_bytes, aligned to 128. *breakdowns counts the matrices whose first attempt
// broke down, here or elsewhere.
template <class T>
cudaError_t launch_damped_inverse(
    const InverseItem<T>* items, int count, int64_t n, const InversePlan& plan, void* workspace, unsigned* breakdowns,
    cudaStream_t stream);

// Limits::clusters, ::resident_blocks and ::resident_clusters of the current device, for all kernels: an extension of
// PTX below 9.0 has kernels without clusters, and a chip or a slice of one may have fewer processors in a group than a
// cluster has blocks. Loads what a capture would forbid to load.
cudaError_t clusters_run(bool* run, int* resident_blocks, int* resident_clusters);

// The current device's own counter for launch_damped_inverse. Zero when the process begins.
cudaError_t breakdown_counter_address(unsigned** address);

}  // namespace consequentialism::cuda
