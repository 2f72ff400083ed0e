// Launcher of the Gram kernels. Pointers are to device memory of the stream's device; nothing waits for the device.
#pragma once

#include "input_gram.h"
#include "types.h"

namespace consequentialism::cuda {

// x is [rows, inputs], contiguous along a row, with row_stride elements from row to row; rows >= 1.
//
// gram <- x x^T [N, N], plus 1 everywhere with a bias (dual), or x1^T x1 [I + bias, I + bias] with x1 = [x, 1]
// (primal). G is Accumulator<T>, or double. tf32: float32 x may be rounded to TF32. plan = plan_gram(...); workspace
// has plan.workspace_bytes, aligned to 16.
template <class T, class G>
cudaError_t launch_input_gram(
    const T* x, int64_t rows, int64_t inputs, int64_t row_stride, bool bias, bool primal, bool tf32, G* gram,
    const GramPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace consequentialism::cuda
