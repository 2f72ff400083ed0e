// Launcher of the kernel that applies an inverse. Pointers are to device memory of the stream's device; nothing waits
// for the device.
#pragma once

#include "emended_input.h"
#include "types.h"

namespace consequentialism::cuda {

// The type of an emended input.
template <class T>
using Emended = std::conditional_t<std::is_same_v<T, float16>, float, T>;

// x is [rows, inputs], contiguous along a row, with row_stride elements from row to row; rows >= 1.
//
// y [N, I] and column [N] <- P [x, 1] (dual, P [N, N]) or [x, 1] P (primal, P [I + bias, I + bias]), the column being
// the last one of the product with a bias and untouched, possibly null, without. P is symmetric, its rows are
// inverse_stride elements apart; with a double P all is computed in float64. tf32: float32 x and P may be rounded to
// TF32. plan = plan_emend(...).
template <class T, class G>
cudaError_t launch_emended_input(
    const G* inverse, int64_t inverse_stride, const T* x, int64_t rows, int64_t inputs, int64_t row_stride, bool bias,
    bool primal, bool tf32, Emended<T>* y, Accumulator<T>* column, const EmendPlan& plan, cudaStream_t stream);

}  // namespace consequentialism::cuda
