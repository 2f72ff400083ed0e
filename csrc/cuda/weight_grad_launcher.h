// Launchers of the kernels of weight_grad. Pointers are to device memory of the stream's device; nothing waits for the
// device.
#pragma once

#include "types.h"

namespace consequentialism::cuda {

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
