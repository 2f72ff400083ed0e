// Launchers of the kernels. Pointers are to device memory of the stream's device; nothing waits for the device.
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

// The current device's own counter for launch_damped_inverse. Zero when the process begins.
cudaError_t breakdown_counter_address(unsigned** address);

// How many entries `broken` has below.
int64_t broken_flags(int64_t outputs);

// db [O] = dy^T column, and in broken where dy [N, O] is not finite. column [N] and db are null without a bias.
template <class T>
cudaError_t launch_bias_grad(
    const T* dy, int64_t rows, int64_t outputs, int64_t row_stride, const Accumulator<T>* column, T* db, int* broken,
    cudaStream_t stream);

// dw [count] and db [O] <- NaN if broken says so.
template <class T>
cudaError_t launch_poison(
    T* dw, int64_t count, T* db, int64_t outputs, const int* broken, int processors, cudaStream_t stream);

}  // namespace consequentialism::cuda
