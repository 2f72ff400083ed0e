// Launcher of the decayed Gram. Pointers are to device memory of the stream's device; nothing waits for the device.
#pragma once

#include "decayed_gram.h"
#include "types.h"

namespace consequentialism::cuda {

// gram [blocks, b, b] <- memory * before + beta * the diagonal blocks of x1^T x1, x1 = [x, 1] with a bias; zeros where
// a block is smaller than b = block_order(...). x is [rows, inputs], contiguous along a row, rows >= 1. before is not
// read where memory is 0, and may be null then; it is not gram. G is Accumulator<T>. tf32: float32 x may be rounded to
// TF32. plan = plan_decayed_gram(...); workspace has plan.workspace_bytes, aligned to 16.
template <class T, class G>
cudaError_t launch_decayed_gram(
    const G* before, const T* x, const DecayedGramShape& shape, int64_t row_stride, double memory, double beta,
    bool tf32, G* gram, const GramPlan& plan, void* workspace, cudaStream_t stream);

}  // namespace consequentialism::cuda
